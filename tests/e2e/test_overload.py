"""Ten times what the demo model can do: refusals stay quick, answers as many as at the peak, other keys get their turn.

Prints its figures (`pytest -s -m slow`). Minutes long, and nothing else may run beside it.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from sightline_server.auth.keys_file import create_key
from sightline_server.auth.principal import Limits, Scope

StartServer = Callable[..., Any]
CHAT = "/v1/chat/completions"
SECONDS = 45.0
"""Answers of a full house come in waves of 32 some seconds apart, and one wave more or less has to count for little."""
RAMP_S = 5.0
"""Until the first answers of a full house have ended; not counted."""
BODY = {
    "model": "sightline-demo",
    "messages": [{"role": "user", "content": "Describe the picture, please, as long as you can."}],
    "max_tokens": 256,
    "ignore_eos": True,
}

SHORT = BODY | {"max_tokens": 64}


class PlainClient:
    """Sends one body again and again over connections that are kept: the client shares the server's cores, and a
    whole HTTP library would take a good part of them."""

    def __init__(self, url: str, body: dict[str, Any] = BODY, key: str = "none") -> None:
        self._address = urlsplit(url)
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {self._address.netloc}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\n"
        self._request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self) -> int:
        """The answer's status."""
        connection = self._idle.pop() if self._idle else None
        reader, writer = connection or await asyncio.open_connection(self._address.hostname, self._address.port)
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
        self._idle.append((reader, writer))
        return int(head[9:12])

    async def aclose(self) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


async def offer(client: PlainClient, per_s: float) -> tuple[float, list[float]]:
    """Sends so many requests a second whatever comes back. Answers a second, and seconds to each refusal."""
    answered: list[float] = []
    refused: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        status = await client.ask()
        now = time.perf_counter()
        if status == 200:
            answered.append(now)
        else:
            assert status == 503
            refused.append(now - began)

    began = due = time.perf_counter()
    tasks = []
    while due < began + SECONDS:
        tasks.append(asyncio.create_task(one()))
        due += 1 / per_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    end = time.perf_counter()
    await asyncio.gather(*tasks)
    return sum(began + RAMP_S < moment <= end for moment in answered) / (end - began - RAMP_S), refused


async def peak_per_s(client: PlainClient, at_once: int) -> float:
    """Answers a second when so many are always under way."""
    count, began = 0, time.perf_counter()
    until = began + SECONDS

    async def keep_asking() -> None:
        nonlocal count
        while time.perf_counter() < until:
            if await client.ask() == 200:
                count += began + RAMP_S < time.perf_counter() <= until
            else:
                # The first of all come at once, before the engine has said that it took any.
                await asyncio.sleep(0.05)

    await asyncio.gather(*(keep_asking() for _ in range(at_once)))
    return count / (SECONDS - RAMP_S)


@pytest.mark.slow
async def test_O1_at_ten_times_capacity(start_server: StartServer) -> None:
    # One core for the engine. On a machine of two, a step on both waits for whichever the API process and this client
    # are on: its peak is higher, and what is left of it in a flood is no more than one core gives (docs/log.md).
    server = start_server("--max-running", "32", "--max-queue", "32", "--threads", "1")
    server.wait_for("/ready", 200)
    async with aclosing(PlainClient(server.url)) as client:
        peak = max([await peak_per_s(client, at_once) for at_once in (32, 48)])
        good, refused = await offer(client, 10 * peak)
    slowest = p99(refused)
    print(
        f"\npeak {peak:.1f} answers/s; at ten times that {good:.1f} ({good / peak:.0%}), {len(refused)} refusals: "
        f"median {statistics.median(refused) * 1000:.1f} ms, p99 {slowest * 1000:.1f} ms"
    )
    assert good >= 0.9 * peak
    assert slowest < 0.020


@pytest.mark.slow
async def test_O14_a_flood_leaves_another_key_its_turn(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    flooding_key, other_key = (create_key(file, name, (Scope.CHAT,), Limits())[1] for name in ("flood", "other"))
    headers = {"Authorization": f"Bearer {other_key}"}
    server = start_server("--max-running", "16", "--max-queue", "256", "--keys-file", str(file))
    server.wait_for("/ready", 200)
    flooder = PlainClient(server.url, SHORT, flooding_key)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client, aclosing(flooder):

        async def first_token_s() -> float:
            began = time.perf_counter()
            async with client.stream("POST", CHAT, json=SHORT | {"stream": True}, headers=headers) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        break
            return time.perf_counter() - began

        async def waits(flooding: int) -> list[float]:
            """Seconds to another's first tokens beside so many of the flooding key's at one time."""
            stop = asyncio.Event()

            async def flood() -> None:
                while not stop.is_set():
                    if await flooder.ask() != 200:
                        await asyncio.sleep(0.2)

            tasks = [asyncio.create_task(flood()) for _ in range(flooding)]
            # Until not all that were sent at once end at once.
            await asyncio.sleep(RAMP_S)
            seen = [await first_token_s() for _ in range(50)]
            stop.set()
            await asyncio.gather(*tasks)
            return seen

        full, flooded = await waits(16), await waits(160)
    print(f"\nfirst token, p99: beside a full house {p99(full) * 1000:.0f} ms, flooded {p99(flooded) * 1000:.0f} ms")
    print(f"median: {statistics.median(full) * 1000:.0f} and {statistics.median(flooded) * 1000:.0f} ms")
    assert p99(flooded) <= 2 * p99(full)
