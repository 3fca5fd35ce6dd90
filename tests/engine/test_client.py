"""The engine's client and its process: true processes and sockets, with engines that do as they are told."""

import asyncio
import os
import signal
import time
from contextlib import aclosing
from typing import Any

import numpy as np
import psutil
import pytest
import worker_engines
from supervised import (
    START_S,
    Events,
    MakeEngine,
    collect,
    ends_of,
    eventually,
    no_pixels,
    request,
    started,
    tokens_of,
)

from sightline_models.images import ImageError
from sightline_server.engine.client import EngineStartError
from sightline_server.engine.types import FinishEvent, FinishReason
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings, replace


async def test_a_request_gets_its_tokens_and_then_its_end(make_engine: MakeEngine) -> None:
    stages: list[tuple[str, float]] = []
    engine = make_engine("counting", on_progress=lambda stage, fraction: stages.append((stage, fraction)))
    assert not engine.ready
    assert engine.info is None
    await started(engine)
    assert engine.ready
    assert engine.info == worker_engines.INFO
    assert stages == [("weights", 0.5), ("weights", 1.0)]

    events = await collect(engine, request("a"))
    assert tokens_of(events) == [0, 1, 2, 3, 4]
    assert ends_of(events) == [events[-1]]
    assert ends_of(events)[0].reason is FinishReason.LENGTH
    assert engine.stats.steps_total >= 5
    assert engine.stats.running == 0
    assert engine.restarts == 0


async def test_many_requests_at_once_keep_apart(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    answers = await asyncio.gather(*(collect(engine, request(f"r{i}", max_tokens=i)) for i in range(1, 40)))
    for wanted, events in enumerate(answers, start=1):
        assert tokens_of(events) == list(range(wanted))
        assert len(ends_of(events)) == 1
        assert {event.request_id for event in events} == {f"r{wanted}"}


async def test_nothing_is_submitted_before_the_engine_is_ready(make_engine: MakeEngine) -> None:
    engine = make_engine("slow_to_load")
    await engine.start()
    with pytest.raises(Unavailable) as refusal:
        await collect(engine, request("a"))
    assert refusal.value.code == "engine_starting"
    assert refusal.value.headers()["Retry-After"] == "5"
    with pytest.raises(TimeoutError):
        await engine.wait_ready(0.05)


async def test_closing_while_loading_ends_the_process_and_the_wait(make_engine: MakeEngine) -> None:
    engine = make_engine("slow_to_load")
    await engine.start()
    waiting = asyncio.create_task(engine.wait_ready())
    await eventually(lambda: engine.pid is not None)
    pid = engine.pid
    assert pid is not None
    began = time.monotonic()
    await engine.close()
    assert time.monotonic() - began < 10
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineStartError):
        await waiting


async def test_pixels_are_fetched_when_the_engine_wants_them(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    pictures = {b"one": np.full((2, 4, 3), 1, np.uint8), b"two": np.full((3, 3, 3), 255, np.uint8)}

    async def pixels(digest: bytes) -> np.ndarray[Any, Any]:
        await asyncio.sleep(0.01)
        return pictures[digest]

    events = await collect(engine, request("a", max_tokens=2, images=(b"one", b"two")), pixels)
    assert sorted(tokens_of(events)[:2]) == [24, 27 * 255]
    assert tokens_of(events)[2:] == [0, 1]


async def test_an_image_that_has_no_pixels_ends_its_request_alone(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))

    async def bad_image(digest: bytes) -> np.ndarray[Any, Any]:
        raise ImageError("invalid_image", "The picture is broken.")

    async def our_fault(digest: bytes) -> np.ndarray[Any, Any]:
        raise KeyError("/secret/path")

    beside, refused, failed = await asyncio.gather(
        collect(engine, request("beside", max_tokens=30)),
        collect(engine, request("refused", images=(b"x",)), bad_image),
        collect(engine, request("failed", images=(b"x",)), our_fault),
    )
    assert tokens_of(beside) == list(range(30))
    (end,) = refused
    assert isinstance(end, FinishEvent)
    assert (end.error_code, end.error_message) == ("invalid_image", "The picture is broken.")
    (end,) = failed
    assert isinstance(end, FinishEvent)
    assert end.error_code == "server_error"
    assert "secret" not in str(end.error_message)


async def test_O5_leaving_early_aborts_the_request(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    async with aclosing(engine.submit(request("a", max_tokens=10**6), no_pixels)) as events:
        async for _ in events:
            break
        await eventually(lambda: engine.stats.running == 1)
    await eventually(lambda: engine.stats.running == 0)
    assert engine.ready


async def test_leaving_cancels_an_unfinished_errand_for_pixels(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    outcome: list[str] = []

    async def never(digest: bytes) -> np.ndarray[Any, Any]:
        outcome.append("asked")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise
        raise AssertionError

    task = asyncio.create_task(collect(engine, request("a", images=(b"x",)), never))
    await eventually(lambda: outcome == ["asked"])
    task.cancel()
    await eventually(lambda: outcome == ["asked", "cancelled"])
    await eventually(lambda: engine.stats.running == 0)


async def test_abort_ends_a_request_with_that_reason(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    events: Events = []
    async for event in engine.submit(request("a", max_tokens=10**6), no_pixels):
        events.append(event)
        if len(events) == 3:
            engine.abort("a")
            engine.abort("a")
    assert [end.reason for end in ends_of(events)] == [FinishReason.ABORTED]
    engine.abort("a")
    engine.abort("never heard of")
    assert tokens_of(await collect(engine, request("b", max_tokens=2))) == [0, 1]


async def test_O1_a_full_queue_refuses_at_once_even_before_the_engine_has_answered(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("stuck", replace(Settings(), max_queue=3)))
    waiting = [asyncio.create_task(collect(engine, request(f"r{i}"))) for i in range(3)]
    await asyncio.sleep(0)
    for _ in range(2):  # first on our own count, then on the engine's
        with pytest.raises(Unavailable) as refusal:
            await collect(engine, request("one too many"))
        assert refusal.value.code == "server_is_overloaded"
        assert refusal.value.retry_after_s is not None
        await eventually(lambda: engine.stats.waiting == 3)
    waiting.pop().cancel()
    await eventually(lambda: engine.stats.waiting == 2)
    waiting.append(asyncio.create_task(collect(engine, request("now there is room"))))
    await eventually(lambda: engine.stats.waiting == 3)
    await engine.close()
    for events in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(events, list)
        assert [end.error_code for end in events] == ["server_shutting_down"]


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("bad_checkpoint", r"^/.*config\.json is missing\. Give a checkpoint folder\.$"),
        ("breaks_while_loading", r"^The engine failed to load: KeyError: 'planted'$"),
        ("killed_while_loading", r"killed by SIGKILL while it was loading.* out of memory"),
        ("no_such_factory", r"AttributeError"),
    ],
)
async def test_a_first_start_that_fails_is_final_and_says_why(
    make_engine: MakeEngine, factory: str, sentence: str
) -> None:
    engine = make_engine(factory)
    await engine.start()
    for _ in range(2):
        with pytest.raises(EngineStartError, match=sentence):
            await engine.wait_ready(START_S)
    await eventually(lambda: engine.pid is None)
    await asyncio.sleep(0.2)
    assert engine.pid is None
    assert engine.restarts == 0
    with pytest.raises(Unavailable):
        await collect(engine, request("a"))


async def test_the_engine_process_is_told_its_settings_but_no_secret(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGHTLINE_API_KEY", "canary-key")
    engine = make_engine("tells_settings", replace(Settings(), api_key=("canary-key",), block_size=32))
    await engine.start()
    with pytest.raises(EngineStartError, match=r"^\(\) 32 \[\]$"):
        await engine.wait_ready(START_S)


async def test_signals_that_reach_the_whole_group_leave_the_engine_to_its_supervisor(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert tokens_of(await collect(engine, request("a"))) == [0, 1, 2, 3, 4]
    assert engine.pid == pid


async def test_closing_ends_what_is_in_flight_and_may_be_repeated(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    running = asyncio.create_task(collect(engine, request("r", max_tokens=10**6)))
    await eventually(lambda: engine.stats.running == 1)
    await engine.close()
    await engine.close()
    (end,) = ends_of(await running)
    assert (end.reason, end.error_code) == (FinishReason.ERROR, "server_shutting_down")
    assert not engine.ready
    with pytest.raises(Unavailable):
        await collect(engine, request("late"))
