"""Eight attackers on connections of their own, in a process of their own, each sending again as soon as it is answered.

    python -m hostile.attackers HOST PORT MODEL     until killed; prints how many answers came, every second

Knows sockets and the three attacks: pictures that would unpack to hundreds of megabytes, bodies that arrive a byte at
a time, JSON nested by the hundred thousand. Ends with status 1 at the first answer that is no refusal.
"""

import asyncio
import base64
import json
import sys
from dataclasses import dataclass
from itertools import count

from hostile.bombs import bombs

REFUSALS = (400, 408, 413, 429, 503)


@dataclass
class Tally:
    answered: int = 0


def request(host: str, body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def bomb_requests(host: str, model: str) -> list[bytes]:
    made = []
    for data in bombs().values():
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}
        made.append(
            request(host, json.dumps({"model": model, "messages": [{"role": "user", "content": [part]}]}).encode())
        )
    return made


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer with a stated length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    length = next(int(line.partition(":")[2]) for line in head.splitlines() if line.startswith("content-length:"))
    return status, await reader.readexactly(length)


def check(status: int, body: bytes) -> None:
    if status not in REFUSALS or set(json.loads(body)["error"]) != {"message", "type", "param", "code"}:
        raise SystemExit(f"an attack got {status}: {body[:300]!r}")


async def hammer(host: str, port: int, requests: list[bytes], tally: Tally) -> None:
    """``requests`` in turn for ever, on one connection as long as it stays open."""
    turn = count()
    while True:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            while True:
                writer.write(requests[next(turn) % len(requests)])
                await writer.drain()
                check(*await read_answer(reader))
                tally.answered += 1
        except (OSError, asyncio.IncompleteReadError):
            # Closed after an answer, as a refusal may be.
            tally.answered += 1
        finally:
            writer.close()


async def drip(host: str, port: int, tally: Tally) -> None:
    """A body of 1,000 bytes at ten bytes a second, until it is cut off; then again."""
    while True:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(request(host, b" " * 1000)[:-1000])
            for _ in range(1000):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
            check(*await read_answer(reader))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
        tally.answered += 1


async def main(host: str, port: int, model: str) -> None:
    tally = Tally()
    pictures = bomb_requests(host, model)
    nested = [request(host, b'{"model": "x", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")]
    async with asyncio.TaskGroup() as group:
        for requests in (*[pictures] * 4, *[nested] * 2):
            group.create_task(hammer(host, port, requests, tally))
        for _ in range(2):
            group.create_task(drip(host, port, tally))
        while True:
            print(tally.answered, flush=True)
            await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
