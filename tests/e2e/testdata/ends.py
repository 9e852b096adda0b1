"""The ways in which a connection ends. Writes what the application sees."""
import hashlib
import socket
import struct
import sys

host = sys.argv[1]


def connect(port):
    s = socket.create_connection((host, port), 20)
    return s


def exactly(s, n):
    """Reads n bytes: a socket with a timeout does not know MSG_WAITALL."""
    got = b""
    while len(got) < n and (b := s.recv(n - len(got))):
        got += b
    return got


def reads(s):
    """Reads to the end, and says how many bytes and which end."""
    n = 0
    try:
        while b := s.recv(1 << 16):
            n += len(b)
        return f"{n} bytes, FIN"
    except ConnectionResetError:
        return f"{n} bytes, RST"


# 9001 answers with a hash once it has read to the end.
data = b"half-close " * 300000
s = connect(9001)
s.sendall(data)
s.shutdown(socket.SHUT_WR)
got = b"".join(iter(lambda: s.recv(1000), b""))
print("half-close:", got.decode() == hashlib.sha256(data).hexdigest())

# 9001 again: an end without a byte before it.
s = connect(9001)
s.shutdown(socket.SHUT_WR)
got = b"".join(iter(lambda: s.recv(1000), b""))
print("nothing but a FIN:", got.decode() == hashlib.sha256(b"").hexdigest())

# 9002 says bye and ends its side, then reads on.
s = connect(9002)
print("the server ends first:", reads(s))
s.sendall(data)
s.close()

# 9003 resets at once when it has read a byte.
s = connect(9003)
s.sendall(b"x")
print("reset by the server:", reads(s))

# 9004 sends 100000 bytes, reads one, and resets.
s = connect(9004)
got = exactly(s, 100000)
s.sendall(b"x")
print("reset by the server after bytes:", len(got), reads(s))

# 9005 tells its test what it sees: an end, a reset, a reset after half-close.
s = connect(9005)
s.sendall(b"fin")
s.close()
s = connect(9005)
s.sendall(b"rst")
assert s.recv(1) == b"k"
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
s.close()
# Unread bytes at close are a reset, too.
s = connect(9005)
s.sendall(b"unread")
assert s.recv(1) == b"k"
s.sendall(b"!")
assert len(exactly(s, 10)) == 10
s.close()
