"""Peers that are gone without a word: from some moment on the world drops all."""
from peers import *

CASES = {}

KEEP = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2))
TIMEOUT = ((socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 1500),)


def case(label, *options):
    def add(f):
        CASES[label] = lambda net: f(net, *net.pair(*options))
        return f
    return add


def cut(net):
    command("nft", "add", "element", "inet", "cut", "dead", "{ %d }" % net.port, world=True)


def noticed(c):
    return [gone(c), error(c), drain(c), attempt(c.send, b"x")]


@case("keep-alive")
def idle(net, c, s):
    cut(net)
    return noticed(c)


@case("keep-alive, unread bytes", *KEEP)
def unread(net, c, s):
    s.sendall(content(1000))
    has(c, 1000)
    cut(net)
    return noticed(c)


@case("keep-alive, the server has ended", *KEEP)
def server_ended(net, c, s):
    s.shutdown(socket.SHUT_WR)
    events(c, RDHUP)
    cut(net)
    return noticed(c)


@case("keep-alive, the client has ended", *KEEP)
def client_ended(net, c, s):
    c.shutdown(socket.SHUT_WR)
    events(s, RDHUP)
    cut(net)
    return noticed(c)


@case("keep-alive, the server is not read", *KEEP)
def server_not_read(net, c, s):
    fill(s)
    cut(net)
    return [gone(c), error(c), drain(c).split(", ")[-1], attempt(c.send, b"x")]


@case("unsent bytes")
@case("user timeout, unsent bytes", *TIMEOUT)
def unsent(net, c, s):
    cut(net)
    c.sendall(content(1000))
    return noticed(c)


@case("unsent and unread bytes")
@case("user timeout, unsent and unread bytes", *TIMEOUT)
def unsent_unread(net, c, s):
    s.sendall(content(1000))
    has(c, 1000)
    cut(net)
    c.sendall(content(1000))
    return noticed(c)


@case("unsent bytes, full")
def full(net, c, s):
    fill(c)
    cut(net)
    return noticed(c)


@case("user timeout and keep-alive", *KEEP[:3], *TIMEOUT)
def both(net, c, s):
    cut(net)
    return noticed(c)


@case("unsent bytes, the client ends")
@case("user timeout, the client ends", *TIMEOUT)
def ends(net, c, s):
    cut(net)
    c.sendall(content(1000))
    c.shutdown(socket.SHUT_WR)
    return noticed(c)


CASES["keep-alive"] = lambda net: idle(net, *net.pair(*KEEP))

if __name__ == "__main__":
    main(CASES, together=True)
