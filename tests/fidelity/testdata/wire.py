"""What the application set, on the wire between the upstream leg and the server."""
from peers import *

CASES = {}


def case(f, label):
    CASES[label] = f


class Capture:
    """What comes in from the application's machine to a port of the world."""

    def __init__(self, net):
        self.net = net
        self.s = in_world(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        in_world(self.s.bind, ("world0", 0))
        self.s.settimeout(LIMIT)
        net.open.append(self.s)

    def next(self):
        """The next packet: its class, source, sequence number, length and flags."""
        while True:
            p, where = self.s.recvfrom(65536)
            if where[2] != 0:  # not to this host
                continue
            if p[0] >> 4 == 4 and self.net.family == 4 and p[9] == 6:
                tcp = p[(p[0] & 15) * 4:struct.unpack("!H", p[2:4])[0]]
                tos, source = p[1], socket.inet_ntop(socket.AF_INET, p[12:16])
            elif p[0] >> 4 == 6 and self.net.family == 6 and p[6] == 6:
                tcp = p[40:40 + struct.unpack("!H", p[4:6])[0]]
                tos, source = (p[0] & 15) << 4 | p[1] >> 4, socket.inet_ntop(socket.AF_INET6, p[8:24])
            else:
                continue
            if struct.unpack("!H", tcp[2:4])[0] == self.net.port:
                return tos & ~3, source, struct.unpack("!I", tcp[4:8])[0], len(tcp) - (tcp[12] >> 4) * 4, tcp[13]

    def until_fin(self):
        """All up to the end of the connection."""
        all = [self.next()]
        while not all[-1][4] & 1:
            all.append(self.next())
        return all


def conversation(c, s):
    for n in (1, 3000, 100):
        c.sendall(content(n))
        s.sendall(exactly(s, n))
        exactly(c, n)
    c.close()
    drain(s)


def classes(net):
    """TOS and source address of every packet from the SYN to the FIN."""
    option = (socket.IPPROTO_IP, socket.IP_TOS) if net.family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    saw = []
    for value in (None, 0x28, 0xb8):
        wire = Capture(net)
        conversation(*net.pair(*[(*option, value)] if value else []))
        saw.append(sorted({p[:2] for p in wire.until_fin()}))
    return saw


def source(net):
    """A source address that the application bound, with and without a port."""
    saw = []
    for port, early in ((0, 0), (0, 1), (23456, 0)):
        wire = Capture(net)
        c = net.client((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), (socket.IPPROTO_IP, 24, early))
        c.bind((SECOND[net.family], port))
        net.connect(c)
        s = net.accept()
        saw.append([s.getpeername()[0], c.getsockname()[0]])
        conversation(c, s)
        saw.append(sorted({p[1] for p in wire.until_fin()}))
    return saw


def counted(net, match, *options):
    """How the packets to the server count in the application's firewall: all, some
    or none, by a match."""
    table = f"count{net.port}"
    command("nft", f"table inet {table} {{ chain out {{ type filter hook output priority 0; "
            f"oifname eth0 tcp dport {net.port} jump both; }} ; chain both {{ counter; {match} counter; }} ; }}")
    try:
        c, s = net.pair(*options)
        conversation(c, s)
        listed = json.loads(command("nft", "-j", "list", "chain", "inet", table, "both"))
        counts = [e["counter"]["packets"] for r in listed["nftables"] if "rule" in r
                  for e in r["rule"]["expr"] if "counter" in e]
        return "all" if counts[0] == counts[1] > 0 else f"{counts[1]} of {counts[0]}"
    finally:
        command("nft", "delete", "table", "inet", table)


def counts(match, *options):
    return lambda net: counted(net, match, *options)


def marked_route(net):
    """A mark that a routing rule sends nowhere: the connection cannot be made."""
    version = f"-{net.family}"
    command("ip", version, "rule", "add", "fwmark", "0x77", "unreachable", "pref", "77")
    try:
        c = net.client((socket.SOL_SOCKET, SO_MARK, 0x77))
        c.settimeout(LIMIT)
        net.made += 1
        got = attempt(c.connect, net.address())
        if got is None:
            # The kernel puts an ICMP error about a SYN into the socket's queue, which
            # poll tells of, before it is the socket's error, which connect asks for.
            select.select([], [], [], 0.01)
            got = error(c)
        return got
    finally:
        command("ip", version, "rule", "del", "pref", "77")


def keep_alive(net):
    """The probes of a connection on which nothing is said."""
    wire = Capture(net)
    c, s = net.pair((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3))
    start, probes = wire.next()[2], 0
    while probes < 3:
        p = wire.next()
        # A probe repeats a byte that was acknowledged.
        probes += p[2] == start and p[3] <= 1 and not p[4] & 2
    return probes


def legs(net):
    """What the kernel tells of the sockets whose peer is the server."""
    lines = command("ss", "-tinoH", f"dst [{HOSTS[net.family]}]:{net.port}").splitlines()
    return [" ".join(lines[n:n + 2]) for n in range(0, len(lines), 2)]


def congestion(net):
    """An algorithm that is not the default."""
    read = lambda what: open(f"/proc/sys/net/ipv4/tcp_{what}").read().split()
    others = sorted(set(read("available_congestion_control")) - set(read("congestion_control")))
    saw = []
    for name in others or read("congestion_control"):
        c, s = net.pair((socket.IPPROTO_TCP, TCP_CONGESTION, name.encode()))
        c.sendall(content(100_000))
        exactly(s, 100_000)
        saw.append([name, [name in leg.split() for leg in legs(net)]])
        c.close()
        drain(s)
        s.close()
        await_true(lambda: not legs(net))
    return saw


def keep_alive_timer(net):
    """What is left until the first probe, in minutes: the kernel tells no more."""
    c, s = net.pair((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3000))
    left = [leg.split("timer:(keepalive,")[1].split("min")[0] for leg in legs(net)]
    return [45 <= int(n) <= 50 for n in left]


case(classes, "class of service")
case(source, "bound source")
case(counts("meta mark 0x1234", (socket.SOL_SOCKET, SO_MARK, 0x1234)), "mark")
case(counts("meta mark 0x0"), "no mark")
case(counts("meta priority 0:5", (socket.SOL_SOCKET, SO_PRIORITY, 5)), "priority")
case(marked_route, "mark without a route")
case(keep_alive, "keep-alive")
case(keep_alive_timer, "keep-alive, long")
case(congestion, "congestion control")

if __name__ == "__main__":
    main(CASES)
