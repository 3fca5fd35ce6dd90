"""Hostile requests by the hundred thousand against a true server, with a look at what it holds and says between them.

Knows counts and a canary. What is sent and what may be answered is in ``requests.py`` and ``answers.py``.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
from hostile.answers import exchange, problem_with
from hostile.chats import canary
from hostile.requests import HostileRequest, hostile_requests
from hostile.watch import Holdings, holdings

SENDERS = 8
LOOKS = 20
"""How often the canary is asked and the holdings are read on the way."""
ANSWER_S = 60.0
UNANSWERED_S = 0.05
GROWTH = 0.02
"""Of memory, over the last tenth of the requests."""
MAX_TOLD = 20


class Sender:
    """Sends what comes, from several threads; counts what was answered and keeps what was wrong."""

    def __init__(self, address: tuple[str, int], requests: Iterator[HostileRequest]) -> None:
        self._address = address
        self._requests = enumerate(requests)
        self._lock = threading.Lock()
        self.statuses: Counter[str] = Counter()
        self.problems: list[str] = []

    def send(self, count: int) -> None:
        """The next ``count`` of them, or fewer when there are no more."""
        with ThreadPoolExecutor(SENDERS) as threads:
            for done in [threads.submit(self._one) for _ in range(count)]:
                done.result()

    def _one(self) -> None:
        with self._lock:
            number, sent = next(self._requests)
        answer = exchange(self._address, sent.raw, timeout_s=ANSWER_S if sent.answered else UNANSWERED_S)
        expected = sent.answered or answer.status is not None
        problem = problem_with(answer) if expected else None
        with self._lock:
            self.statuses[str(answer.status or ("no answer" if expected else "not answered yet"))] += 1
            if problem is not None:
                self.problems.append(f"request {number} ({sent.kind}): {problem}\n    {sent.raw[:300]!r}")


async def run(url: str, pid: int, model: str, count: int, seed: int) -> list[str]:
    """Prints what was answered and held. Returns what went wrong, a sentence each.

    The server has to run with ``--deterministic``, or the canary may differ, and without ``--refusal-delay-s``, or it
    takes hours.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    requests = hostile_requests(seed, count, model=model, host=f"{parts.hostname}:{parts.port}")
    sender = Sender((parts.hostname, parts.port), requests)
    problems: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        expected = await canary(http, model)
        seen: list[Holdings] = []
        began = time.monotonic()
        for share in _shares(count, LOOKS):
            await asyncio.to_thread(sender.send, share)
            if await canary(http, model) != expected:
                problems.append(f"after {sum(sender.statuses.values())} requests the canary answered otherwise")
            seen.append(await _settled(pid, seen[-1] if seen else None))
        took = time.monotonic() - began
    print(
        f"  {count / took:.0f} a second: " + ", ".join(f"{n:,} x {name}" for name, n in sender.statuses.most_common())
    )
    print(f"  resident, MiB: {', '.join(f'{each.resident / 2**20:.0f}' for each in seen)}")
    print(f"  descriptors: {seen[0].descriptors} to {seen[-1].descriptors}, processes: {len(seen[-1].processes)}")
    if len({each.processes for each in seen}) > 1:
        problems.append(f"processes changed: from {seen[0].names} to {seen[-1].names}")
    if seen[-1].descriptors > seen[0].descriptors:
        problems.append(f"{seen[-1].descriptors - seen[0].descriptors} descriptors more than after the first requests")
    # The least of a tenth's looks and the one before them: some looks meet a large body or picture that the next
    # ones don't, and what leaks is there at all.
    looks = LOOKS // 10 + 1
    now, before = (min(each.resident for each in part) for part in (seen[-looks:], seen[-2 * looks : -looks] or seen))
    if len(seen) == LOOKS and now > before * (1 + GROWTH):
        problems.append(f"memory grew from {before} to {now} bytes over the last tenth")
    told = sender.problems[:MAX_TOLD]
    if len(sender.problems) > MAX_TOLD:
        told.append(f"{len(sender.problems) - MAX_TOLD} answers more were wrong")
    return problems + told


def _shares(count: int, parts: int) -> Iterator[int]:
    parts = min(parts, count)
    return (count // parts + (number < count % parts) for number in range(parts))


async def _settled(pid: int, before: Holdings | None, patience_s: float = 15.0) -> Holdings:
    """What the server holds once connections that were left half open are closed again."""
    deadline = time.monotonic() + patience_s
    held = holdings(pid)
    while before is not None and held.descriptors > before.descriptors and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        held = holdings(pid)
    return held
