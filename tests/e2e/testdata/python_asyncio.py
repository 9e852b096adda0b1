"""A hundred connections at once with asyncio, to an echo server on port 7."""
import asyncio
import hashlib
import random

N = 100
HOSTS = ["198.51.100.7", "2001:db8:7::7"]


async def one(i, everybody):
    host = HOSTS[i % len(HOSTS)]
    reader, writer = await asyncio.open_connection(host, 7)
    assert writer.get_extra_info("peername")[:2] == (host, 7), writer.get_extra_info("peername")
    await everybody.wait()  # all of them are open
    data = random.Random(i).randbytes(1000 + i * 4999)
    answer = asyncio.create_task(reader.read(-1))
    writer.write(data)
    await writer.drain()
    writer.write_eof()
    same = hashlib.sha256(await answer).digest() == hashlib.sha256(data).digest()
    writer.close()
    await writer.wait_closed()
    return same


async def main():
    everybody = asyncio.Barrier(N)
    results = await asyncio.wait_for(asyncio.gather(*(one(i, everybody) for i in range(N))), 60)
    print(sum(results), "of", N, "are the same")


asyncio.run(main())
