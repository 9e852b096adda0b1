"""How connections end."""
from peers import *

CASES = {}


def case(f, label=None):
    CASES[label or f.__name__] = f
    return f


def sides(net, first, *options):
    """A connection: the side that acts first, and the other."""
    c, s = net.pair(*options)
    return (c, s) if first == "client" else (s, c)


def half_close(first, before, after):
    def run(net):
        a, b = sides(net, first)
        saw = []
        there = Later(drain, b)
        if before:
            a.sendall(content(before))
        a.shutdown(socket.SHUT_WR)
        saw.append(there.result())
        back = Later(drain, a)
        if after:
            b.sendall(content(after, b"back"))
        b.close()
        return saw + [back.result(), attempt(a.send, b"x")]
    return run


for who in ("client", "server"):
    for b, a in ((0, 0), (1, 0), (0, 1), (100, 3000), (500_000, 2_000_000), (0, 3_000_000), (3_000_000, 0)):
        case(half_close(who, b, a), f"half-close by the {who}, {b} bytes before and {a} after")


def alone(first):
    """One direction has ended; the other goes on for a while, message by message."""
    def run(net):
        a, b = sides(net, first)
        a.shutdown(socket.SHUT_WR)
        saw = [events(b, RDHUP)]
        for n in range(300):
            b.sendall(content(n % 7 + 1))
            if exactly(a, n % 7 + 1) != content(n % 7 + 1):
                return "wrong bytes"
        saw.append(events(a, OUT))
        b.shutdown(socket.SHUT_WR)
        saw += [events(a, HUP), drain(a), events(b, HUP), drain(b)]
        return saw
    return run


def both_queued(net):
    """Each side writes to the end, shuts, and only then reads."""
    c, s = net.pair()
    for a, salt in ((c, b"c"), (s, b"s")):
        a.sendall(content(30_000, salt))
        a.shutdown(socket.SHUT_WR)
    return [events(c, HUP), events(s, HUP), drain(c), drain(s)]


def at_once(how):
    def run(net):
        saw = []
        for _ in range(30):
            c, s = net.pair()
            both = threading.Barrier(2)
            ends = [Later(lambda x: (both.wait(), end(x, how)), x) for x in (c, s)]
            [e.result() for e in ends]
            if how == "shut":
                saw.append([events(x, HUP) for x in (c, s)] + [drain(x) for x in (c, s)])
        return [x for n, x in enumerate(saw) if x not in saw[:n]]
    return run


for who in ("client", "server"):
    case(alone(who), f"the {who} only listens")
case(both_queued, "both write, end and then read")
for how in ("shut", "close", "reset"):
    case(at_once(how), f"both {how} at once")


def ended(x):
    """What is there to see of a connection that is no more."""
    return [gone(x), error(x), drain(x), attempt(x.send, b"x"), drain(x)]


def resets(first, how, state):
    """One side resets a connection, by SO_LINGER or by unread bytes."""
    def run(net):
        a, b = sides(net, first)
        if state == "after bytes":
            a.sendall(content(1000))
            exactly(b, 1000)
        if state in ("bytes unread by the other", "bytes unread, the other has shut"):
            a.sendall(content(20_000))
            has(b, 20_000)
        if state in ("it has shut", "both have shut"):
            a.shutdown(socket.SHUT_WR)
            events(b, RDHUP)
        if state in ("the other has shut", "both have shut", "bytes unread, the other has shut"):
            b.shutdown(socket.SHUT_WR)
            events(a, RDHUP)
        if how == "unread":
            if state in ("the other has shut", "both have shut", "bytes unread, the other has shut"):
                return "no way"
            b.sendall(b"unread")
            has(a, 6)
            a.close()
        else:
            reset(a)
        if state == "both have shut":
            return [events(b, HUP), drain(b)]  # it was over before
        return ended(b)
    return run


STATES = ("at once", "after bytes", "bytes unread by the other", "it has shut", "the other has shut",
          "bytes unread, the other has shut", "both have shut")
for who in ("client", "server"):
    for way in ("linger", "unread"):
        for st in STATES:
            case(resets(who, way, st), f"reset by the {who}, {way}: {st}")


def reset_full(first, unread):
    """A reset while both directions are full: how much was on its way is not told."""
    def run(net):
        a, b = sides(net, first)
        fill(a)
        fill(b)
        if unread:
            a.close()
        else:
            reset(a)
        saw = [gone(b), error(b)]
        rest = drain(b).split(", ")[-1]
        return saw + [rest, attempt(b.send, b"x")]
    return run


for who in ("client", "server"):
    for u in (False, True):
        case(reset_full(who, u), f"reset by the {who}, {'unread' if u else 'linger'}: both full")


ROOM = (socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE


def fin_then_reset(first, size, wait, how="linger"):
    """What was sent before the end is there, whatever follows the end."""
    def run(net):
        saw = []
        net.listener.setsockopt(*ROOM)
        for _ in range(1 if wait else 25):
            a, b = sides(net, first, ROOM)
            a.sendall(content(size))
            if how == "answered":
                a.close()
                events(b, RDHUP)
                has(b, size)
                b.send(b"who is not there")
            else:
                a.shutdown(socket.SHUT_WR)
                if wait:
                    events(b, RDHUP)
                    has(b, size)
                elif size > 1:
                    acked(a)  # or the reset would overtake what is not sent yet
                reset(a)
            saw.append([gone(b), error(b), drain(b), attempt(b.send, b"x")])
            b.close()
        return [x for n, x in enumerate(saw) if x not in saw[:n]]
    return run


for who in ("client", "server"):
    for size in (0, 1, 50_000, 400_000):
        case(fin_then_reset(who, size, True), f"the {who} ends after {size} bytes, then resets")
        case(fin_then_reset(who, size, False), f"the {who} ends after {size} bytes and resets at once")
        case(fin_then_reset(who, size, True, "answered"), f"the {who} closes after {size} bytes and is written to")


def late_reader(net):
    """A response that fits the reader's buffer, and a server that resets for what
    it did not read: as servers do that answer before they have read a request."""
    saw = []
    for _ in range(20):
        c, s = net.pair()
        c.sendall(content(3000))
        has(s, 3000)
        s.sendall(content(40_000, b"answer"))
        acked(s)
        s.close()
        saw.append([gone(c), drain(c)])
        c.close()
    return [x for n, x in enumerate(saw) if x not in saw[:n]]


case(late_reader, "answered and not read")


def shut_read(first):
    def run(net):
        a, b = sides(net, first)
        a.shutdown(socket.SHUT_RD)
        saw = [events(a, RDHUP), attempt(a.recv, 10), attempt(b.send, b"into the void")]
        saw.append(acked(b))
        a.sendall(b"still speaks")
        saw.append(attempt(exactly, b, 12))
        a.shutdown(socket.SHUT_WR)
        return saw + [drain(b), attempt(b.send, b"x")]
    return run


for who in ("client", "server"):
    case(shut_read(who), f"the {who} shuts its reading")


def written_to(first):
    """Who closed is written to, and resets; the writer sees it at the second write."""
    def run(net):
        a, b = sides(net, first)
        a.close()
        saw = [events(b, RDHUP), attempt(b.send, b"1"), gone(b), attempt(b.send, b"2"), attempt(b.send, b"3")]
        return saw + [drain(b)]
    return run


for who in ("client", "server"):
    case(written_to(who), f"the {who} has closed and is written to")


def disconnects(net):
    """connect(AF_UNSPEC) resets, and the socket can be used again."""
    c, s = net.pair()
    c.sendall(b"once")
    saw = [exactly(s, 4)]
    libc.connect(c.fileno(), struct.pack("HHQ", 0, 0, 0), 16)
    saw.append(ended(s))
    net.connect(c)
    t = net.accept()
    c.sendall(b"twice")
    return saw + [exactly(t, 5)]


case(disconnects, "connect(AF_UNSPEC)")


if __name__ == "__main__":
    main(CASES)
