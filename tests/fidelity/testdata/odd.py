"""Sockets as hardly anybody makes them."""
from peers import *

CASES, OTHERS = {}, {}
IP_TTL, IP_MINTTL, IPV6_UNICAST_HOPS, IPV6_MINHOPCOUNT = 2, 21, 16, 73
SO_PEERNAME, TCP_WINDOW_CLAMP = 28, 10
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
QUEUES = 1, 2  # what was received, what is to be sent


def case(f, label):
    CASES[label] = f


def hops(net):
    """What sets the hop limit of what is sent, and the least of what is taken."""
    if net.family == 4:
        return (socket.IPPROTO_IP, IP_TTL), (socket.IPPROTO_IP, IP_MINTTL)
    return (socket.IPPROTO_IPV6, IPV6_UNICAST_HOPS), (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT)


def next_door(net):
    """A peer whose packets no router may have passed on, twice: the first connection
    waits for its dial, the second may not."""
    sent, taken = hops(net)
    net.listener.setsockopt(*sent, 255)
    saw = []
    for _ in range(2):
        c, s = net.pair((*taken, 255))
        c.sendall(content(3000))
        s.sendall(exactly(s, 3000))
        saw.append(digest(exactly(c, 3000)))
        c.close()
        saw.append(drain(s))
    return saw


def from_loopback(net):
    """A source that leads nowhere. With IPv6 the kernel sends a SYN all the same."""
    if net.family == 6:
        return "IPv4 only"
    c = net.client()
    c.bind(("127.0.0.1", 0))
    c.settimeout(LIMIT)
    return attempt(c.connect, net.address()), error(c), c.getsockname()[0]


def port_0(net):
    c = net.client()
    c.settimeout(LIMIT)
    net.made += 1
    return attempt(c.connect, (HOSTS[net.family], 0)), error(c), attempt(c.getpeername)


def same_port(how):
    """One source port to one destination, over and over."""
    def f(net):
        saw, port = [], 0
        for n in range(10):
            c = net.client((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1))
            c.bind((OWN[net.family], port))
            port = c.getsockname()[1]
            net.connect(c)
            s = net.accept()
            (c if how == "reset" else s).sendall(content(100, bytes([n])))
            saw.append(digest(exactly(s if how == "reset" else c, 100)))
            end(c if how == "reset" else s, how)
            saw.append(drain(s if how == "reset" else c))
            c.close()
        return saw
    return f


def same_socket(net):
    """One socket that connects, and is disconnected, over and over."""
    saw, c = [], net.client()
    for n in range(10):
        net.connect(c)
        s = net.accept()
        s.sendall(content(100, bytes([n])))
        saw.append(digest(exactly(c, 100)))
        libc.connect(c.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16)
        saw.append(drain(s))
    return saw


def narrow(*option):
    """Buffers and windows with hardly any room."""
    def f(net):
        c, s = net.pair(option)
        saw = []
        for a, b in ((s, c), (c, s)):
            sending = Later(a.sendall, content(200_000))
            saw += [digest(exactly(b, 200_000)), sending.result()]
        return saw
    return f


def names(net):
    """Who a socket says that it is, up to its end and after it."""
    def peer():
        raw = c.getsockopt(socket.SOL_SOCKET, SO_PEERNAME, 16 if net.family == 4 else 28)
        at = raw[4:8] if net.family == 4 else raw[8:24]
        return struct.unpack("!H", raw[2:4])[0] == net.port, socket.inet_ntop(net.kind, at)
    c, s = net.pair()
    saw = [c.getpeername()[0], c.getpeername()[1] == net.port, peer(), c.getsockname()[0]]
    s.close()
    drain(c)
    saw += [attempt(c.getpeername)[0], peer()]
    c.shutdown(socket.SHUT_WR)
    await_true(lambda: attempt(c.getpeername) == "ENOTCONN")
    return saw + [attempt(c.getpeername), attempt(peer), c.getsockname()[0]]


def edges(net):
    """What one edge-triggered epoll tells, step by step."""
    e = select.epoll()
    net.open.append(e)
    c = net.client()
    c.setblocking(False)
    e.register(c.fileno(), IN | OUT | RDHUP | PRI | select.EPOLLET)

    def edge(want):
        got = 0
        for _ in range(LIMIT):
            for _, events in e.poll(1):
                got |= events
            if got & want == want:
                break
        return "+".join(k for k, v in EVENTS.items() if got & v & (want | ERR))
    saw = [name(c.connect_ex(net.address())), edge(OUT)]
    net.made += 1
    s = net.accept()
    for word in (b"x", b"yy"):
        s.sendall(word)
        saw += [edge(IN), c.recv(10).decode()]
    s.shutdown(socket.SHUT_WR)
    saw += [edge(IN | RDHUP), c.recv(10).decode()]
    c.send(b"z")
    saw.append(exactly(s, 1).decode())
    s.close()
    c.send(b"who is there?")
    return saw + [edge(ERR | HUP), error(c)]


def move(net, *options):
    """A connection that is taken out of one socket and put into another, as by a
    checkpoint; the first one has some options."""
    c, s = net.pair(*options)
    c.sendall(b"hello")
    exactly(s, 5)
    acked(c)
    c.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    own, peer, at = c.getsockname(), c.getpeername(), []
    for q in QUEUES:
        c.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, q)
        at.append(c.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, 4))
    c.close()
    d = net.client((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), (socket.IPPROTO_TCP, TCP_REPAIR, 1))
    for q, seq in zip(QUEUES, at):
        d.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, q)
        d.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, seq)
    d.bind(own)
    d.connect(peer)
    d.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    d.settimeout(LIMIT)
    return d, s


def restored(net):
    net.made += 1  # it is one more to whoever counts connects
    d, s = move(net)
    d.sendall(b"again")
    saw = [exactly(s, 5).decode(), d.getpeername() == net.address()]
    s.sendall(b"there")
    saw.append(exactly(d, 5).decode())
    s.close()
    return saw + [drain(d)]


def restored_elsewhere(net):
    """The first socket was left alone, so the other one's connection is nobody's."""
    d, _ = move(net, (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0"))
    if (known := attempt(d.sendall, b"again")) is not None:
        return known
    events(d, HUP)
    return error(d)


case(next_door, "hop limit")
case(from_loopback, "source on loopback")
case(port_0, "port 0")
case(same_port("reset"), "same port, reset")
case(same_port("close"), "same port, closed by the server")
case(same_socket, "same socket")
case(narrow(socket.SOL_SOCKET, socket.SO_RCVBUF, 1), "small receive buffer")
case(narrow(socket.SOL_SOCKET, socket.SO_SNDBUF, 1), "small send buffer")
case(narrow(socket.IPPROTO_TCP, TCP_WINDOW_CLAMP, 1000), "small window")
case(narrow(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 100), "small segments")
case(names, "names")
case(edges, "edges")
case(restored, "restored")
OTHERS["restored elsewhere"] = restored_elsewhere

if __name__ == "__main__":
    main(CASES | OTHERS if sys.argv[2:] else CASES)
