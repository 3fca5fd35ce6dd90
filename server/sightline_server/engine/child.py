"""One engine process from its start to its death: spawned, spoken to over two sockets, watched, ended.

Knows the process, the sockets and the signs of a hung process. Knows nothing of requests, and never
starts a second process: that is ``client.py``. Each child has its own sockets, so nothing late from a dead one can be
taken for a word of the next.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from sightline_models.images import Pixels
from sightline_server.confined.process import is_stopped
from sightline_server.engine import wire
from sightline_server.scratch import ScratchFolder
from sightline_server.settings import ENV_PREFIX, Settings

# What only the process's start can set, for an engine on a CPU. The operator's own environment wins.
ENGINE_ENVIRONMENT = {
    # A waiting thread spins for microseconds and then sleeps: spinning on starves whoever it waits for on a busy core.
    "GOMP_SPINCOUNT": "10000",
    # Freed memory is kept for the next step: giving it back means clearing every page of it anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}

FILES_TO_START = 32
"""Most files that a start opens, on the way or for good."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long an engine process may go without a sign of life, in seconds, before it counts as hung and is killed."""

    silence_s: float = 10.0
    """Without any message once it is loaded; a thread of its own beats once a second."""
    loading_silence_s: float = 300.0
    """The same while it loads: libraries that hold up every thread come from slow disks then."""
    stopped_s: float = 2.0
    """Stopped by a signal (SIGSTOP), while the process that watches it runs."""
    cpu_step_s: float = 600.0
    """Within one step on a CPU, where the prompt of a large model takes minutes."""
    gpu_step_s: float = 120.0
    """Within one step on a GPU; the first one compiles kernels."""

    @classmethod
    def of(cls, settings: Settings) -> "Patience":
        if not settings.step_timeout_s:
            return cls()
        return cls(cpu_step_s=settings.step_timeout_s, gpu_step_s=settings.step_timeout_s)


class ChildProcess:
    """``on_report`` is called with each message in the order sent, in the event loop; it must not block."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        context: zmq.Context[zmq.Socket[bytes]],
        commands: zmq.Socket[bytes],
        reports: zmq.Socket[bytes],
        folder: ScratchFolder,
        on_report: Callable[[wire.Report], None],
        patience: Patience,
    ) -> None:
        self._process = process
        self._context = context
        self._commands = commands
        self._reports = reports
        self._folder = folder
        self._on_report = on_report
        self._patience = patience
        self._step_limit_s = patience.cpu_step_s
        self._loading = False
        self._loaded = False
        self._beating = False
        self._reports_read = 0
        self._killed = False
        self._closed = False
        self._watchdog = asyncio.create_task(self._watch(), name="engine watchdog")
        # The descriptor says "look again", not "here is a message": always read until there is none.
        asyncio.get_running_loop().add_reader(reports.fileno(), self._read)
        asyncio.get_running_loop().call_soon(self._read)

    @classmethod
    async def spawn(
        cls, on_report: Callable[[wire.Report], None], *, factory: str | None, patience: Patience
    ) -> "ChildProcess":
        """Starts the process; it says ``Hello`` once it is up. Raises OSError."""
        check_open_files(FILES_TO_START)
        folder = ScratchFolder("sockets")
        context = zmq.Context[zmq.Socket[bytes]]()
        try:
            commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
            # What is under way to the engine is bounded by the requests in flight: sending must never block the loop.
            commands.set_hwm(0)
            reports.bind(f"ipc://{folder.path}/reports")
            arguments = ["--commands", f"ipc://{folder.path}/commands", "--reports", f"ipc://{folder.path}/reports"]
            arguments += ["--parent", str(os.getpid())]
            if factory is not None:
                arguments += ["--factory", factory]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: what lies in the current folder is no module of ours.
                *("-P", "-m", "sightline_server.engine.worker", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                # Libraries print there what belongs into a log.
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else asyncio.subprocess.DEVNULL,
                env=ENGINE_ENVIRONMENT
                | {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)},
            )
        except BaseException as error:
            context.destroy(linger=0)
            folder.remove()
            if isinstance(error, zmq.ZMQError):
                raise OSError(error.errno, error.strerror) from error
            raise
        return cls(process, context, commands, reports, folder, on_report, patience)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: wire.Command) -> None:
        self._send(wire.encode(command))

    def send_pixels(self, request_id: str, digest: bytes, pixels: Pixels) -> None:
        self._send(*wire.encode_pixels(request_id, digest, pixels))

    def kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """Asks the process to exit and kills it when it hasn't after ``grace_s``; one that is loading is killed."""
        if not self._loaded:
            self.kill()
        self.send(wire.Stop())
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()

    async def died(self) -> str:
        """Returns once the process is gone and its last words are delivered; says how it ended."""
        status = await self._process.wait()
        read_before = -1
        while read_before != self._reports_read:
            read_before = self._reports_read
            await asyncio.sleep(0.05)
        self._close()
        if self._killed:
            return "was hung and was killed"
        if status < 0:
            return f"was killed by {_signal_name(-status)}"
        return f"ended with status {status}"

    def _send(self, *frames: bytes | memoryview) -> None:
        # A process that is gone takes nothing more; its requests end when its death is noticed.
        if not self._closed:
            with contextlib.suppress(zmq.Again):
                self._commands.send_multipart(frames, zmq.NOBLOCK, copy=True)

    def _read(self) -> None:
        while not self._closed:
            try:
                frame = self._reports.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._reports_read += 1
            try:
                report = wire.decode_report(frame)
            except wire.WireError:
                log.exception("The engine process is killed.")
                self.kill()
                return
            self._note(report)
            self._on_report(report)

    def _note(self, report: wire.Report) -> None:
        match report:
            case wire.Hello():
                # The side that connects may send at once. One that binds loses what it sends before its peer is
                # there, and a Hello that came over the other socket doesn't say that it is.
                self._commands.connect(f"ipc://{self._folder.path}/commands")
            case wire.Progress():
                self._loading = True
            case wire.Ready(info):
                self._loading = self._loaded = True
                self._step_limit_s = self._patience.gpu_step_s if info.on_gpu else self._patience.cpu_step_s
            case wire.Heartbeat(step_seconds):
                self._beating = True
                if step_seconds > self._step_limit_s:
                    log.error("The engine has been in one step for %.0f s; its process is killed.", step_seconds)
                    self.kill()
        if self._loading and self._beating:
            # All connections stand: nobody else can make one any more, and nothing is left to clean up.
            self._folder.remove()

    async def _watch(self) -> None:
        """Kills a process that says nothing, or is stopped.

        Both are counted in naps of this loop, not in time gone by: when this process was held up itself (a laptop
        asleep, Ctrl-Z), it must first look at what has come meanwhile.
        """
        patience = self._patience
        nap_s = min(1.0, patience.silence_s / 4, patience.stopped_s / 4)
        silent_s = stopped_s = 0.0
        while silent_s < (patience.silence_s if self._loaded else patience.loading_silence_s):
            if stopped_s >= patience.stopped_s:
                log.error("The engine process has been stopped by a signal for %.0f s; it is killed.", stopped_s)
                break
            read_before = self._reports_read
            await asyncio.sleep(nap_s)
            silent_s = 0.0 if self._reports_read != read_before else silent_s + nap_s
            stopped_s = stopped_s + nap_s if silent_s and is_stopped(self.pid) else 0.0
        else:
            log.error("The engine process has been silent for %.0f s; it is killed.", silent_s)
        self.kill()

    def _close(self) -> None:
        self._closed = True
        self._watchdog.cancel()
        asyncio.get_running_loop().remove_reader(self._reports.fileno())
        self._context.destroy(linger=0)
        self._folder.remove()


def check_open_files(count: int) -> None:
    """Raises OSError when ``count`` more files can't be opened. To be asked before libraries that don't say so: ZeroMQ
    ends the whole process, uvloop finds no words."""
    opened = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for number in opened:
            os.close(number)


def advice(how: str) -> str:
    """What an operator may do about a process that ended so; empty when nothing is known."""
    if os.strerror(errno.EMFILE) in how or os.strerror(errno.ENFILE) in how:
        return " Allow this server more open files (ulimit -n), or fewer connections."
    if os.strerror(errno.ENOSPC) in how:
        return f" Free some room in {tempfile.gettempdir()}, or give another folder as TMPDIR."
    if "SIGKILL" in how:
        return " A process killed so has often run out of memory: the system's log says, and a smaller cache may help."
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
