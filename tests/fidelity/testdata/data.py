"""The ways to write and to read."""
from peers import *

CASES = {}


def case(label, *options):
    def add(f):
        CASES[label] = lambda net: f(net, *net.pair(*options))
        return f
    return add


def both_ways(label, *options):
    """A case for the application writing, and one for the server."""
    def add(f):
        CASES[label] = lambda net: f(net, *net.pair(*options))
        CASES[label + ", the other way"] = lambda net: f(net, *reversed(net.pair(*options)))
        return f
    return add


NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@both_ways("nothing written")
def nothing(net, a, b):
    saw = [a.send(b""), now(b, b.recv, 10), a.send(b"x"), b.recv(10), a.send(b"")]
    a.shutdown(socket.SHUT_WR)
    return saw + [drain(b), attempt(a.send, b"")]


@both_ways("single bytes", NODELAY)
def single(net, a, b):
    there = Later(drain, b)
    a.setsockopt(*NODELAY)
    for x in content(5000):
        a.send(bytes([x]))
    a.shutdown(socket.SHUT_WR)
    return there.result()


@both_ways("64 KiB at a time")
def large(net, a, b):
    there = Later(drain, b)
    data = content(64 << 16)
    sent = []
    for n in range(0, len(data), 64 << 10):
        a.sendall(data[n:n + (64 << 10)])
    a.shutdown(socket.SHUT_WR)
    return there.result()


@case("both at once, 8 MB each")
def duplex(net, c, s):
    def side(x, salt):
        there = Later(drain, x)
        x.sendall(content(8 << 20, salt))
        x.shutdown(socket.SHUT_WR)
        return there.result()
    one = Later(side, c, b"c")
    return [side(s, b"s"), one.result()]


@both_ways("sendfile")
def sendfile(net, a, b):
    with open("/proc/self/exe", "rb") as f:
        size = os.fstat(f.fileno()).st_size
        want = digest(f.read())
        there = Later(lambda: digest(exactly(b, size)))
        at = 0
        while at < size:
            select.select([], [a], [])
            at += os.sendfile(a.fileno(), f.fileno(), at, size - at)
        return there.result() == want


@both_ways("splice")
def splice(net, a, b):
    """From a pipe to the socket, and from the other socket to a pipe."""
    a.setblocking(True)
    b.setblocking(True)
    pipes = [os.pipe() for _ in range(2)]
    data = content(3_000_000)

    def feed():
        with open(pipes[0][1], "wb", closefd=False) as f:
            f.write(data)
        os.close(pipes[0][1])

    def out():
        while os.splice(pipes[0][0], a.fileno(), 1 << 16):
            pass
        a.shutdown(socket.SHUT_WR)

    def back():
        while os.splice(b.fileno(), pipes[1][1], 1 << 16):
            pass
        os.close(pipes[1][1])
    running = [Later(f) for f in (feed, out, back)]
    with open(pipes[1][0], "rb", closefd=False) as f:
        got = f.read()
    saw = [r.result() for r in running] + [digest(got), got == data]
    os.close(pipes[0][0])
    os.close(pipes[1][0])
    return saw


@both_ways("zero copy")
def zero_copy(net, a, b):
    """Every send is reported as complete, in order and once."""
    a.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    data = content(40 * 50_000)
    there = Later(lambda: digest(exactly(b, len(data))))
    sent, done, at = [], [], 0
    while at < len(data):
        sent.append(data[at:at + 50_000])  # which has to stay as it is
        at += a.send(sent[-1], MSG_ZEROCOPY)
    saw = [there.result() == digest(data)]
    p = select.poll()
    p.register(a.fileno(), 0)
    while len(done) < len(sent) and p.poll(LIMIT * 1000):
        _, anc, _, _ = a.recvmsg(1, 512, socket.MSG_ERRQUEUE)
        # struct sock_extended_err: errno, origin 5, type, code, pad, first, last
        number, origin, _, _, _, first, last = struct.unpack("IBBBBII", anc[0][2][:16])
        done += range(first, last + 1)
        saw += [x for x in ("error",) if number or origin != 5]
    return saw + [done == list(range(len(sent))), acked(a)]


@both_ways("peek")
def peek(net, a, b):
    a.sendall(content(1000))
    has(b, 1000)
    saw = [digest(b.recv(n, socket.MSG_PEEK)) for n in (1, 10, 2000)] + [digest(b.recv(500))]
    saw.append(digest(b.recv(2000, socket.MSG_PEEK)))
    a.sendall(content(10, b"more"))
    has(b, 510)
    saw += [digest(b.recv(2000, socket.MSG_PEEK)), digest(exactly(b, 510)),
            now(b, b.recv, 1, socket.MSG_PEEK)]
    a.close()
    events(b, RDHUP)
    return saw + [b.recv(1, socket.MSG_PEEK), b.recv(1)]


@both_ways("flags of reading")
def flags(net, a, b):
    b.setblocking(True)
    all_of = Later(lambda: digest(b.recv(50_000, socket.MSG_WAITALL)))
    for n in range(50):
        a.sendall(content(1000))
    saw = [all_of.result()]
    a.sendall(content(2000) + b"tail")
    has(b, 2004)
    # With MSG_TRUNC they are thrown away.
    saw += [libc.recv(b.fileno(), None, ctypes.c_size_t(2000), socket.MSG_TRUNC), b.recv(10)]
    all_of = Later(lambda: digest(b.recv(50_000, socket.MSG_WAITALL)))
    a.sendall(content(3))
    a.shutdown(socket.SHUT_WR)
    return saw + [all_of.result(), attempt(b.recv, 1, socket.MSG_WAITALL)]


@both_ways("low-water mark")
def low_water(net, a, b):
    b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
    a.sendall(content(999))
    has(b, 999)
    saw = [events(b, IN, 0.1)]
    a.sendall(b"x")
    saw += [events(b, IN), digest(b.recv(10_000))]
    a.sendall(content(10))
    has(b, 10)
    saw.append(events(b, IN, 0.1))
    a.shutdown(socket.SHUT_WR)
    return saw + [events(b, IN | RDHUP), drain(b)]


@both_ways("queues")
def queues(net, a, b):
    """What SIOCINQ and SIOCOUTQ tell."""
    saw = [number(x, r) for x in (a, b) for r in (SIOCINQ, SIOCOUTQ)]
    for n in (1, 300, 20_000):
        a.sendall(content(n))
        saw += [has(b, n), acked(a), number(a, SIOCOUTQ)]
        exactly(b, n // 2)
        saw.append(number(b, SIOCINQ))
        exactly(b, n - n // 2)
    n = fill(a)
    saw += [number(a, SIOCOUTQ) > 0, number(b, SIOCINQ) > 0]
    saw.append(digest(exactly(b, n)) == digest(bytes(n)))
    return saw + [acked(a), number(b, SIOCINQ)]


@both_ways("corked")
def corked(net, a, b):
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    there = Later(drain, b)
    for n in range(100):
        a.send(content(n + 1), socket.MSG_MORE if n % 2 else 0)
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    for n in range(100):
        a.send(content(n + 1), socket.MSG_MORE)
    a.shutdown(socket.SHUT_WR)
    return there.result()


@both_ways("vectors")
def vectors(net, a, b):
    parts = [content(n) for n in (1, 0, 1000, 7, 30_000, 0, 5)]
    there = Later(lambda: digest(exactly(b, 31_013)))
    saw = [a.sendmsg(parts), there.result()]
    a.sendmsg(parts[:4])
    has(b, 1008)
    into = [bytearray(n) for n in (3, 500, 0, 505)]
    saw.append(b.recvmsg_into(into)[0])
    return saw + [digest(b"".join(into))]


SET = {"keep-alive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
       "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
       "interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
       "count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
       "user timeout": (socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 54321),
       "no delay": NODELAY,
       "defer": (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1234),
       "mark": (socket.SOL_SOCKET, SO_MARK, 9),
       "linger2": (socket.IPPROTO_TCP, socket.TCP_LINGER2, 13),
       "low-water mark": (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3)}
KEPT = ("type", socket.SO_TYPE), ("domain", 39), ("protocol", 38), ("accepts", socket.SO_ACCEPTCONN), ("error", socket.SO_ERROR)


def options(net):
    """Options are what was set, before the connect and after, and the rest are
    the defaults."""
    saw = {}
    c, s = net.pair(*SET.values())
    d, _ = net.pair()
    e, _ = net.pair()
    for o in SET.values():
        e.setsockopt(*o)
    for label, o in SET.items():
        saw[label] = [x.getsockopt(*o[:2]) for x in (c, d, e)]
    for label, o in KEPT:
        saw[label] = d.getsockopt(socket.SOL_SOCKET, o)
    saw["congestion"] = d.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0")
    saw["state"] = d.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    saw["peer"] = d.getpeername()[:2] == net.address()
    saw["own"] = d.getsockname()[0]
    return saw


def local_view(net):
    """What the application can see of the way there: it ends at the handler."""
    c, _ = net.pair()
    level, mtu = (socket.IPPROTO_IP, 14) if net.family == 4 else (socket.IPPROTO_IPV6, 24)
    return [c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > 1500, c.getsockopt(level, mtu) > 1500]


CASES["options"] = options
CASES["the way there"] = local_view


def urgent(net, a, b, before, after):
    """An urgent byte, by a read of its own and by the mark in the stream."""
    if before:
        a.sendall(content(before))
    a.send(b"!", socket.MSG_OOB)
    if after:
        a.sendall(content(after))
    saw = [events(b, PRI), now(b, b.recv, 1, socket.MSG_OOB), now(b, b.recv, 1, socket.MSG_OOB)]
    has(b, before)
    saw.append(digest(b.recv(1 << 16)) if before else "")  # up to the mark
    saw.append(number(b, SIOCATMARK))
    saw.append(digest(exactly(b, after)))
    saw.append(number(b, SIOCATMARK))
    a.shutdown(socket.SHUT_WR)
    return saw + [drain(b)]


def urgent_inline(net, a, b):
    b.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    a.sendall(b"before")
    a.send(b"!", socket.MSG_OOB)
    a.sendall(b"after")
    saw = [events(b, PRI), has(b, 12), number(b, SIOCATMARK), b.recv(100), number(b, SIOCATMARK)]
    a.shutdown(socket.SHUT_WR)
    return saw + [exactly(b, 6), drain(b)]


def urgent_many(net, a, b):
    """One after the other, each read before the next."""
    saw = []
    for n in range(1, 20):
        a.sendall(content(n))
        a.send(bytes([n]), socket.MSG_OOB)
        saw.append([events(b, PRI), now(b, b.recv, 1, socket.MSG_OOB), digest(exactly(b, n))])
        b.sendall(b"next")
        exactly(a, 4)
    return saw


for before, after in ((5, 0), (0, 5), (5, 5), (3000, 2000)):
    both_ways(f"urgent, {before} bytes before and {after} after")(
        lambda net, a, b, before=before, after=after: urgent(net, a, b, before, after))
both_ways("urgent, inline")(urgent_inline)
both_ways("urgent, again and again")(urgent_many)


if __name__ == "__main__":
    main(CASES)
