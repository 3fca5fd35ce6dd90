"""A fleet of true processes: one killed in the middle of its requests, and what is said while they load."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import worker_engines

from sightline_server.engine.client import EngineClient, EngineProcess, RestartPolicy
from sightline_server.engine.fleet import EngineFleet, make_engines
from sightline_server.engine.types import FinishEvent, Prompt, Request, SamplingParams, TokenEvent
from sightline_server.settings import Settings

FAST = RestartPolicy(unit_s=0.05, longest_s=0.2)


def request(name: str, *, max_tokens: int = 5) -> Request:
    return Request(id=name, prompt=Prompt((1, 2, 3)), sampling=SamplingParams(max_tokens=max_tokens))


async def no_pixels(digest: bytes) -> np.ndarray[Any, Any]:
    raise AssertionError("no pixels were to be asked for")


async def collect(engine: EngineClient, wanted: Request) -> list[TokenEvent | FinishEvent]:
    return [event async for event in engine.submit(wanted, no_pixels)]


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.01)


async def test_E4_two_true_processes_lose_only_what_one_had_and_totals_never_fall(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(worker_engines.__file__).parent))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = Settings(engines=2, device="cpu")
    processes = [EngineProcess(tmp_path, settings, factory="worker_engines:counting", policy=FAST) for _ in range(2)]
    fleet = EngineFleet(processes[0], lambda _: processes[1:], settings)
    await fleet.start()
    await fleet.wait_ready(60)
    try:
        victim = psutil.Process(processes[0].pid)
        tasks = [asyncio.create_task(collect(fleet, request(f"r{n}", max_tokens=200))) for n in range(8)]
        await eventually(lambda: fleet.stats.running == 8)
        assert [process.in_flight for process in processes] == [4, 4]
        before = fleet.stats.steps_total
        os.kill(victim.pid, signal.SIGKILL)
        ends = [events[-1] for events in await asyncio.gather(*tasks)]
        assert all(isinstance(end, FinishEvent) for end in ends)
        codes = [end.error_code for end in ends if isinstance(end, FinishEvent)]
        assert sorted(codes, key=str) == [None] * 4 + ["engine_restarting"] * 4
        assert fleet.ready
        assert fleet.stats.steps_total >= before
        assert fleet.stats.blocks_total <= 2 * worker_engines.INFO.num_blocks
        await eventually(lambda: fleet.num_ready == 2)
        assert fleet.restarts == 1
        assert fleet.stats.steps_total >= before
        assert len(await collect(fleet, request("next"))) == 6
    finally:
        await fleet.close()
    assert [process.pid for process in processes] == [None, None]


async def test_one_engine_is_a_process_and_several_are_told_apart_while_they_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(worker_engines.__file__).parent))
    assert isinstance(make_engines(tmp_path, Settings()), EngineProcess)
    stages: list[str] = []
    fleet = make_engines(
        tmp_path,
        Settings(engines=2, device="cpu"),
        on_progress=lambda stage, _: stages.append(stage),
        factory="worker_engines:counting",
    )
    await fleet.start()
    try:
        await fleet.wait_ready(60)
    finally:
        await fleet.close()
    assert list(dict.fromkeys(stages)) == ["engine 1 of 2: weights", "engine 2 of 2: weights"]
