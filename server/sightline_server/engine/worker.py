"""The engine's own process, only ever started as ``python -m sightline_server.engine.worker``; nothing imports it.

Loads an engine, then turns commands from the socket into calls and steps into reports. Knows no HTTP and no text, and
decides nothing: an exception that escapes a step ends this process, and its supervisor (``client.py``) starts another.
What can't be read or told ends the one request it belongs to, where that is sure.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import zmq

from sightline_models.config import CheckpointError
from sightline_server import logs
from sightline_server.engine import wire
from sightline_server.engine.types import EngineInfo, EngineStats, Event, FinishEvent, FinishReason, Request, Usage
from sightline_server.settings import Settings, SettingsError

# Its own name is __main__.
log = logging.getLogger("sightline_server.engine.worker")

DEFAULT_FACTORY = "sightline_server.engine.load:load_engine"
HEARTBEAT_S = 1.0
UNREADABLE = "The engine could not read or tell what belongs to this request. Send it again, changed."


class SteppingEngine(Protocol):
    """What this loop asks of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def provide(self, request_id: str, digest: bytes, pixels: np.ndarray[Any, Any]) -> None: ...
    def fail_image(self, request_id: str, digest: bytes, code: str, message: str) -> None: ...
    def step(self) -> list[Event]: ...
    def stats(self) -> EngineStats: ...


EngineFactory = Callable[[Path, Settings, Callable[[str, float], None]], tuple[SteppingEngine, EngineInfo]]


class Stopped(Exception):
    """The supervisor asked this process to exit."""


class Heart(threading.Thread):
    """Tells the supervisor every second that this process lives, and how long the step under way has lasted."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, parent: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._context = context
        self._address = address
        self._parent = parent
        self._stopped = threading.Event()
        self.step_began: float | None = None

    def run(self) -> None:
        # ZeroMQ sockets belong to one thread, so the heartbeat has its own.
        socket = self._context.socket(zmq.PUSH)
        socket.connect(self._address)
        stopped = False
        while not stopped:
            began = self.step_began
            beat = wire.Heartbeat(0.0 if began is None else time.monotonic() - began)
            # A supervisor that reads nothing for a while needs no backlog of old beats.
            with contextlib.suppress(zmq.Again):
                socket.send(wire.encode(beat), zmq.NOBLOCK)
            stopped = self._stopped.wait(HEARTBEAT_S)
            # Where the kernel can't tell us of our parent's death (die_with_parent), this does.
            if os.getppid() != self._parent:
                os._exit(1)
        socket.close(linger=0)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


class EngineLoop:
    """Commands in, reports out, one step at a time."""

    def __init__(self, commands: zmq.Socket[bytes], reports: zmq.Socket[bytes], heart: Heart) -> None:
        self._commands = commands
        self._reports = reports
        self._heart = heart
        self._adds_taken = 0
        self._refusals: list[Event] = []

    def load(self, factory: EngineFactory) -> SteppingEngine:
        """Raises Stopped, or whatever the factory raises."""
        self._send(wire.Hello())
        command, _ = wire.decode_command(self._commands.recv_multipart())
        if not isinstance(command, wire.Start):
            raise Stopped
        logs.configure(command.settings)
        engine, info = factory(Path(command.folder), command.settings, self._progress)
        # What was loaded stays: the collector need not look through torch again and again between steps.
        gc.collect()
        gc.freeze()
        self._send(wire.Ready(info))
        return engine

    def run(self, engine: SteppingEngine) -> NoReturn:
        """Steps until told to stop. Raises Stopped, or whatever a step raises."""
        while True:
            told = self._take_commands(engine)
            # After a command there is always something to report: a refusal, an end, or at least other figures.
            if told or engine.has_work:
                self._heart.step_began = time.monotonic()
                events = engine.step()
                self._heart.step_began = None
                self._report(engine, [*self._refusals, *events])
                self._refusals.clear()

    def fail(self, message: str) -> None:
        self._send(wire.StartFailed(message))

    def _take_commands(self, engine: SteppingEngine) -> bool:
        """Applies every command that has come. Waits for one when the engine has nothing to compute."""
        told = False
        wait = not engine.has_work
        while self._commands.poll(None if wait else 0):
            self._apply(engine, self._commands.recv_multipart())
            told, wait = True, False
        return told

    def _apply(self, engine: SteppingEngine, frames: list[bytes]) -> None:
        try:
            command, pixels = wire.decode_command(frames)
        except wire.WireError:
            whose = wire.request_of(frames)
            if whose is None:
                raise
            log.exception("what came for request %s can't be read; it ends", whose[1])
            self._refuse(engine, *whose)
            return
        match command:
            case wire.Add(request):
                self._adds_taken += 1
                engine.add(request)
            case wire.Abort(request_id):
                engine.abort(request_id)
            case wire.Provide(request_id, digest):
                assert pixels is not None
                engine.provide(request_id, digest, pixels)
            case wire.FailImage(request_id, digest, code, message):
                engine.fail_image(request_id, digest, code, message)
            case wire.Stop():
                raise Stopped
            case wire.Start():
                raise wire.WireError("The engine was told to start twice.")

    def _refuse(self, engine: SteppingEngine, tag: str, request_id: str) -> None:
        if tag == "add":
            self._adds_taken += 1
            self._refusals.append(_failed(request_id))
        else:
            engine.fail_image(request_id, b"", "server_error", UNREADABLE)

    def _report(self, engine: SteppingEngine, events: list[Event]) -> None:
        stats = engine.stats()
        try:
            self._send(wire.StepReport(events, stats, self._adds_taken))
        except wire.WireError:
            log.exception("not everything that a step gave can be told")
            self._send(wire.StepReport(self._tellable(engine, events), stats, self._adds_taken))

    def _tellable(self, engine: SteppingEngine, events: list[Event]) -> list[Event]:
        """These events, but for those of requests of which one can't be encoded: these end."""
        tellable: list[Event] = []
        ending: set[str] = set()
        for event in events:
            request_id = event.request_id
            if request_id not in ending:
                try:
                    wire.encode(wire.StepReport([event], EngineStats(), 0))
                except wire.WireError:
                    ending.add(request_id)
                    # Ignored where it has ended; then its end is among these events.
                    engine.fail_image(request_id, b"", "server_error", UNREADABLE)
                else:
                    tellable.append(event)
                    continue
            if isinstance(event, FinishEvent):
                tellable.append(_failed(request_id))
        return tellable

    def _progress(self, stage: str, fraction: float) -> None:
        self._send(wire.Progress(stage, fraction))

    def _send(self, report: wire.Report) -> None:
        self._reports.send(wire.encode(report))


def _failed(request_id: str) -> FinishEvent:
    return FinishEvent(request_id, FinishReason.ERROR, Usage(), "server_error", UNREADABLE)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # The parent may have died before the line above took effect.
    if os.getppid() != parent:
        raise SystemExit(1)


def find_factory(path: str) -> EngineFactory:
    """The callable that ``module:name`` stands for."""
    module, _, name = path.partition(":")
    factory: EngineFactory = getattr(importlib.import_module(module), name)
    return factory


def serve(loop: EngineLoop, factory_path: str) -> int:
    """Loads and runs; the exit status."""
    try:
        # The import of torch is part of loading: it takes seconds and may fail.
        engine = loop.load(lambda *arguments: find_factory(factory_path)(*arguments))
    except Stopped:
        return 0
    except (CheckpointError, SettingsError) as error:
        loop.fail(str(error))
        return 1
    except Exception as error:
        log.exception("The engine failed to load.")
        loop.fail(f"The engine failed to load: {type(error).__name__}: {error}")
        return 1
    try:
        loop.run(engine)
    except Stopped:
        return 0
    except Exception:
        log.exception("The engine failed in the middle of a step; its process ends.")
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Started by 'sightline serve'; not meant to be run by hand.")
    parser.add_argument("--commands", required=True, help="ZeroMQ endpoint where this process takes commands.")
    parser.add_argument("--reports", required=True, help="ZeroMQ endpoint that takes its reports.")
    parser.add_argument("--parent", type=int, required=True, help="Process that this one must not outlive.")
    parser.add_argument("--factory", default=DEFAULT_FACTORY, help="module:function that makes the engine.")
    arguments = parser.parse_args()

    # Ctrl-C reaches every process of the terminal, and a service manager's SIGTERM every process of the service:
    # the supervisor decides, and lets running requests finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The supervisor reads its keys again at this one.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    die_with_parent(arguments.parent)
    faulthandler.enable()

    context = zmq.Context[zmq.Socket[bytes]]()
    commands = context.socket(zmq.PULL)
    commands.set_hwm(0)
    commands.bind(arguments.commands)
    reports = context.socket(zmq.PUSH)
    reports.connect(arguments.reports)
    heart = Heart(context, arguments.reports, arguments.parent)
    heart.start()
    status = serve(EngineLoop(commands, reports, heart), arguments.factory)
    heart.stop()
    # Objects left frozen at the very end count as leaked to torch's native bindings, and they say so at length.
    gc.unfreeze()
    commands.close(linger=0)
    # Terminating the context waits until the last report has left.
    reports.close(linger=1000)
    context.term()
    return status


if __name__ == "__main__":
    sys.exit(main())
