"""Both ends of connections, and what each of them sees.

A case is a function that drives a connection's two ends and returns what it saw,
with nothing in it that depends on time or on where the other end is. It is run
with Pillion in between and without, and what it returns has to be the same.

The process is the application: it runs in its namespace, and descriptor 3 is
the world's, where the other ends are made.
"""
import array
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback

LIMIT = 20  # seconds that anything may take that is bound to happen
HOSTS = {4: "198.51.100.7", 6: "2001:db8:7::7"}
OWN = {4: "192.0.2.1", 6: "2001:db8:1::1"}
SECOND = {4: "192.0.2.9", 6: "2001:db8:1::9"}

libc = ctypes.CDLL(None, use_errno=True)
HOME = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
WORLD = 3
# Of servers: what is filtered or looked up by a port is one case's, of one family.
PORTS = itertools.count(10000)

SIOCINQ, SIOCOUTQ, SIOCATMARK = termios.FIONREAD, termios.TIOCOUTQ, 0x8905
SO_MARK, SO_PRIORITY, SO_ZEROCOPY = 36, 12, 60
MSG_ZEROCOPY = 0x4000000
TCP_USER_TIMEOUT, TCP_CONGESTION = 18, 13
EVENTS = {"IN": select.POLLIN, "PRI": select.POLLPRI, "OUT": select.POLLOUT,
          "ERR": select.POLLERR, "HUP": select.POLLHUP, "RDHUP": select.POLLRDHUP}
IN, PRI, OUT, ERR, HUP, RDHUP = EVENTS.values()


def enter(ns):
    if libc.setns(ns, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


def in_world(f, *args):
    """Calls f in the world's namespace, where what it opens stays."""
    enter(WORLD)
    try:
        return f(*args)
    finally:
        enter(HOME)


def command(*args, world=False):
    """Runs a command in the application's namespace or the world's."""
    run = lambda: subprocess.run(args, check=True, capture_output=True, text=True)
    try:
        return (in_world(run) if world else run()).stdout
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"{args}: {e.stderr}") from e


def listen(family, port=None):
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    s = in_world(socket.socket, kind, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((HOSTS[family], next(PORTS) if port is None else port))
    s.listen(128)
    s.settimeout(LIMIT)
    return s


class Net:
    """What a case makes its connections with."""

    def __init__(self, family, redirected):
        self.family = family
        self.redirected = redirected  # for what to look at, never for what to want
        self.kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self.made = 0
        self.listener = listen(family)
        self.port = self.listener.getsockname()[1]
        self.open = []

    def client(self, *options):
        """A socket of the application's with options, not yet connected."""
        c = socket.socket(self.kind, socket.SOCK_STREAM)
        for o in options:
            c.setsockopt(*o)
        self.open.append(c)
        return c

    def address(self, listener=None):
        return (HOSTS[self.family], (listener or self.listener).getsockname()[1])

    def connect(self, c, listener=None):
        c.settimeout(LIMIT)
        c.connect(self.address(listener))
        self.made += 1

    def accept(self, listener=None):
        s, _ = (listener or self.listener).accept()
        s.settimeout(LIMIT)
        self.open.append(s)
        return s

    def pair(self, *options, listener=None):
        """A connection: the application's end, and the server's."""
        c = self.client(*options)
        self.connect(c, listener)
        return c, self.accept(listener)

    def close(self):
        for s in self.open:
            s.close()
        self.open = []


def name(number):
    return errno.errorcode.get(number, str(number))


def attempt(f, *args):
    """What a call returns, or the name of its error."""
    try:
        return f(*args)
    except OSError as e:
        return "EAGAIN" if isinstance(e, TimeoutError) and not e.errno else name(e.errno)


def now(s, f, *args):
    """What a call returns that is not to wait."""
    s.setblocking(False)
    got = attempt(f, *args)
    s.settimeout(LIMIT)
    return got


def error(s):
    """The pending error of a socket."""
    return name(n) if (n := s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) else "none"


def number(s, request):
    """The answer of an ioctl."""
    buf = array.array("i", [0])
    fcntl.ioctl(s.fileno(), request, buf)
    return buf[0]


def events(s, want, limit=LIMIT):
    """Waits until all that is wanted has happened, and returns all there is."""
    p = select.epoll()
    # Level-triggered, so that what came early counts.
    p.register(s.fileno(), IN | PRI | RDHUP)
    try:
        p.modify(s.fileno(), want | PRI | RDHUP)
        return _events(p, s, want, limit)
    finally:
        p.close()


def _events(p, s, want, limit):
    got = 0
    for _ in range(int(limit * 100)):
        got = sum(e for _, e in p.poll(limit))
        if got & want == want or not got:
            break
        select.select([], [], [], 0.01)  # another event is there for good
    if got & HUP and not got & RDHUP:
        # tcp_done closes first and then shuts, and poll takes no lock: this may
        # have looked between the two, with Pillion or without.
        select.select([], [], [], 0.01)
        got = sum(e for _, e in p.poll(limit))
    return "+".join(k for k, v in EVENTS.items() if got & v) or "nothing"


def gone(s):
    """Waits until the connection is no more."""
    return events(s, HUP | ERR)


def has(s, n):
    """Waits until n bytes can be read."""
    await_true(lambda: number(s, SIOCINQ) >= n)
    return number(s, SIOCINQ)


def await_true(f):
    for _ in range(LIMIT * 500):
        if f():
            return True
        select.select([], [], [], 0.002)
    return False


def acked(s):
    """Waits until nothing that was sent is unacknowledged."""
    return await_true(lambda: number(s, SIOCOUTQ) == 0)


def drain(s):
    """Reads to the end: how many bytes, which, and what end."""
    h, n = hashlib.sha256(), 0
    try:
        while b := s.recv(1 << 16):
            h.update(b)
            n += len(b)
        end = "FIN"
    except OSError as e:
        end = name(e.errno) if e.errno else "silence"
    return f"{n} bytes, {h.hexdigest()[:8]}, {end}"


def exactly(s, n):
    got = bytearray()
    while len(got) < n and (b := s.recv(n - len(got))):
        got += b
    return bytes(got)


def content(n, salt=b"x"):
    return hashlib.shake_128(salt).digest(n)


def digest(b):
    return f"{len(b)} bytes, {hashlib.sha256(b).hexdigest()[:8]}"


def reset(s):
    """Closes with a reset."""
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


def end(s, how):
    """Ends a connection in one of the ways there are."""
    {"shut": lambda: s.shutdown(socket.SHUT_WR), "close": s.close, "reset": lambda: reset(s)}[how]()


class Later(threading.Thread):
    """Calls a function beside; result() waits for it."""

    def __init__(self, f, *args):
        super().__init__(daemon=True)
        self.f, self.args, self.value = f, args, None
        self.start()

    def run(self):
        self.value = attempt(self.f, *self.args)

    def result(self):
        self.join(LIMIT)
        return "no end" if self.is_alive() else self.value


def fill(s, most=1 << 30):
    """Writes until there is no room for a good while; returns how much it took."""
    s.setblocking(False)
    n, b = 0, bytes(64 << 10)
    p = select.poll()
    p.register(s.fileno(), OUT)
    while n < most and p.poll(400):
        try:
            n += s.send(b)
        except BlockingIOError:
            pass
        except OSError:
            break
    s.settimeout(LIMIT)
    return n


def run_case(which, f, family, redirected):
    began = time.monotonic()
    net = Net(family, redirected)
    saw = trouble = None
    try:
        saw = f(net)
    except Exception:
        trouble = traceback.format_exc()
    net.close()
    net.listener.close()
    return json.dumps({"case": which, "family": family, "saw": saw, "trouble": trouble,
                       "connections": net.made, "seconds": round(time.monotonic() - began, 1)}, default=str)


def main(cases, together=False):
    """Runs cases: redirected or direct, then the names, or all of them. together is
    for those that mostly wait."""
    redirected = sys.argv[1] == "redirected"
    todo = [(which, cases[which], family, redirected) for which in sys.argv[2:] or cases for family in (4, 6)]
    if not together:
        for one in todo:
            print(run_case(*one), flush=True)
        return
    results = [None] * len(todo)

    def run(n):
        results[n] = run_case(*todo[n])
    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(todo))]
    [t.start() for t in threads]
    for n, t in enumerate(threads):
        t.join()
        print(results[n], flush=True)
