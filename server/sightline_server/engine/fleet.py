"""Several engines behind one EngineClient: each request goes to one of them, and those that are down are passed over.

Knows engines by what they have in flight and whether they are ready; which one suits a request is ``affinity.py``'s to
say. Starts no process itself, replaces none that died (each engine does), and knows no device but by name.
"""

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from sightline_server.engine.affinity import PrefixMemory, pick, prompt_hashes
from sightline_server.engine.client import EngineClient, EngineProcess, EngineStartError, PixelSource, queue_is_full
from sightline_server.engine.placement import count_engines, settings_of
from sightline_server.engine.suspects import Suspects
from sightline_server.engine.types import EngineInfo, EngineStats, FinishEvent, Request, TokenEvent
from sightline_server.settings import Settings

Progress = Callable[[str, float], None]


class Member(EngineClient, Protocol):
    """An engine of a fleet."""

    @property
    def in_flight(self) -> int:
        """Requests submitted to it that haven't ended."""


def make_engines(
    folder: Path, settings: Settings, *, on_progress: Progress | None = None, factory: str | None = None
) -> EngineClient:
    """As many engine processes as ``settings`` ask for, as one client. ``factory`` is ``EngineProcess``'s."""
    engines, cores = count_engines(settings), len(os.sched_getaffinity(0))
    # What one of them died of isn't given to another.
    suspects = Suspects(time.monotonic)

    def make(engine: int, first: EngineInfo | None = None) -> EngineProcess:
        told = on_progress
        if on_progress is not None and engines > 1:
            told = _numbered(on_progress, f"engine {engine + 1} of {engines}")
        own = settings_of(settings, engine, cores=cores, first=first)
        return EngineProcess(folder, own, on_progress=told, factory=factory, suspects=suspects)

    if engines == 1:
        return make(0)
    return EngineFleet(make(0), lambda first: [make(engine, first) for engine in range(1, engines)], settings)


class EngineFleet(EngineClient):
    """Ready once all its engines have been, and from then on while one of them is."""

    def __init__(self, first: Member, others: Callable[[EngineInfo], Sequence[Member]], settings: Settings) -> None:
        """``others`` makes the rest, from what the first has found. ``settings`` are those of the whole server."""
        self._members: list[Member] = [first]
        self._others = others
        self._settings = settings
        self._loading: asyncio.Task[None] | None = None
        self._complete = False
        self._closing = False
        self._memory = PrefixMemory(count_engines(settings))
        self._restarts_seen = [0] * count_engines(settings)
        self._last_given = [0] * count_engines(settings)
        self._turns = itertools.count(1)
        self._infos: tuple[EngineInfo, ...] = ()
        self._info: EngineInfo | None = None

    @property
    def ready(self) -> bool:
        return self.num_ready > 0

    @property
    def num_ready(self) -> int:
        return sum(member.ready for member in self._members) if self._complete and not self._closing else 0

    @property
    def restarts(self) -> int:
        return sum(member.restarts for member in self._members)

    @property
    def info(self) -> EngineInfo | None:
        infos = tuple(member.info for member in self._members if member.info is not None)
        if self._complete and infos != self._infos:
            self._infos, self._info = infos, combine(infos)
        return self._info

    @property
    def stats(self) -> EngineStats:
        return sum((member.stats for member in self._members), EngineStats())

    async def start(self) -> None:
        assert self._loading is None, "an EngineFleet is started once"
        self._loading = asyncio.create_task(self._load(), name="engine fleet")

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        assert self._loading is not None, "a fleet is waited for once it is started"
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(self._loading)
            if not self.ready:
                await self._wait_for_any()

    async def close(self) -> None:
        self._closing = True
        await asyncio.gather(*(member.close() for member in self._members))
        if self._loading is not None:
            # It fails as the engine does that it waits for.
            await asyncio.gather(self._loading, return_exceptions=True)

    def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        if not self.ready:
            # One that is down says why.
            member = next((member for member in self._members if not member.ready), self._members[0])
            return member.submit(request, pixels)
        # As one engine counts them: what is under way to it waits there too.
        waiting = sum(member.in_flight - member.stats.running for member in self._members)
        if waiting >= self._settings.max_queue:
            raise queue_is_full(self._settings.max_queue)
        return self._members[self._choose(request)].submit(request, pixels)

    def abort(self, request_id: str) -> None:
        for member in self._members:
            member.abort(request_id)

    def _choose(self, request: Request) -> int:
        loads = {index: member.in_flight for index, member in enumerate(self._members) if member.ready}
        for index in loads:
            if self._members[index].restarts != self._restarts_seen[index]:
                self._restarts_seen[index] = self._members[index].restarts
                self._memory.forget(index)
        hashes = prompt_hashes(request)
        chosen = pick(loads, self._memory.known(hashes), self._last_given)
        self._memory.note(hashes, chosen)
        self._last_given[chosen] = next(self._turns)
        return chosen

    async def _load(self) -> None:
        """The first engine finds what is wrong with a checkpoint, once, before others take memory for it.

        On a CPU they load one after another, so that what loading needs beside the weights is needed once.
        """
        (first,) = self._members
        await self._start_member(0)
        assert first.info is not None, "an engine that is ready says what it has loaded"
        self._members += self._others(first.info)
        rest = range(1, len(self._members))
        if first.info.on_gpu:
            await asyncio.gather(*map(self._start_member, rest))
        else:
            for index in rest:
                await self._start_member(index)
        if self._settings.deterministic:
            _check_alike([member.info for member in self._members if member.info is not None])
        self._complete = True

    async def _start_member(self, index: int) -> None:
        if self._closing:
            raise EngineStartError("The engines were stopped.")
        try:
            await self._members[index].start()
            await self._members[index].wait_ready()
        except EngineStartError as error:
            if index == 0:
                raise
            told = f"Engine {index + 1} of {count_engines(self._settings)}: {error}"
            raise EngineStartError(f"{told} To have fewer, lower --engines or name fewer GPUs.") from error

    async def _wait_for_any(self) -> None:
        waits = [asyncio.ensure_future(member.wait_ready()) for member in self._members]
        failure: EngineStartError | None = None
        try:
            for wait in asyncio.as_completed(waits):
                try:
                    await wait
                except EngineStartError as error:
                    failure = error
                else:
                    return
            assert failure is not None, "a fleet has members"
            raise failure
        finally:
            for wait in waits:
                wait.cancel()


def combine(infos: Sequence[EngineInfo]) -> EngineInfo:
    """What several engines are together, at least one: caches add up, and a request has to fit any of them."""
    first = infos[0]
    devices = list(dict.fromkeys(info.device for info in infos))
    told = ", ".join(devices)
    if len(devices) < len(infos):
        told += f", {len(infos)} engines"
    return msgspec.structs.replace(
        first,
        device=told,
        dtype=", ".join(dict.fromkeys(info.dtype for info in infos)),
        num_blocks=sum(info.num_blocks for info in infos),
        max_model_len=min(info.max_model_len for info in infos),
        load_seconds=max(info.load_seconds for info in infos),
    )


def _check_alike(infos: Sequence[EngineInfo]) -> None:
    """Raises EngineStartError for devices that round differently: then bytes would tell which engine was met."""
    # What stands behind a device's number: a GPU's name, a processor and its threads.
    kinds = dict.fromkeys(info.device.partition(" ")[2] for info in infos)
    if len(kinds) > 1:
        raise EngineStartError(
            f"--deterministic needs engines on devices of one kind, not {' and '.join(kinds)}. Name equal GPUs with "
            "--device, or leave --deterministic out."
        )


def _numbered(on_progress: Progress, name: str) -> Progress:
    return lambda stage, fraction: on_progress(f"{name}: {stage}", fraction)
