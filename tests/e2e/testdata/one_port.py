"""One port of the application's own, connected to many servers at once.

Every server on port 8000 says its own address.
"""
import ipaddress
import socket

N = 20
for family, own, first in (
    (socket.AF_INET, "192.0.2.1", ipaddress.ip_address("198.51.100.100")),
    (socket.AF_INET6, "2001:db8:1::1", ipaddress.ip_address("2001:db8:7::100")),
):
    conns = []
    for i in range(N):
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((own, 31000))
        s.settimeout(20)
        s.connect((str(first + i), 8000))
        conns.append(s)
    right = 0
    for i, s in enumerate(conns):
        said = b"".join(iter(lambda: s.recv(100), b"")).decode()
        peer, local = s.getpeername()[:2], s.getsockname()[:2]
        host, port = said.strip("[").rsplit(":", 1)
        right += (host.strip("]"), int(port)) == peer == (str(first + i), 8000) and local == (own, 31000)
        s.close()
    print(right, "of", N)
