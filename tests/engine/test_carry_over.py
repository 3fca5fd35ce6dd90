"""Requests that outlive the engine process they were sent to, and the one that is why it died."""

import asyncio
import os
import signal
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from supervised import MakeEngine, collect, ends_of, eventually, no_pixels, request, started, tokens_of
from worker_engines import CRASH_TOKEN, LATE_CRASH_TOKEN

from sightline_server.engine.client import EngineProcess
from sightline_server.engine.suspects import Suspects
from sightline_server.engine.types import FinishReason
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings, replace


def kill(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


async def test_E4_requests_that_had_not_begun_get_their_answers_from_the_next_process(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = await started(make_engine("stuck_at_first", folder=tmp_path))
    asked = 0

    async def pixels(digest: bytes) -> np.ndarray[Any, Any]:
        nonlocal asked
        asked += 1
        if asked == 1:
            # Under way when the process dies: asked for again by the next one.
            await asyncio.sleep(3600)
        return np.full((1, 1, 3), 7, np.uint8)

    wanted = [request(f"r{i}", max_tokens=4 + i, tokens=(1, 2, i)) for i in range(6)]
    waiting = [asyncio.create_task(collect(engine, one)) for one in wanted]
    with_picture = asyncio.create_task(collect(engine, request("picture", max_tokens=2, images=(b"x",)), pixels))
    await eventually(lambda: engine.stats.waiting == 7 and asked == 1)
    kill(engine)
    for i, events in enumerate(await asyncio.gather(*waiting)):
        assert tokens_of(events) == list(range(4 + i))
        assert ends_of(events) == [events[-1]]
    assert tokens_of(await with_picture) == [21, 0, 1]
    assert asked == 2
    assert engine.restarts == 1


async def test_E4_a_poison_request_is_tried_once_more_and_its_mates_are_not_harmed(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    poison = asyncio.create_task(collect(engine, request("poison", tokens=(CRASH_TOKEN,))))
    # In the same breath: all seven reach the process before its first step.
    mates = [asyncio.create_task(collect(engine, request(f"r{i}", tokens=(1, 2, i)))) for i in range(6)]
    (end,) = ends_of(await poison)
    assert (end.reason, end.error_code) == (FinishReason.ERROR, "request_crashed_engine")
    for mate in mates:
        assert tokens_of(await mate) == [0, 1, 2, 3, 4]
    assert engine.restarts == 2

    again = request("again", tokens=(CRASH_TOKEN,))
    other_seed = msgspec.structs.replace(again, sampling=msgspec.structs.replace(again.sampling, seed=9))
    for one in (again, other_seed):
        with pytest.raises(Unavailable) as refusal:
            await collect(engine, one)
        assert refusal.value.code == "request_crashed_engine"
        assert refusal.value.headers() == {"x-should-retry": "false"}
    assert tokens_of(await collect(engine, request("next"))) == [0, 1, 2, 3, 4]
    assert engine.restarts == 2


async def test_E4_a_request_that_crashes_late_is_found_out_when_its_client_sends_it_again(
    make_engine: MakeEngine,
) -> None:
    engine = await started(make_engine("counting"))
    codes = []
    for attempt in range(2):
        events = await collect(engine, request(f"late {attempt}", tokens=(LATE_CRASH_TOKEN,)))
        assert tokens_of(events) in ([], [0], [0, 1], [0, 1, 2])
        codes += [end.error_code for end in ends_of(events)]
        await eventually(lambda: engine.ready)
    assert codes == ["engine_restarting", "request_crashed_engine"]
    with pytest.raises(Unavailable, match="each time"):
        await collect(engine, request("late", tokens=(LATE_CRASH_TOKEN,)))


def test_E4_engines_share_what_they_know_of_suspects(tmp_path: Path) -> None:
    suspects = Suspects(time.monotonic)
    engines = [EngineProcess(tmp_path, Settings(), suspects=suspects) for _ in range(2)]
    assert all(engine._flights.suspects is suspects for engine in engines)


async def test_E4_requests_do_not_wait_for_an_engine_that_stays_away(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = await started(make_engine("stuck_and_gone", replace(Settings(), restart_wait_s=0.5), folder=tmp_path))
    waiting = asyncio.create_task(collect(engine, request("r")))
    await eventually(lambda: engine.stats.waiting == 1)
    kill(engine)
    (end,) = await asyncio.wait_for(waiting, 10)
    assert ends_of([end])[0].error_code == "engine_restarting"
    assert "not back in time" in str(ends_of([end])[0].error_message)


async def test_E4_no_request_waits_when_none_is_to(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = await started(make_engine("stuck_at_first", replace(Settings(), restart_wait_s=0), folder=tmp_path))
    waiting = asyncio.create_task(collect(engine, request("r")))
    await eventually(lambda: engine.stats.waiting == 1)
    kill(engine)
    assert [end.error_code for end in ends_of(await waiting)] == ["engine_restarting"]


async def test_E4_a_request_that_waits_for_the_engine_can_be_aborted_left_and_shut_down(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = await started(make_engine("stuck_and_gone", folder=tmp_path))
    aborted = asyncio.create_task(collect(engine, request("aborted")))
    left = asyncio.create_task(collect(engine, request("left")))
    kept = asyncio.create_task(collect(engine, request("kept")))
    await eventually(lambda: engine.stats.waiting == 3)
    kill(engine)
    await eventually(lambda: not engine.ready)
    engine.abort("aborted")
    assert [end.reason for end in ends_of(await aborted)] == [FinishReason.ABORTED]
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await engine.close()
    assert [end.error_code for end in ends_of(await kept)] == ["server_shutting_down"]


async def test_E4_an_answer_that_had_begun_ends_with_an_error(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    async with aclosing(engine.submit(request("r", max_tokens=10**6), no_pixels)) as events:
        seen = [await anext(events)]
        kill(engine)
        seen += [event async for event in events]
    (end,) = ends_of(seen)
    assert end.error_code == "engine_restarting"
    assert end.usage.completion_tokens == len(seen) - 1
