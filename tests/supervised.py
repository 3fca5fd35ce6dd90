"""Requests for an ``EngineProcess``, and ways to wait for what becomes of them; engines are in ``worker_engines``."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sightline_server.engine.client import EngineProcess, RestartPolicy
from sightline_server.engine.types import FinishEvent, ImageSpan, Prompt, Request, SamplingParams, TokenEvent

START_S = 60.0
FAST = RestartPolicy(unit_s=0.05, longest_s=0.2)

Events = list[TokenEvent | FinishEvent]
MakeEngine = Callable[..., EngineProcess]


def python_path() -> str:
    """For a process that is to find the engines of ``worker_engines``, and what this one imports."""
    return os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def request(
    name: str, *, max_tokens: int = 5, tokens: tuple[int, ...] = (1, 2, 3), images: tuple[bytes, ...] = ()
) -> Request:
    spans = tuple(ImageSpan(index, 1, digest) for index, digest in enumerate(images))
    return Request(id=name, prompt=Prompt(tokens, spans), sampling=SamplingParams(max_tokens=max_tokens))


async def no_pixels(digest: bytes) -> np.ndarray[Any, Any]:
    raise AssertionError("no pixels were to be asked for")


async def collect(engine: EngineProcess, wanted: Request, pixels: Any = no_pixels) -> Events:
    return [event async for event in engine.submit(wanted, pixels)]


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.01)


async def started(engine: EngineProcess) -> EngineProcess:
    await engine.start()
    await engine.wait_ready(START_S)
    return engine


def tokens_of(events: Events) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def ends_of(events: Events) -> list[FinishEvent]:
    return [event for event in events if isinstance(event, FinishEvent)]
