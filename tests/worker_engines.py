"""Engines for ``worker --factory``: no model behind them, but every way to live and to die."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sightline_models.config import CheckpointError
from sightline_server.engine.types import (
    EngineInfo,
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    PixelsWanted,
    Request,
    TokenEvent,
    Usage,
    Verification,
)
from sightline_server.settings import Settings

Progress = Callable[[str, float], None]

INFO = EngineInfo(
    device="cpu (fake)",
    dtype="float32",
    parameters=1,
    weight_bytes=4,
    num_blocks=64,
    block_size=16,
    max_model_len=1024,
    load_seconds=0.01,
)
CRASH_TOKEN = 666
"""A prompt that begins with this makes the engine raise in its next step."""
HANG_TOKEN = 667
"""A prompt that begins with this makes a step that never ends."""

LATE_CRASH_TOKEN = 668
"""A prompt that begins with this makes the engine raise in the step after its third token."""


class CountingEngine:
    """Answers with 0, 1, 2, ... one token a step; a prompt's images add the sum of their pixels as a first token."""

    def __init__(self, seconds_a_step: float = 0.0) -> None:
        self.seconds_a_step = seconds_a_step
        self.requests: dict[str, Request] = {}
        self.generated: dict[str, int] = {}
        self.missing: dict[str, set[bytes]] = {}
        self.pending: list[Event] = []
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return any(not self.missing[request_id] for request_id in self.requests)

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.generated[request.id] = 0
        self.missing[request.id] = {span.digest for span in request.prompt.images}
        self.pending += [PixelsWanted(request.id, digest) for digest in sorted(self.missing[request.id])]

    def abort(self, request_id: str) -> None:
        if request_id in self.requests:
            self._finish(request_id, FinishReason.ABORTED)

    def provide(self, request_id: str, digest: bytes, pixels: np.ndarray[Any, Any]) -> None:
        if request_id in self.requests:
            self.missing[request_id].discard(digest)
            self.pending.append(TokenEvent(request_id, int(pixels.sum(dtype=np.int64))))

    def fail_image(self, request_id: str, digest: bytes, code: str, message: str) -> None:
        if request_id in self.requests:
            self._finish(request_id, FinishReason.ERROR, code, message)

    def step(self) -> list[Event]:
        self.steps += 1
        time.sleep(self.seconds_a_step)
        for request in list(self.requests.values()):
            if request.prompt.token_ids[:1] == (CRASH_TOKEN,):
                raise RuntimeError("planted crash")
            if request.prompt.token_ids[:1] == (HANG_TOKEN,):
                time.sleep(3600)
            if request.prompt.token_ids[:1] == (LATE_CRASH_TOKEN,) and self.generated[request.id] == 3:
                raise RuntimeError("planted late crash")
            if self.missing[request.id]:
                continue
            self.pending.append(TokenEvent(request.id, self.generated[request.id]))
            self.generated[request.id] += 1
            if self.generated[request.id] == request.sampling.max_tokens:
                self._finish(request.id, FinishReason.LENGTH)
        events, self.pending = self.pending, []
        return events

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.requests), steps_total=self.steps)

    def _finish(
        self, request_id: str, reason: FinishReason, code: str | None = None, message: str | None = None
    ) -> None:
        usage = Usage(len(self.requests[request_id].prompt.token_ids), self.generated[request_id])
        del self.requests[request_id], self.missing[request_id]
        self.pending.append(FinishEvent(request_id, reason, usage, code, message))


class StuckEngine(CountingEngine):
    """Takes requests and never begins with one: everything waits."""

    @property
    def has_work(self) -> bool:
        return False

    def step(self) -> list[Event]:
        events, self.pending = self.pending, []
        return events

    def stats(self) -> EngineStats:
        return EngineStats(waiting=len(self.requests))


def counting(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    progress("weights", 0.5)
    progress("weights", 1.0)
    return CountingEngine(0.005), INFO


def stuck(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    return StuckEngine(), INFO


def stuck_at_first(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    """Never begins with a request in its first life; works from the second on. Marks ``folder``."""
    if (folder / "was stuck").exists():
        return CountingEngine(0.005), INFO
    (folder / "was stuck").touch()
    return StuckEngine(), INFO


def stuck_and_gone(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    """Never begins with a request in its first life; never loads again. Marks ``folder``."""
    if (folder / "was stuck").exists():
        time.sleep(3600)
    (folder / "was stuck").touch()
    return StuckEngine(), INFO


def slow_to_load(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    time.sleep(3600)
    raise AssertionError


def bad_checkpoint(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    raise CheckpointError(f"{folder / 'config.json'} is missing. Give a checkpoint folder.")


def breaks_while_loading(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    raise KeyError("planted")


def killed_while_loading(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    os.kill(os.getpid(), 9)
    raise AssertionError


def loads_once(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    """Works the first time, fails the second, works from the third on; counts in ``folder``."""
    count = len(list(folder.iterdir()))
    (folder / str(count)).touch()
    if count == 1:
        raise CheckpointError("The second start fails.")
    return CountingEngine(0.005), INFO


def verifies(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    """Checks its weights when told to; marks ``folder``, and fails to do so a second time."""
    if not settings.verify:
        return CountingEngine(0.005), INFO
    (folder / "checked").touch(exist_ok=False)
    found = Verification(outcome="failed", message="checked once", quantization="int8")
    return CountingEngine(0.005), msgspec.structs.replace(INFO, verification=found)


def tells_settings(folder: Path, settings: Settings, progress: Progress) -> tuple[CountingEngine, EngineInfo]:
    """Fails with what it was told, for the test to read."""
    environment = [name for name in os.environ if name.startswith("SIGHTLINE_")]
    raise CheckpointError(f"{settings.api_key!r} {settings.block_size} {environment}")
