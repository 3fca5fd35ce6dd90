"""Decodes images in worker processes and remembers which files it has seen.

Knows processes, pipes and deadlines, and what `decode_worker.py` says on them. Knows no picture formats, no requests.
A hostile file ends at most the worker that decodes it: the worker is replaced, and the file is tried once more, unless
it took too long, and then refused. A file seen before is known by its bytes and not decoded again until someone asks
for its pixels.
"""

import asyncio
import functools
import hashlib
import json
import logging
import os
import signal
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from sightline_models.images import ImageError, Pixels, PreprocessConfig
from sightline_server.chat.decode_worker import ANSWER, DECODED, REFUSED
from sightline_server.confined.process import JOB, command, environment, is_stopped
from sightline_server.engine.child import check_open_files
from sightline_server.errors import ServerFault, Unavailable

log = logging.getLogger(__name__)

MEMO_ENTRIES = 8192
_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 1.0
_ATTEMPTS = 2
# By the clock, for each second of processor time: the machine may be busy with other things.
_PATIENCE = 4
# How often a worker that is at work is looked at: a signal may have stopped it.
_LOOK_S = 0.5
_RETRY_S = 5.0
_FILES_TO_START = 12
# Hashing this much takes about a millisecond; more is done off the event loop.
_HASH_INLINE = 1 << 20


@dataclass
class ImageHandle:
    """One image of one request. It keeps the encoded bytes for as long as the request may need the pixels again."""

    digest: bytes
    """Identity of the prepared pixels (see ``PreparedImage.digest``)."""
    num_tokens: int
    pixels_count: int
    """Width times height of the decoded original."""
    data: bytes = field(repr=False)
    prepared: Pixels | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Decoded:
    digest: bytes
    num_tokens: int
    pixels_count: int
    pixels: Pixels


@dataclass(frozen=True)
class _Facts:
    digest: bytes
    num_tokens: int
    pixels_count: int


class _WorkerLost(Exception):
    """The worker ended before it answered."""


class _TooSlow(Exception):
    """The worker had to be ended: its time was up. Once more would be as much in vain."""


class _Worker:
    """One process and its pipes; does one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._jobs = process.stdin
        self._answers = process.stdout

    @classmethod
    async def start(cls, options: str) -> "_Worker":
        try:
            check_open_files(_FILES_TO_START)
            process = await asyncio.create_subprocess_exec(
                *command("sightline_server.chat.decode_worker", options),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment(),
            )
        except OSError as error:
            log.error("An image decoder could not be started: %s.", error.strerror or error)
            raise Unavailable(
                "The server can't start an image decoder right now; its log says why. Try again later.",
                retry_after_s=_RETRY_S,
            ) from None
        worker = cls(process)
        try:
            await asyncio.wait_for(worker._answers.readexactly(ANSWER.size), _START_TIMEOUT_S)
        except BaseException as error:
            await worker.end()
            if isinstance(error, asyncio.IncompleteReadError | TimeoutError):
                raise ServerFault("An image decoder could not be started; the server's log says why.") from None
            raise
        return worker

    async def decode(self, data: bytes) -> _Decoded:
        """Raises ImageError for a refused image, _WorkerLost when the process ended."""
        if self._jobs.is_closing():
            # It ended while it had nothing to do; uvloop would not take the write.
            raise _WorkerLost
        try:
            self._jobs.write(JOB.pack(len(data)))
            self._jobs.write(data)
            await self._jobs.drain()
            header = await self._answers.readexactly(ANSWER.size)
            status, height, width, num_tokens, pixels_count, digest = ANSWER.unpack(header)
            if status == REFUSED:
                text = (await self._answers.readexactly(height + width)).decode()
                raise ImageError(text[:height], text[height:])
            if status != DECODED:
                raise _WorkerLost
            raw = await self._answers.readexactly(height * width * 3)
        except (OSError, asyncio.IncompleteReadError):
            raise _WorkerLost from None
        pixels: Pixels = np.frombuffer(raw, dtype=np.uint8).reshape(height, width, 3)
        return _Decoded(digest, num_tokens, pixels_count, pixels)

    async def exit_status(self) -> int | None:
        """How a process that was lost has ended; None when it hasn't."""
        # Killing it first would race with the notice of how it ended by itself.
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.process.wait(), _END_TIMEOUT_S)
        return None

    async def end(self) -> None:
        """Ends the process at once and frees its pipes."""
        if self.process.returncode is None:
            self.process.kill()
        self._jobs.close()
        await self.process.wait()
        # What is left in the pipe must be read for asyncio to close it.
        while await self._answers.read(1 << 16):
            pass


class DecodePool:
    """``workers`` processes that decode images, each within ``timeout_s`` seconds of processor time and ``memory_mb``
    MiB of address space, for pictures of at most ``max_pixels`` pixels."""

    def __init__(
        self, preprocess: PreprocessConfig, *, workers: int, timeout_s: float, memory_mb: int, max_pixels: int
    ) -> None:
        self.decoded_total = 0
        """Images decoded so far; a file known from before doesn't count."""
        self._preprocess = preprocess
        self._size = workers
        self._timeout_s = timeout_s
        self._options = json.dumps(
            {
                "preprocess": preprocess.to_json(),
                "timeout_s": timeout_s,
                "memory_mb": memory_mb,
                "max_pixels": max_pixels,
                "parent": os.getpid(),
            }
        )
        self._memo: OrderedDict[bytes, _Facts] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[_Decoded]] = {}
        self._waiters: Counter[bytes] = Counter()
        self._at_work: set[bytes] = set()
        self._workers: set[_Worker] = set()
        # None stands for a worker that has to be started first.
        self._idle: asyncio.LifoQueue[_Worker | None] = asyncio.LifoQueue()
        self._closed = False

    async def start(self) -> None:
        """Starts all workers. Raises ServerFault or Unavailable when they don't start."""
        try:
            await asyncio.gather(*(self._add_worker() for _ in range(self._size)))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends all workers; jobs that run fail. Leaves no process and no open pipe."""
        self._closed = True
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()

    def worker_pids(self) -> list[int]:
        return sorted(worker.process.pid for worker in self._workers)

    async def read(self, data: bytes, *, salt: bytes = b"") -> ImageHandle:
        """The identity and size of an encoded image. Raises ImageError, or ServerFault for a failure of our own.

        Different salts never learn from each other whether a file was seen before.
        """
        key = await self._key(data, salt)
        facts = self._memo.get(key)
        if facts is not None:
            self._memo.move_to_end(key)
            return ImageHandle(facts.digest, facts.num_tokens, facts.pixels_count, data)
        made = await self._decode_once(key, data)
        self._memo[key] = _Facts(made.digest, made.num_tokens, made.pixels_count)
        if len(self._memo) > MEMO_ENTRIES:
            self._memo.popitem(last=False)
        return ImageHandle(made.digest, made.num_tokens, made.pixels_count, data, made.pixels)

    async def pixels(self, handle: ImageHandle) -> Pixels:
        """The prepared pixels, uint8 [H, W, 3]; decodes the file again when only its identity was remembered."""
        if handle.prepared is None:
            key = await self._key(handle.data, b"")
            handle.prepared = (await self._decode_once(key, handle.data)).pixels
        return handle.prepared

    async def _key(self, data: bytes, salt: bytes) -> bytes:
        def digest() -> bytes:
            state = hashlib.sha256(self._preprocess.digest + hashlib.sha256(salt).digest())
            state.update(data)
            return state.digest()

        return digest() if len(data) <= _HASH_INLINE else await asyncio.to_thread(digest)

    async def _decode_once(self, key: bytes, data: bytes) -> _Decoded:
        """Decodes, or joins the decoding of the same file that is under way."""
        if self._closed:
            raise ServerFault("The image decoders have been stopped.")
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._decode(key, data))
            self._running[key] = task
            task.add_done_callback(functools.partial(self._finished, key))
        # Shielded: one caller that leaves must not fail the others that wait for the same file.
        self._waiters[key] += 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._closed and task.cancelled():
                raise ServerFault("The image decoders have been stopped.") from None
            raise
        finally:
            self._waiters[key] -= 1
            if not self._waiters[key]:
                del self._waiters[key]
                if key not in self._at_work:
                    # The last one left: others' pictures need not wait for it. Nobody may join it any more.
                    task.cancel()
                    self._forget(key, task)

    def _finished(self, key: bytes, task: asyncio.Task[_Decoded]) -> None:
        self._forget(key, task)
        if not task.cancelled():
            # Every caller may have left: an exception that nobody looks at would be logged as forgotten.
            task.exception()

    def _forget(self, key: bytes, task: asyncio.Task[_Decoded]) -> None:
        if self._running.get(key) is task:
            del self._running[key]

    async def _decode(self, key: bytes, data: bytes) -> _Decoded:
        for _ in range(_ATTEMPTS):
            try:
                made = await self._attempt(key, data)
            except _WorkerLost:
                continue
            except _TooSlow:
                break
            self.decoded_total += 1
            return made
        raise ImageError(
            "image_parse_error",
            "The image can't be decoded within this server's limits of time and memory. Scale it down or save it anew.",
        )

    async def _attempt(self, key: bytes, data: bytes) -> _Decoded:
        worker = await self._idle.get()
        self._at_work.add(key)
        healthy = False
        try:
            worker = worker or await self._start_worker()
            async with asyncio.timeout(self._timeout_s * _PATIENCE):
                made = await _unless_stopped(worker, asyncio.create_task(worker.decode(data)))
            healthy = True
            return made
        except ImageError:
            healthy = True
            raise
        except TimeoutError:
            raise _TooSlow from None
        except _WorkerLost:
            assert worker is not None, "what was lost had been started"
            if await worker.exit_status() == -signal.SIGXCPU:
                raise _TooSlow from None
            raise
        finally:
            self._at_work.discard(key)
            if worker is not None and not healthy:
                self._workers.discard(worker)
                await worker.end()
            self._idle.put_nowait(worker if healthy else None)

    async def _add_worker(self) -> None:
        self._idle.put_nowait(await self._start_worker())

    async def _start_worker(self) -> _Worker:
        worker = await _Worker.start(self._options)
        self._workers.add(worker)
        return worker


async def _unless_stopped(worker: _Worker, decoding: asyncio.Task[_Decoded]) -> _Decoded:
    """The result of ``decoding``. Raises _WorkerLost when a signal has stopped the worker's process."""
    try:
        while not decoding.done():
            await asyncio.wait([decoding], timeout=_LOOK_S)
            if not decoding.done() and is_stopped(worker.process.pid):
                raise _WorkerLost
        return decoding.result()
    finally:
        decoding.cancel()
