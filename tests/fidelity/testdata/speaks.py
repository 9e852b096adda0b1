"""Who speaks first, and how soon."""
from peers import *

CASES = {}


def case(f, label):
    CASES[label] = f


def unique(saw):
    return [x for n, x in enumerate(saw) if x not in saw[:n]]


def serving(net, serve, talk, rounds):
    """Rounds of connections: the server's part of each is on a thread of its own,
    and begins with the accept. Returns the different things that were seen."""
    saw = []
    for _ in range(rounds):
        server = Later(lambda: serve(net.accept()))
        c = net.client()
        early = attempt(net.connect, c)
        said = talk(c)
        if early:
            # A reset that comes before connect returns is what that returns.
            net.made += 1
            said = [s.replace("FIN", early) for s in said]
        saw.append([said, server.result()])
        c.close()
    return unique(saw)


BANNER = b"220 the server speaks first\r\n"


def banner(net):
    """MySQL, SMTP, FTP, SSH, NATS."""
    def serve(s):
        s.sendall(BANNER)
        return [exactly(s, 6), drain(s)]

    def talk(c):
        got = exactly(c, len(BANNER))
        c.sendall(b"QUIT\r\n")
        c.shutdown(socket.SHUT_WR)
        return got
    return serving(net, serve, talk, 100)


def long_banner(net):
    def serve(s):
        s.sendall(content(300_000))
        s.close()
    return serving(net, serve, drain, 10)


def said_and_gone(net, how, said):
    def serve(s):
        if said:
            s.sendall(BANNER)
        end(s, how)
    # Drained only after the end, so that it does not matter how soon it comes.
    return serving(net, serve, lambda c: [drain(c)], 100)


case(banner, "the server speaks first")
case(long_banner, "the server speaks first, long")
for how in ("close", "reset"):
    case(lambda net, how=how: said_and_gone(net, how, True), f"the server speaks first and {how}s")
    case(lambda net, how=how: said_and_gone(net, how, False), f"the server {how}s at once")


def client(net, how, size):
    """The client says all it has before the server has accepted; but for a reset,
    which gives up what is not accepted yet (docs/fidelity.md)."""
    saw = []
    for _ in range(100):
        c = net.client()
        net.connect(c)
        s = net.accept() if how == "reset" else None
        if size:
            c.sendall(content(size))
        end(c, how)
        s = s or net.accept()
        saw.append([events(s, RDHUP), drain(s)])
        s.close()
        c.close()
    return unique(saw)


for how in ("shut", "close", "reset"):
    for size in (0, 1, 8000):
        case(lambda net, how=how, size=size: client(net, how, size), f"the client says {size} bytes and {how}s")


def request(net):
    def serve(s):
        got = exactly(s, 5000)
        s.sendall(content(20_000, got))
        s.close()
        return digest(got)

    def talk(c):
        c.sendall(content(5000))
        return drain(c)
    return serving(net, serve, talk, 100)


def together(net):
    """Both speak at once, and then listen."""
    def side(x):
        x.sendall(content(5000))
        return [digest(exactly(x, 5000)), attempt(x.shutdown, socket.SHUT_WR), drain(x)]
    return serving(net, side, side, 100)


def silence(net):
    """Nobody says anything, and nothing happens."""
    c, s = net.pair()
    saw = [events(c, IN, 0.3), events(s, IN, 0.1)]
    c.close()
    return saw + [events(s, RDHUP), drain(s)]


case(request, "the client speaks first")
case(together, "both speak at once")
case(silence, "nobody speaks")


if __name__ == "__main__":
    main(CASES)
