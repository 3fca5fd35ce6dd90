"""Do honest clients notice eight attackers? Times `/health` and chats alone, then under attack, and what a bomb costs.

Knows honest clients and clocks; the attacks are those of ``attackers.py``, in a process of their own, so that what is
timed here is the server and not the attackers' work.
"""

import asyncio
import base64
import statistics
import sys
import time
from dataclasses import dataclass

import httpx
from hostile.bombs import bombs
from hostile.chats import chat_body, first_token_s
from hostile.watch import holdings

HEALTH_EVERY_S = 0.02
JUDGED_S = 30
"""Shorter runs are too few chats for a 99th percentile: they are only looked at."""
HEALTH_P99_S = 0.25
FIRST_TOKEN_RATIO = 2.0
BOMB_S = 0.05
BOMB_BYTES = 5 * 2**20


@dataclass(frozen=True)
class Victims:
    """Seconds."""

    health: list[float]
    first_tokens: list[float]

    def line(self) -> str:
        return (
            f"/health p99 {_p99(self.health) * 1e3:.1f} ms of {len(self.health)}; first token p50 "
            f"{statistics.median(self.first_tokens) * 1e3:.1f}, p99 {_p99(self.first_tokens) * 1e3:.1f} ms of "
            f"{len(self.first_tokens)}"
        )


@dataclass(frozen=True)
class BombCost:
    name: str
    median_s: float
    worst_s: float
    grown: int
    """Bytes that the server's processes held more than before, at the most."""


async def honest(url: str, model: str, seconds: float, seed: int) -> Victims:
    """Two chats in turn and a poll of `/health`. Raises AssertionError when one isn't answered well."""
    until = time.monotonic() + seconds
    health: list[float] = []
    first: list[float] = []

    async def poll(http: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            began = time.perf_counter()
            answer = await http.get("/health")
            assert answer.status_code == 200, f"/health said {answer.status_code}"
            health.append(time.perf_counter() - began)
            await asyncio.sleep(HEALTH_EVERY_S)

    async def talk(http: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            first.append(await first_token_s(http, model, seed + number * 100_000 + turn))

    async with httpx.AsyncClient(base_url=url, timeout=30) as http, asyncio.TaskGroup() as group:
        group.create_task(poll(http))
        for number in range(2):
            group.create_task(talk(http, number))
    return Victims(health, first)


async def under_attack(url: str, model: str, seconds: float, seed: int) -> tuple[Victims, int]:
    """The same beside the attackers; with how many answers these got."""
    parts = httpx.URL(url)
    attackers = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hostile.attackers", parts.host, str(parts.port), model),
        stdout=asyncio.subprocess.PIPE,
    )
    assert attackers.stdout is not None
    try:
        # Their bombs are made by the time they first say how far they are.
        await attackers.stdout.readline()
        victims = await honest(url, model, seconds, seed)
        assert attackers.returncode is None, f"the attackers ended with status {attackers.returncode}"
    finally:
        attackers.kill()
        told = (await attackers.stdout.read()).split()
        await attackers.wait()
    return victims, int(told[-1])


async def bomb_costs(url: str, pid: int, model: str, times: int = 20) -> list[BombCost]:
    """Each bomb alone, ``times`` in turn."""
    costs = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        for name, data in bombs().items():
            body = chat_body(model, "What is this?", "data:image/png;base64," + base64.b64encode(data).decode())
            took, before, most = [], None, 0
            for _ in range(times + 1):
                began = time.perf_counter()
                answer = await http.post("/v1/chat/completions", json=body)
                took.append(time.perf_counter() - began)
                assert answer.status_code == 400, f"{name} got {answer.status_code}: {answer.text[:300]}"
                # Slower than an address may collect refusals before it has to wait for them.
                await asyncio.sleep(0.08)
                held = holdings(pid).resident
                before = held if before is None else before
                most = max(most, held - before)
            # The first one may have been the first picture ever.
            costs.append(BombCost(name, statistics.median(took[1:]), max(took[1:]), most))
    return costs


async def run(url: str, pid: int, model: str, seconds: float, seed: int) -> list[str]:
    """Prints what was measured. Returns what went wrong, a sentence each."""
    await honest(url, model, min(seconds, 3.0), seed)
    costs = await bomb_costs(url, pid, model)
    for cost in costs:
        print(
            f"  {cost.name}: refused in {cost.median_s * 1e3:.1f} ms (at worst {cost.worst_s * 1e3:.1f}), "
            f"{cost.grown / 2**20:.1f} MiB more"
        )
    before = await honest(url, model, seconds / 2, seed + 10_000_000)
    print(f"  quiet: {before.line()}")
    during, answered = await under_attack(url, model, seconds, seed + 20_000_000)
    print(f"  beside eight attackers, {answered} times answered: {during.line()}")
    problems = [
        f"{cost.name} took {cost.median_s * 1e3:.0f} ms and {cost.grown / 2**20:.1f} MiB"
        for cost in costs
        if cost.median_s > BOMB_S or cost.grown > BOMB_BYTES
    ]
    if seconds < JUDGED_S:
        return problems
    if _p99(during.health) > HEALTH_P99_S:
        problems.append(f"/health took {_p99(during.health) * 1e3:.0f} ms at p99 under attack")
    if _p99(during.first_tokens) > FIRST_TOKEN_RATIO * _p99(before.first_tokens):
        problems.append("first tokens took more than twice as long at p99 under attack")
    return problems


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98]
