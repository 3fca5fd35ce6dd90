"""Engine processes that die, hang or are stopped, and what their supervisor makes of it."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from supervised import (
    START_S,
    MakeEngine,
    collect,
    ends_of,
    eventually,
    python_path,
    request,
    started,
    tokens_of,
)
from tracer import needs_stops
from worker_engines import CRASH_TOKEN, HANG_TOKEN

from sightline_server.engine import child
from sightline_server.engine.child import Patience
from sightline_server.engine.client import RestartPolicy
from sightline_server.engine.types import FinishEvent, FinishReason
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings


async def test_E4_a_killed_process_ends_its_requests_once_and_comes_back(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    first = engine.pid
    assert first is not None
    running = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=10**6))) for i in range(8)]
    await eventually(lambda: engine.stats.running == 8)
    os.kill(first, signal.SIGKILL)
    for events in await asyncio.gather(*running):
        (end,) = ends_of(events)
        assert events[-1] is end
        assert (end.reason, end.error_code) == (FinishReason.ERROR, "engine_restarting")
        assert end.usage.prompt_tokens == 3
        assert end.usage.completion_tokens == len(events) - 1 > 0
    assert not engine.ready
    with pytest.raises(Unavailable) as refusal:
        await collect(engine, request("meanwhile"))
    assert refusal.value.code == "engine_restarting"
    assert refusal.value.retry_after_s is not None

    await engine.wait_ready(START_S)
    assert engine.restarts == 1
    assert engine.pid != first
    assert tokens_of(await collect(engine, request("next"))) == [0, 1, 2, 3, 4]


async def test_E4_an_exception_in_a_step_restarts_the_process(make_engine: MakeEngine, capfd: Any) -> None:
    engine = await started(make_engine("counting"))
    beside = asyncio.create_task(collect(engine, request("beside", max_tokens=10**6)))
    await eventually(lambda: engine.stats.running == 1)
    (end,) = await collect(engine, request("poison", tokens=(CRASH_TOKEN,)))
    assert isinstance(end, FinishEvent)
    assert end.error_code == "request_crashed_engine"
    assert ends_of(await beside)[0].error_code == "engine_restarting"
    assert engine.restarts >= 1
    await engine.wait_ready(START_S)
    assert tokens_of(await collect(engine, request("next"))) == [0, 1, 2, 3, 4]
    assert "planted crash" in capfd.readouterr().err


@needs_stops
async def test_E4_a_stopped_process_is_noticed_and_replaced(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting"))
    first = engine.pid
    assert first is not None
    began = time.monotonic()
    running = asyncio.create_task(collect(engine, request("r", max_tokens=10**6)))
    await eventually(lambda: engine.stats.running == 1)
    os.kill(first, signal.SIGSTOP)
    assert ends_of(await running)[0].error_code == "engine_restarting"
    await engine.wait_ready(START_S)
    assert engine.pid != first
    # Long before it would be found by its silence.
    assert time.monotonic() - began < 9.5


@needs_stops
async def test_E4_a_process_stopped_while_it_loads_is_replaced_too(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting", patience=Patience(stopped_s=1.0)))
    first = engine.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: engine.pid not in (None, first))
    second = engine.pid
    assert second is not None
    os.kill(second, signal.SIGSTOP)
    await engine.wait_ready(START_S)
    assert engine.pid not in (first, second)


async def test_E4_a_step_that_never_ends_is_noticed_and_the_process_replaced(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await started(make_engine("counting", patience=Patience(cpu_step_s=1.0)))
    (end,) = await collect(engine, request("r", tokens=(HANG_TOKEN,)))
    assert isinstance(end, FinishEvent)
    assert end.error_code == "request_crashed_engine"
    await engine.wait_ready(START_S)
    assert tokens_of(await collect(engine, request("next", max_tokens=1))) == [0]
    assert "was hung and was killed" in caplog.text


async def test_an_idle_process_is_not_taken_for_a_hung_one(make_engine: MakeEngine) -> None:
    engine = await started(make_engine("counting", patience=Patience(silence_s=2.5)))
    await asyncio.sleep(4)
    assert engine.ready
    assert engine.restarts == 0


async def test_a_later_start_that_fails_is_tried_again(make_engine: MakeEngine, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    counts.mkdir()
    engine = await started(make_engine("loads_once", folder=counts))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await eventually(lambda: engine.restarts == 2, START_S)
    await engine.wait_ready(START_S)
    assert tokens_of(await collect(engine, request("next"))) == [0, 1, 2, 3, 4]


async def test_weights_that_were_checked_are_not_checked_again(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = await started(make_engine("verifies", settings=Settings(verify=True), folder=tmp_path))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await eventually(lambda: engine.restarts == 1)
    await engine.wait_ready(START_S)
    assert (tmp_path / "checked").is_file()
    assert engine.info is not None
    assert engine.info.verification is not None
    assert engine.info.verification.message == "checked once"


def test_waits_between_restarts_grow_and_are_bounded() -> None:
    policy = RestartPolicy()
    assert [policy.delay_s(deaths) for deaths in (1, 2, 3, 4, 5, 6, 7, 8, 10_000)] == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_E5_the_engine_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = """
        import asyncio, os, pathlib, sys
        from sightline_server.engine.client import EngineProcess
        from sightline_server.settings import Settings

        async def main():
            engine = EngineProcess(pathlib.Path("/"), Settings(), factory="worker_engines:counting")
            await engine.start()
            await engine.wait_ready()
            while os.listdir(os.environ["TMPDIR"]):
                await asyncio.sleep(0.05)
            print(engine.pid, "torch" in sys.modules, flush=True)
            await asyncio.sleep(3600)

        asyncio.run(main())
    """
    environment = dict(os.environ, PYTHONPATH=python_path(), TMPDIR=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, torch_imported = parent.stdout.readline().split()
        assert torch_imported == "False"
        orphan = psutil.Process(int(pid))
        assert orphan.is_running()
        parent.kill()
    psutil.wait_procs([orphan], timeout=10)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert not list(tmp_path.iterdir()), "a socket's folder outlived both processes"


async def test_E4_without_room_for_its_sockets_the_engine_is_back_when_there_is_some(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await started(make_engine("counting"))
    assert engine.pid is not None

    def full(purpose: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(child, "ScratchFolder", full)
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: "could not be started (No space left on device). Free some room in" in caplog.text)
        assert not engine.ready
    await engine.wait_ready(START_S)
    assert tokens_of(await collect(engine, request("next"))) == [0, 1, 2, 3, 4]
