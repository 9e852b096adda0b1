"""Readers that do not read."""
from peers import *

CASES = {}
MOST = 1 << 20  # that a handler may hold of one direction
MANY = 40


def sockets(*filters):
    """The TCP sockets of the application's namespace: queues, addresses, process."""
    lines = command("ss", "-tnpH", *filters).splitlines()
    return [w for w in (l.split() for l in lines) if len(w) >= 5]


def port(address):
    return int(address.rsplit(":", 1)[1])


def held(c, s, wrote, there):
    """How much of what was written is in no kernel buffer, and so in between."""
    legs = [w for w in sockets(f"( sport = :{s.getsockname()[1]} or dport = :{s.getsockname()[1]} )")]
    known = 0
    for state, received, unsent, local, peer, *_ in legs:
        to_server = port(peer) == s.getsockname()[1]
        if to_server and port(local) == c.getsockname()[1]:  # the application's own
            known += int(unsent if there else received)
        elif to_server:  # the handler's upstream leg
            known += int(unsent if there else received)
        else:  # its downstream leg
            known += int(received if there else unsent)
    known += number(s, SIOCINQ if there else SIOCOUTQ)
    return wrote - known


def stalled(there, pace):
    def run(net):
        """A reader that stalls stops the writer, and one that goes on resumes it."""
        c, s = net.pair()
        a, b = (c, s) if there else (s, c)
        saw = []
        for _ in range(2):
            n, stopped = fill(a), events(a, OUT, 1)
            for _ in range(5):
                if stopped == "nothing":
                    break
                # On a busy machine bytes may rest on their way for longer.
                n, stopped = n + fill(a), events(a, OUT, 1)
            saw.append(stopped)
            # A fill may end while bytes are still on their way.
            ok = await_true(lambda: 0 <= held(c, s, n, there) <= MOST)
            saw.append("bounded" if ok else f"{held(c, s, n, there)} bytes in between")
            got = 0
            while got < n:
                got += len(exactly(b, min(pace, n - got)))
            saw += [got == n, events(a, OUT), number(b, SIOCINQ)]
        more = content(5_000_000)
        there_ = Later(a.sendall, more)
        saw += [digest(exactly(b, len(more))), there_.result()]
        a.close()
        return saw + [drain(b)]
    return run


def memory(net):
    """What a handler needs for many that stall in both directions, in bytes each."""
    def handler():
        found = {w[5].split("pid=")[1].split(",")[0] for w in sockets() if len(w) > 5 and "pillion" in w[5]}
        return found.pop() if found else None

    def resident(pid):
        lines = open(f"/proc/{pid}/status").read().splitlines()
        return next(int(l.split()[1]) << 10 for l in lines if l.startswith("VmRSS"))
    net.pair()
    pid = handler()
    if net.redirected and not pid:
        return "no handler"
    before = resident(pid) if pid else 0
    pairs = [net.pair() for _ in range(MANY)]
    filling = [Later(fill, x) for p in pairs for x in p]
    if any(not isinstance(f.result(), int) for f in filling):
        return "not filled"
    each = (resident(pid) - before) // MANY if pid else 0
    return "bounded" if each <= 2 * MOST else f"{each} bytes each"


def both_full(net):
    """Neither reads, then both do."""
    c, s = net.pair()
    one = Later(fill, c)
    other = fill(s)
    written = one.result(), other
    got = [Later(exactly, x, n) for x, n in ((s, written[0]), (c, written[1]))]
    return [len(g.result()) == n for g, n in zip(got, written)] + [events(x, OUT) for x in (c, s)]


for label, there in (("the server does not read", True), ("the client does not read", False)):
    CASES[label] = stalled(there, 1 << 20)
    CASES[label + ", then slowly"] = stalled(there, 3000)
CASES["neither reads"] = both_full

if __name__ == "__main__":
    if sys.argv[2:] == ["memory"]:
        main({"memory": memory})
    else:
        main(CASES, together=True)
