"""UDP in all ways against a server on port 7000 that tells whom it sees."""
import socket

CASES = [
    (socket.AF_INET, ("198.51.100.7", 7000)),
    (socket.AF_INET6, ("2001:db8:7::7", 7000)),
    (socket.AF_INET6, ("::ffff:198.51.100.7", 7000)),
]
for family, to in CASES:
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(20)
    s.connect(to)
    assert s.getpeername()[:2] == to, s.getpeername()
    s.send(b"connected")
    answer = s.recv(100).decode()
    print(answer.rsplit(" ", 1)[0], int(answer.rsplit(" ", 1)[1]) == s.getsockname()[1])
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(20)
    s.sendto(b"unconnected", to)
    answer, peer = s.recvfrom(100)
    assert peer[:2] == to, peer
    answer = answer.decode()
    print(answer.rsplit(" ", 1)[0], int(answer.rsplit(" ", 1)[1]) == s.getsockname()[1])
