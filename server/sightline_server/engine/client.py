"""The API process's view of the engine: submit a request, read its events, whatever becomes of the process behind.

Supervises that process: starts it, and when it dies starts it again with the requests that had not begun; the others
end with one named reason. Knows requests and events. Knows no torch, no HTTP and no text.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from sightline_models.images import ImageError
from sightline_server import settings as settings_table
from sightline_server.engine import wire
from sightline_server.engine.child import ChildProcess, Patience, advice
from sightline_server.engine.flights import Flight, Flights
from sightline_server.engine.flights import PixelSource as PixelSource
from sightline_server.engine.suspects import Suspects
from sightline_server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishEvent,
    FinishReason,
    PixelsWanted,
    Request,
    TokenEvent,
)
from sightline_server.errors import ApiError, Unavailable
from sightline_server.logs import frames
from sightline_server.settings import Settings

log = logging.getLogger(__name__)

OVERLOADED_RETRY_S = 2.0
LONGEST_RETRY_S = 60.0
STOP_GRACE_S = 3.0

LOST = "The engine stopped in the middle of this request and is restarting. Send the request again."
NOT_BACK = "The engine stopped and was not back in time for this request. Send it again later."
GUILTY = (
    "The engine stopped each time it worked on this request, so the request isn't tried again for some minutes. "
    "Change it; the server's log says how the engine ended."
)
SHUTTING_DOWN = "The server is shutting down. Send the request again when it is back."


class EngineStartError(RuntimeError):
    """The engine can't be started; the sentence says why and is meant for the operator."""


class EngineClient(Protocol):
    """What the API asks of an engine, be it a process (``EngineProcess``) or a test's fake."""

    @property
    def ready(self) -> bool: ...
    @property
    def num_ready(self) -> int:
        """Engines behind it that answer."""
        return int(self.ready)

    @property
    def restarts(self) -> int:
        """Times an engine was started again."""

    @property
    def info(self) -> EngineInfo | None:
        """What was loaded; None until first ready."""

    @property
    def stats(self) -> EngineStats:
        """The latest figures. Totals never fall, though an engine is started again."""

    async def start(self) -> None:
        """Starts loading; returns at once."""

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises EngineStartError when loading failed for good, TimeoutError after ``timeout_s``."""

    async def close(self) -> None: ...
    def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """The request's events; ends after exactly one FinishEvent. Closing it early aborts the request.

        Raises Unavailable when the engine isn't ready, its queue is full, or this request has crashed it before.
        """

    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How soon a dead engine process is replaced: at once, then after 1 s, 2 s, 4 s and so on."""

    unit_s: float = 1.0
    longest_s: float = 30.0
    healthy_s: float = 2.0
    """A process that was ready for this long starts the count afresh: what crashes it later is found by other means."""

    def delay_s(self, deaths: int) -> float:
        """Seconds to wait after the ``deaths``-th death in a row."""
        return 0.0 if deaths <= 1 else min(self.longest_s, self.unit_s * 2.0 ** min(deaths - 2, 32))


class EngineProcess(EngineClient):
    """An EngineClient whose engine runs in a process of its own, replaced whenever it dies.

    The first start is the operator's to see: if the process fails or dies before it was ever ready, ``wait_ready``
    raises and nothing is tried again. After that, every death is followed by a restart.
    """

    restarts = 0

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        on_progress: Callable[[str, float], None] | None = None,
        factory: str | None = None,
        policy: RestartPolicy | None = None,
        patience: Patience | None = None,
        suspects: Suspects | None = None,
    ) -> None:
        """``factory`` is the ``module:function`` that makes the engine; None is the true one. Several engines may
        share ``suspects``."""
        self._folder = folder
        # The engine has no use for secrets.
        self._settings = settings_table.replace(settings, api_key=(), api_key_file="", keys_file="")
        self._on_progress = on_progress
        self._factory = factory
        self._policy = policy or RestartPolicy()
        self._patience = patience or Patience.of(settings)
        self._child: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        # One that remembers nothing yet is false.
        self._flights = Flights(Suspects(time.monotonic) if suspects is None else suspects)
        self._not_back: asyncio.TimerHandle | None = None
        self._ready = False
        self._ready_at: float | None = None
        self._settled = asyncio.Event()
        self._failure: str | None = None
        self._closing = False
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._past = EngineStats()
        self._adds_sent = 0
        self._adds_taken = 0
        self._next_start = 0.0

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def stats(self) -> EngineStats:
        # Those on their way to the process, or held back from it, wait too.
        waiting = self._stats.waiting + self._adds_sent - self._adds_taken + self._flights.num_held
        return self._past + msgspec.structs.replace(self._stats, waiting=waiting)

    @property
    def in_flight(self) -> int:
        """Requests submitted that haven't ended."""
        return len(self._flights)

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        assert self._supervisor is None, "an EngineProcess is started once"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        async with asyncio.timeout(timeout_s):
            while not self._ready:
                if self._failure is not None:
                    raise EngineStartError(self._failure)
                await self._settled.wait()

    async def close(self) -> None:
        """Ends the process; requests still in flight end with an error. May be called at any time, also twice."""
        self._closing = True
        self._ready = False
        self._stop_waiting()
        self._fail("The engine was stopped.")
        self._end_flights("server_shutting_down", SHUTTING_DOWN)
        if self._child is not None:
            await self._child.stop(STOP_GRACE_S)
        if self._supervisor is not None:
            # Between two processes it is only waiting; otherwise it is about to see the last one die.
            if self._child is None:
                self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    async def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        self._check_room()
        flight = self._flights.hold(request, pixels)
        if self._flights.suspects and self._flights.suspects.is_guilty(flight.fingerprint):
            self._flights.land(request.id)
            raise Unavailable(GUILTY, code="request_crashed_engine", should_retry=False)
        self._board()
        try:
            while True:
                event = await flight.events.get()
                yield event
                if isinstance(event, FinishEvent):
                    return
        finally:
            self.abort(request.id)
            self._flights.leave(request.id)
            self._board()

    def abort(self, request_id: str) -> None:
        """Asks for the request's end; its FinishEvent follows. Nothing happens for one that has ended."""
        flight = self._flights.get(request_id)
        if flight is None or flight.abort_sent:
            return
        if self._flights.is_held(request_id):
            self._flights.land(request_id)
            flight.end(FinishReason.ABORTED)
        elif self._child is not None:
            flight.abort_sent = True
            self._child.send(wire.Abort(request_id))

    def _board(self) -> None:
        """Sends the process what it may have by now."""
        if self._ready and self._child is not None:
            for flight in self._flights.board():
                self._child.send(wire.Add(flight.request))
                self._adds_sent += 1

    def _check_room(self) -> None:
        if not self._ready or self._child is None:
            if self._info is None:
                raise Unavailable(
                    "The engine is still loading the model. Try again shortly.",
                    code="engine_starting",
                    retry_after_s=5.0,
                )
            wait_s = max(0.0, self._next_start - asyncio.get_running_loop().time()) + self._info.load_seconds
            raise Unavailable(
                "The engine is restarting. Try again shortly.",
                code="engine_restarting",
                retry_after_s=min(wait_s, LONGEST_RETRY_S),
            )
        if self.stats.waiting >= self._settings.max_queue:
            raise queue_is_full(self._settings.max_queue)

    # What the process reports

    def _on_report(self, report: wire.Report) -> None:
        if self._closing:
            return
        match report:
            case wire.StepReport(events, stats, adds_taken):
                self._stats = stats
                self._adds_taken = adds_taken
                for event in events:
                    self._deliver(event)
                if self._flights.num_held:
                    self._board()
            case wire.Hello():
                assert self._child is not None
                # What was checked once isn't checked again while requests wait for the engine to come back.
                again = self._info is not None and self._info.verification is not None
                settings = settings_table.replace(self._settings, verify=False) if again else self._settings
                self._child.send(wire.Start(str(self._folder), settings))
            case wire.Progress(stage, fraction):
                if self._on_progress is not None:
                    self._on_progress(stage, fraction)
            case wire.Ready(info):
                found = self._info.verification if self._info is not None else None
                self._info = info if found is None else msgspec.structs.replace(info, verification=found)
                self._stats = EngineStats(blocks_total=info.num_blocks)
                self._ready = True
                self._ready_at = asyncio.get_running_loop().time()
                self._settled.set()
                self._stop_waiting()
                self._board()
            case wire.StartFailed(message):
                if self._info is None:
                    self._fail(message)
                else:
                    log.error("The engine could not be started again: %s", message)

    def _deliver(self, event: TokenEvent | FinishEvent | PixelsWanted) -> None:
        flight = self._flights.get(event.request_id)
        if flight is None:
            return
        match event:
            case FinishEvent(reason=reason):
                self._flights.land(event.request_id)
                if self._flights.suspects and reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self._flights.suspects.clear(flight.fingerprint)
                flight.events.put_nowait(event)
            case _ if flight.left:
                # The client left, and the abort crossed this event on its way.
                return
            case TokenEvent():
                self._flights.note_token(flight)
                flight.events.put_nowait(event)
            case PixelsWanted(_, digest):
                assert self._child is not None
                errand = asyncio.create_task(_fetch_pixels(self._child, flight, digest))
                flight.errands.add(errand)
                errand.add_done_callback(flight.errands.discard)

    def _carry_over(self) -> None:
        """After a death: who can't go again ends now; who can, waits for the next process, for a while."""
        lost, refused = self._flights.crash()
        for flight in lost:
            flight.end(FinishReason.ERROR, "engine_restarting", LOST)
        for flight in refused:
            log.error("Request %s is not tried again: the engine died each time it had it.", flight.request.id)
            flight.end(FinishReason.ERROR, "request_crashed_engine", GUILTY)
        if self._not_back is None:
            # With no time to wait, before anybody else gets a turn.
            wait_s = self._settings.restart_wait_s
            if wait_s and self._info is not None:
                # What took long to load once takes long again.
                wait_s = max(wait_s, 2 * self._info.load_seconds)
            give_up = partial(self._end_flights, "engine_restarting", NOT_BACK)
            if wait_s == 0:
                give_up()
            else:
                self._not_back = asyncio.get_running_loop().call_later(wait_s, give_up)

    def _stop_waiting(self) -> None:
        if self._not_back is not None:
            self._not_back.cancel()
            self._not_back = None

    def _end_flights(self, code: str, message: str) -> None:
        for flight in self._flights.take_all():
            flight.end(FinishReason.ERROR, code, message)

    # The process's lives

    async def _supervise(self) -> None:
        deaths = 0
        clock = asyncio.get_running_loop().time
        try:
            while True:
                lived_s = await self._live()
                if self._closing or self._failure is not None:
                    return
                deaths = 1 if lived_s >= self._policy.healthy_s else deaths + 1
                self._next_start = clock() + self._policy.delay_s(deaths)
                log.warning("The engine starts again in %.0f s.", self._policy.delay_s(deaths))
                await asyncio.sleep(self._policy.delay_s(deaths))
                self.restarts += 1
        except Exception:
            log.exception("The engine's supervisor failed; the server needs a restart.")
            self._fail("The engine's supervisor failed; the log says where.")
            raise

    async def _live(self) -> float:
        """One process from start to death. Returns for how many seconds it was ready."""
        self._adds_sent = self._adds_taken = 0
        self._ready_at = None
        try:
            self._child = await ChildProcess.spawn(self._on_report, factory=self._factory, patience=self._patience)
        except OSError as error:
            how = f"could not be started ({error.strerror or error})"
        else:
            how = await self._child.died()
        self._child = None
        self._ready = False
        if self._closing:
            return 0.0
        if self._info is None:
            # A process that told its reason before it ended has failed the start already.
            self._fail(self._failure or f"The engine process {how} while it was loading the model.{advice(how)}")
            return 0.0
        log.error("The engine process %s.%s", how, advice(how))
        self._settled.clear()
        self._past, self._stats = self._past + self._stats.totals, EngineStats()
        self._carry_over()
        return 0.0 if self._ready_at is None else asyncio.get_running_loop().time() - self._ready_at

    def _fail(self, message: str) -> None:
        """No process will follow: ``wait_ready`` raises from now on."""
        self._failure = self._failure or message
        self._settled.set()


def queue_is_full(max_queue: int) -> Unavailable:
    return Unavailable(
        f"The queue of {max_queue} waiting requests is full. Try again later.",
        code="server_is_overloaded",
        retry_after_s=OVERLOADED_RETRY_S,
    )


async def _fetch_pixels(child: ChildProcess, flight: Flight, digest: bytes) -> None:
    """Sends the engine the pixels it wants, or the reason why there are none."""
    try:
        child.send_pixels(flight.request.id, digest, await flight.pixels(digest))
    except (ImageError, ApiError) as error:
        child.send(wire.FailImage(flight.request.id, digest, error.code or "server_error", error.message))
    except Exception as error:
        log.error("The pixels of an image of request %s can't be had:\n%s", flight.request.id, frames(error))
        message = "The image could not be prepared for the model."
        child.send(wire.FailImage(flight.request.id, digest, "server_error", message))
