"""Blocking sockets of all kinds against an echo server on port 7.

Writes one line for each: what it is, whom getpeername names, its own address.
"""
import select
import socket
import sys
import threading

CASES = [
    ("v4", socket.AF_INET, ("198.51.100.7", 7)),
    ("v6", socket.AF_INET6, ("2001:db8:7::7", 7)),
    ("mapped", socket.AF_INET6, ("::ffff:198.51.100.7", 7)),
]


def trip(s, size):
    """Sends size bytes, ends its side, and returns whether they came back."""
    data = bytes(i * 31 % 251 for i in range(1009)) * (size // 1009 + 1)
    sender = threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)))
    sender.start()
    got = bytearray()
    while piece := s.recv(1 << 16):
        got += piece
    sender.join()
    return bytes(got) == data


def hears(s, text):
    """Whether this comes: a socket with a timeout does not know MSG_WAITALL."""
    got = b""
    while len(got) < len(text) and (b := s.recv(len(text) - len(got))):
        got += b
    return got == text


def tell(name, s, size=500_000):
    peer, own = s.getpeername(), s.getsockname()
    same = trip(s, size)
    print(name, peer[0], peer[1], own[0], "same" if same else "DIFFERS")
    s.close()


for name, family, to in CASES:
    s = socket.socket(family)
    s.settimeout(20)
    s.connect(to)
    # Nothing has moved yet: the answers are those of the moment after connect.
    tell(name, s)

for name, family, to in CASES:
    s = socket.socket(family)
    s.setblocking(False)
    code = s.connect_ex(to)

    select.select([], [s], [], 20)
    error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        sys.exit(f"{name}: {error} after {code}")
    s.settimeout(20)
    tell("nonblocking-" + name, s)

# Bound to an address and a port of its own.
s = socket.socket()
s.bind(("192.0.2.1", 40404))
s.settimeout(20)
s.connect(("198.51.100.7", 7))
assert s.getsockname() == ("192.0.2.1", 40404), s.getsockname()
tell("bound", s)

# Multipath TCP.
for name, family, to in CASES:
    s = socket.socket(family, socket.SOCK_STREAM, 262)
    s.settimeout(20)
    s.connect(to)
    tell("mptcp-" + name, s)

# TCP Fast Open: the first bytes go with connect. A peer without it is spoken
# to without it, and the second time the kernel may know a cookie.
for turn in 1, 2:
    for name, family, to in CASES:
        s = socket.socket(family)
        assert s.sendto(b"early ", 0x20000000, to) == 6  # MSG_FASTOPEN
        s.settimeout(20)
        assert hears(s, b"early ")
        tell(f"fastopen{turn}-{name}", s, 5000)
s = socket.socket()
s.settimeout(20)
s.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
s.connect(("198.51.100.7", 7))
s.sendall(b"early ")
assert hears(s, b"early ")
tell("fastopen-connect", s, 5000)
