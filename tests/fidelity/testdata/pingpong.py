"""Messages of odd sizes there and back, and how many took as long as an
acknowledgement that is put off (40 ms): Nagle's algorithm and that must not meet."""
from peers import *

SIZES = (1, 2, 3, 100, 1447, 1448, 1449, 2897, 4095, 65535, 65537)
ROUNDS = 10
LONG = 0.035


def serve(listener):
    """A child that answers each message in one piece, or in two."""
    pid = os.fork()
    if pid:
        return pid
    try:
        while True:
            s, _ = listener.accept()
            s.settimeout(LIMIT)
            while head := exactly(s, 5):
                n, split = struct.unpack("!IB", head)
                if not n:
                    break
                data = exactly(s, n)
                for part in parts(data, split):
                    s.sendall(part)
            s.close()
    except BaseException:
        os._exit(1)


def parts(data, split):
    return (data[:len(data) // 2], data[len(data) // 2:]) if split and len(data) > 1 else (data,)


def slow(c, size, there, back):
    """How many of ROUNDS took long. there and back tell whether they go in two."""
    data = content(size)
    n = 0
    for _ in range(ROUNDS):
        began = time.monotonic()
        message = struct.pack("!IB", size, back) + data
        for part in parts(message, there):
            c.sendall(part)
        if exactly(c, size) != data:
            raise ValueError("other bytes came back")
        n += time.monotonic() - began > LONG
    return n


def ping_pong(*options):
    def run(net):
        child = serve(net.listener)
        try:
            saw = {}
            for size in SIZES:
                for there in (0, 1):
                    for back in (0, 1):
                        c = net.client(*options)
                        net.connect(c)
                        n = slow(c, size, there, back)
                        if 0 < n < ROUNDS * 3 // 4:
                            n = min(n, slow(c, size, there, back))  # the machine is busy
                        saw[f"{size} {there}{back}"] = n
                        c.close()
            return saw
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    return run


if __name__ == "__main__":
    main({"ping-pong": ping_pong(),
          "ping-pong, no delay": ping_pong((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))})
