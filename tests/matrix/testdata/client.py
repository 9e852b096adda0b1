"""Connections as Python makes them: [METHOD HOST PORT]..., sync or asyncio.

A host with commas is a name with these addresses. Random bytes are echoed over
each connection; what it saw is a line of JSON.
"""
import asyncio
import json
import os
import socket
import sys
import threading

SIZE = 150001
look_up = socket.getaddrinfo


def answer(host, port, *args, **kwargs):
    return [a for h in host.split(",") for a in look_up(h, port, type=socket.SOCK_STREAM)]


socket.getaddrinfo = answer


def tell(host, peer, own, data, got):
    print(json.dumps({
        "to": host, "peer": peer[0], "peer_port": peer[1], "own": own[0], "own_port": own[1],
        "sent": len(data), "got": len(got), "same": got == data,
    }), flush=True)


def sync(host, port):
    with socket.create_connection((host, port), timeout=20) as s:
        peer, own, data, got = s.getpeername(), s.getsockname(), os.urandom(SIZE), b""
        sender = threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)))
        sender.start()
        while piece := s.recv(1 << 16):
            got += piece
        sender.join()
    tell(host, peer, own, data, got)


async def evented(host, port):
    reader, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=2)
    peer, own = (writer.get_extra_info(name) for name in ("peername", "sockname"))
    data = os.urandom(SIZE)
    back = asyncio.create_task(reader.read(-1))
    writer.write(data)
    await writer.drain()
    writer.write_eof()
    got = await back
    writer.close()
    await writer.wait_closed()
    tell(host, peer, own, data, got)


jobs = iter(sys.argv[1:])
for method, host, port in zip(jobs, jobs, jobs):
    if method == "sync":
        sync(host, int(port))
    else:
        asyncio.run(evented(host, int(port)))
