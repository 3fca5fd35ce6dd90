"""More than the server can take: who is refused, how soon, before what work, and what is left for others."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_calls import CHAT, chat_body, events, eventually, http
from fakes import FakeEngine, FakePool, fake_app, fake_image
from fastapi import FastAPI

from sightline_server.auth.keys_file import create_key
from sightline_server.auth.principal import Limits, Scope
from sightline_server.engine.client import PixelSource
from sightline_server.engine.types import EngineStats, FinishEvent, Request, TokenEvent


class NarrowEngine(FakeEngine):
    """Computes ``slots`` requests at a time; the others wait in the order they came in, and its figures say so."""

    def __init__(self, slots: int, say: str = "01234567", step_s: float = 0.0) -> None:
        super().__init__(say)
        self.step_s = step_s
        self.slots = asyncio.Semaphore(slots)
        self.waiting = self.running = 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(waiting=self.waiting, running=self.running, blocks_total=8)

    async def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            async for event in super().submit(request, pixels):
                yield event
        finally:
            self.running -= 1
            self.slots.release()


def keys(folder: Path, *names: str) -> tuple[str, dict[str, dict[str, str]]]:
    """A keys file, and each name's header."""
    file = folder / "keys"
    made = {name: create_key(file, name, (Scope.CHAT,), Limits())[1] for name in names}
    return str(file), {name: {"Authorization": f"Bearer {secret}"} for name, secret in made.items()}


def ask(client: httpx.AsyncClient, headers: Any = None, **fields: Any) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(client.post(CHAT, json=chat_body(**fields), headers=headers))


async def refused_after_s(app: FastAPI) -> float:
    """Seconds until the app, called as a server calls it, begins to refuse a request."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"1000000")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers, "client": None}
    told: list[float] = []

    async def receive() -> Any:
        raise AssertionError("the body is asked for")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 503
            told.append(time.perf_counter())

    began = time.perf_counter()
    await app(scope, receive, send)
    return told[0] - began


async def test_O1_refusals_are_quick_and_cost_the_others_nothing() -> None:
    slots, step_s, seconds = 4, 0.01, 1.5
    engine, pool = NarrowEngine(slots, step_s=step_s), FakePool()
    app = fake_app(engine, pool=pool, max_queue=slots)
    picture = [{"role": "user", "content": [fake_image()]}]

    async def served(client: httpx.AsyncClient, flood_per_s: float) -> tuple[int, list[float]]:
        """Answers in so many seconds of constant asking, beside so many refusals."""
        until, count, waits = time.perf_counter() + seconds, 0, []

        async def keep_asking() -> None:
            nonlocal count
            while time.perf_counter() < until:
                answer = await client.post(CHAT, json=chat_body(messages=picture))
                if answer.status_code == 200:
                    count += 1
                else:
                    await asyncio.sleep(step_s)

        async def flood() -> None:
            due = time.perf_counter()
            while flood_per_s and due < until:
                if engine.waiting >= slots:
                    waits.append(await refused_after_s(app))
                    due += 1 / flood_per_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

        await asyncio.gather(flood(), *(keep_asking() for _ in range(2 * slots)))
        return count, waits

    async with http(app) as client:
        for look in range(3):
            peak, _ = await served(client, 0)
            decoded = pool.decoded_total
            good, waits = await served(client, 10 * peak / seconds)
            slowest = statistics.quantiles(waits, n=100)[-1]
            # A machine that others use now and then stops everything for longer than that.
            if slowest < 0.020 and good >= 0.9 * peak:
                break
            print(f"look {look}: {good} of {peak} answers, refusals p99 {slowest * 1000:.1f} ms")
    assert slowest < 0.020, f"{slowest * 1000:.1f} ms"
    assert good >= 0.9 * peak, f"{good} answers beside the flood, {peak} without"
    assert len(waits) > 8 * peak
    assert pool.decoded_total - decoded <= good + 2 * slots, "what is refused is not decoded"


async def test_O2_a_burst_of_a_thousand_is_answered_to_the_last() -> None:
    engine = NarrowEngine(8)
    async with http(fake_app(engine, max_queue=64)) as client:
        answers = await asyncio.gather(*(ask(client, stream=index % 2 == 0) for index in range(1000)))
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() <= {200, 503}
    assert counts[200] >= 64
    assert counts[503] > 0
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "server_is_overloaded"
            assert int(answer.headers["retry-after"]) > 0
    assert not engine.live
    assert (engine.waiting, engine.running) == (0, 0)
    served = [request.id for request in engine.requests]
    assert len(served) == counts[200]


async def test_O2_one_key_never_takes_the_last_places(tmp_path: Path) -> None:
    file, headers = keys(tmp_path, "flood", "other", "third")
    engine = NarrowEngine(1)
    engine.pause_after = 0
    async with http(fake_app(engine, keys_file=file, max_queue=16)) as client:
        running = ask(client, headers["other"])
        await eventually(lambda: engine.running == 1)
        flood = [ask(client, headers["flood"]) for _ in range(50)]
        await eventually(lambda: sum(task.done() for task in flood) == 42)
        await eventually(lambda: engine.waiting == 8)
        refused = [task.result() for task in flood if task.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
        assert all(answer.headers["retry-after"] for answer in refused)
        others = [ask(client, headers["other"]) for _ in range(3)] + [ask(client, headers["third"]) for _ in range(2)]
        await eventually(lambda: engine.waiting == 13)
        engine.go_on.set()
        answers = await asyncio.gather(running, *others, *flood)
    assert Counter(answer.status_code for answer in answers) == {200: 1 + 5 + 8, 429: 42}


async def test_a_lone_key_has_the_whole_queue(tmp_path: Path) -> None:
    file, headers = keys(tmp_path, "only")
    engine = NarrowEngine(1)
    engine.pause_after = 0
    async with http(fake_app(engine, keys_file=file, max_queue=16)) as client:
        flood = [ask(client, headers["only"]) for _ in range(30)]
        await eventually(lambda: sum(task.done() for task in flood) >= 13)
        engine.go_on.set()
        answers = await asyncio.gather(*flood)
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() == {200, 503}
    assert counts[200] >= 16


async def test_the_engine_is_told_whose_request_it_is(tmp_path: Path) -> None:
    file, headers = keys(tmp_path, "ann", "bob")
    engine = FakeEngine()
    async with http(fake_app(engine, keys_file=file)) as client:
        for name in ("ann", "bob", "ann"):
            await ask(client, headers[name])
    first, second, third = (request.tenant for request in engine.requests)
    assert first == third != second
    assert first.startswith("key_")


@pytest.mark.parametrize("stream", [False, True])
async def test_O13_a_long_wait_ends_with_a_503(stream: bool) -> None:
    engine = NarrowEngine(1)
    engine.pause_after = 1
    app = fake_app(engine, queue_timeout_s=0.1)
    async with http(app) as client:
        running = ask(client)
        await eventually(lambda: engine.running == 1)
        began = time.monotonic()
        late = await ask(client, stream=stream)
        waited = time.monotonic() - began
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        assert late.json()["error"]["type"] == "service_unavailable_error"
        assert int(late.headers["retry-after"]) > 0
        assert 0.1 <= waited < 2
        await eventually(lambda: engine.waiting == 0)
        assert not running.done(), "who has a token is not in the queue"
        engine.go_on.set()
        assert (await running).status_code == 200


async def test_O13_a_stream_that_has_begun_is_told_in_its_stream() -> None:
    engine = NarrowEngine(1)
    engine.pause_after = 1
    async with http(fake_app(engine, queue_timeout_s=0.3, sse_keep_alive_s=0.05)) as client:
        running = ask(client)
        await eventually(lambda: engine.running == 1)
        late = await ask(client, stream=True)
        assert late.status_code == 200
        assert late.text.count(": keep-alive\n") >= 2
        assert events(late.text)[-1]["error"]["code"] == "queue_timeout"
        assert "[DONE]" not in late.text
        engine.go_on.set()
        assert (await running).status_code == 200


async def test_O13_nobody_is_sent_away_when_nobody_queues() -> None:
    engine = NarrowEngine(1)
    engine.pause_after = 0
    async with http(fake_app(engine, queue_timeout_s=0.05)) as client:
        slow = ask(client)
        await asyncio.sleep(0.3)
        assert not slow.done()
        engine.go_on.set()
        assert (await slow).status_code == 200


async def test_O5_leaving_the_queue_frees_the_place() -> None:
    engine = NarrowEngine(1)
    engine.pause_after = 0
    app = fake_app(engine, max_queue=2)
    async with http(app) as client:
        running = ask(client)
        await eventually(lambda: engine.running == 1)
        waiting = [ask(client), ask(client, stream=True)]
        await eventually(lambda: engine.waiting == 2)
        assert (await ask(client)).status_code == 503
        for task in waiting:
            task.cancel()
        await eventually(lambda: engine.waiting == 0, seconds=1.0)
        again = ask(client)
        await eventually(lambda: engine.waiting == 1)
        engine.go_on.set()
        assert [(await task).status_code for task in (running, again)] == [200, 200]
    admission = app.state.context.admission
    assert (admission._preparing, admission._without_token.total()) == (0, 0)
