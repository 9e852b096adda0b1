"""Connections that stay as they are for long. The kernel's timers are lowered to
a sixtieth or less, so that WHILE is more than ten minutes to them."""
from peers import *

CASES = {}
WHILE = 12  # seconds

KEEP = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2))


def case(label, *options):
    def add(f):
        CASES[label] = lambda net: f(net, *net.pair(*options))
        CASES[label + ", the other way"] = lambda net: f(net, *reversed(net.pair(*options)))
        return f
    return add


def nothing_happens(a, b):
    """Waits, and tells what has happened, which is to be nothing new."""
    p = select.epoll()
    for x in (a, b):
        # Without IN: into a full buffer bytes trickle.
        p.register(x.fileno(), PRI | RDHUP | select.EPOLLET)
    p.poll(0)  # what there was before
    try:
        return [e for _, e in p.poll(WHILE)]
    finally:
        p.close()


def says(a, b, n=1000):
    """A message from a to b arrives."""
    a.sendall(content(n))
    return exactly(b, n) == content(n)


@case("nobody ends")
@case("nobody ends, with keep-alive", *KEEP)
def idle(net, a, b):
    saw = [says(a, b), says(b, a), nothing_happens(a, b), says(a, b), says(b, a)]
    a.close()
    return saw + [drain(b)]


@case("one has ended")
@case("one has ended, with keep-alive", *KEEP)
def half_open(net, a, b):
    a.sendall(content(100))
    a.shutdown(socket.SHUT_WR)
    saw = [drain(b), nothing_happens(a, b), says(b, a), says(b, a, 1)]
    b.close()
    return saw + [drain(a)]


@case("one has ended and is not read")
def not_read(net, a, b):
    n = fill(a)
    a.shutdown(socket.SHUT_WR)
    saw = [nothing_happens(a, b), says(b, a)]
    got, b_end = counted(b)
    b.close()
    return saw + [got == n, b_end, drain(a)]


@case("one has ended, the other is not read")
def other_not_read(net, a, b):
    a.shutdown(socket.SHUT_WR)
    n = fill(b)
    saw = [drain(b), nothing_happens(a, b)]
    b.shutdown(socket.SHUT_WR)
    got, a_end = counted(a)
    return saw + [got == n, a_end]


@case("both have ended, one is not read")
def both_ended(net, a, b, most=1 << 30):
    n = fill(a, most)
    a.shutdown(socket.SHUT_WR)
    b.shutdown(socket.SHUT_WR)
    saw = [events(a, HUP), nothing_happens(a, b)]
    got, b_end = counted(b)
    return saw + [got == n or f"{got} of {n}", b_end, drain(a)]


@case("both have ended, a few are not read")
def few_not_read(net, a, b):
    """They fit in the buffers on the way, but not in the reader's."""
    return both_ended(net, a, b, 300_000)


@case("both have ended, neither is read")
def neither_read(net, a, b):
    m, n = fill(a), fill(b)
    a.shutdown(socket.SHUT_WR)
    b.shutdown(socket.SHUT_WR)
    saw = [nothing_happens(a, b)]
    for x, all_of in ((b, m), (a, n)):
        got, x_end = counted(x)
        saw += [got == all_of or f"{got} of {all_of}", x_end]
    return saw


def counted(s):
    n, _, how = drain(s).split(", ")
    return int(n.split()[0]), how


if __name__ == "__main__":
    main(CASES, together=True)
