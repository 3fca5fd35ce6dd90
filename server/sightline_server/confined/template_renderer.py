"""A chat template that is compiled and rendered in confined processes, each killed when it takes too long.

Knows processes, pipes and deadlines, and what ``template_worker.py`` says on them. Knows no Jinja. Nothing that comes
back is believed to have the size or the form it should.
"""

import json
import logging
import os
import queue
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sightline_models.chat_template import Message, Span, TextPart, TokenizerError, output_limit
from sightline_server.confined import process
from sightline_server.confined.template_wire import ANSWER, DONE, MAX_SENTENCE, REFUSED
from sightline_server.errors import Unavailable

log = logging.getLogger(__name__)

CPU_S = 4.0
"""Of processor time that a template may take to be compiled and tried, or to be rendered once, to the next second."""
RENDER_S = 10.0
"""Of time that a rendering may take, on a machine however busy."""
_START_S = 30.0
_MEMORY_MB = 512
# One for each thread that makes prompts.
_PROCESSES = 2
_ATTEMPTS = 2
_RETRY_S = 5.0
# How often a process that is late is looked at: a signal may have stopped it.
_LOOK_S = 0.5
# A span of one character takes this many at most, written as JSON.
_BYTES_PER_CHARACTER = 24


class _LostError(Exception):
    """The process ended before it answered, or answered nonsense."""


class _TooSlowError(Exception):
    """The process had no more time."""


class _Child:
    """One process and its pipes; does one job at a time."""

    def __init__(self) -> None:
        options = {"parent": os.getpid(), "memory_mb": _MEMORY_MB, "cpu_s": CPU_S}
        try:
            self.process = subprocess.Popen(
                process.command("sightline_server.confined.template_worker", json.dumps(options)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=process.environment(),
                bufsize=0,
            )
        except OSError as error:
            log.error("A process that renders the chat template could not be started: %s.", error.strerror or error)
            raise Unavailable(
                "The server can't render its chat template right now; its log says why. Try again later.",
                retry_after_s=_RETRY_S,
            ) from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._jobs, self._answers = self.process.stdin, self.process.stdout
        for pipe in (self._jobs, self._answers):
            os.set_blocking(pipe.fileno(), False)

    def ask(self, job: Any, *, within_s: float, most: int) -> Any:
        """The answer to ``job``, of at most ``most`` bytes. Raises TokenizerError for a refusal, and the two above."""
        deadline = time.monotonic() + within_s
        data = json.dumps(job).encode()
        self._write(process.JOB.pack(len(data)) + data, deadline)
        status, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if status not in (DONE, REFUSED) or length > most:
            raise _LostError
        try:
            answer = json.loads(self._read(length, deadline))
        except (ValueError, RecursionError):
            raise _LostError from None
        if status == REFUSED:
            raise TokenizerError(str(answer)[:MAX_SENTENCE])
        return answer

    def end(self) -> int:
        """Ends the process at once and frees its pipes; its exit status."""
        self.process.kill()
        self._jobs.close()
        self._answers.close()
        return self.process.wait()

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            self._wait(self._jobs.fileno(), select.POLLOUT, deadline)
            try:
                left = left[os.write(self._jobs.fileno(), left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _LostError from None

    def _read(self, length: int, deadline: float) -> bytes:
        chunks = []
        while length:
            self._wait(self._answers.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._answers.fileno(), min(length, 1 << 20))
            if not chunk:
                raise _LostError
            chunks.append(chunk)
            length -= len(chunk)
        return b"".join(chunks)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while (left_s := deadline - time.monotonic()) > 0:
            if poll.poll(min(_LOOK_S, left_s) * 1000):
                return
            if process.is_stopped(self.process.pid):
                raise _LostError
        raise _TooSlowError


class TemplateRenderer:
    """Renders as ``ChatTemplate`` does, whose arguments it takes, and safe to use from several threads.

    Its processes end with this object. Raises TokenizerError for a template that can't be used, or not within the
    limits of time, memory and output.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], image_token: str, control_tokens: Collection[str]
    ) -> None:
        self._template = {
            "source": source,
            "special_tokens": dict(special_tokens),
            "image_token": image_token,
            "control_tokens": sorted(control_tokens),
        }
        self._children: set[_Child] = set()
        # None stands for a process that has to be started again.
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        weakref.finalize(self, _end_all, self._children)
        try:
            for _ in range(_PROCESSES):
                self._idle.put(self._start())
        except (_LostError, _TooSlowError, Unavailable):
            raise TokenizerError(
                f"The chat template can't be compiled and tried within {CPU_S:g} seconds and {_MEMORY_MB} MiB. "
                "Give another one with --chat-template."
            ) from None

    def render(self, messages: Sequence[Message]) -> tuple[Span, ...]:
        """As ``ChatTemplate.render``; raises TokenizerError, too, where rendering takes too much time or memory."""
        limit = output_limit(messages)
        job = {
            "now": datetime.now().isoformat(),
            "messages": [
                (message.role, [part.text if isinstance(part, TextPart) else None for part in message.parts])
                for message in messages
            ],
        }
        for _ in range(_ATTEMPTS):
            try:
                spans = _spans(self._ask(job, most=limit * _BYTES_PER_CHARACTER))
            except _LostError:
                continue
            except _TooSlowError:
                break
            if sum(len(span.text) for span in spans) > limit:
                break
            return spans
        raise TokenizerError(
            "The chat template can't render these messages within this server's limits of time and memory. Send fewer "
            "or shorter messages, or serve the model with another --chat-template."
        )

    def process_ids(self) -> list[int]:
        return sorted(child.process.pid for child in self._children)

    def _ask(self, job: Any, *, most: int) -> Any:
        child = self._idle.get()
        keep = None
        try:
            if child is not None and child.process.poll() is not None:
                self._end(child)
                child = None
            child = child or self._start()
            try:
                answer = child.ask(job, within_s=RENDER_S, most=most)
            except TokenizerError:
                keep = child
                raise
            except BaseException as error:
                # The kernel ends a process that has used up its processor time; once more would be as much in vain.
                if self._end(child) == -signal.SIGXCPU and isinstance(error, _LostError):
                    raise _TooSlowError from None
                raise
            keep = child
            return answer
        finally:
            self._idle.put(keep)

    def _start(self) -> _Child:
        child = _Child()
        self._children.add(child)
        try:
            child.ask(self._template, within_s=_START_S, most=6 * MAX_SENTENCE + 2)
        except BaseException:
            self._end(child)
            raise
        return child

    def _end(self, child: _Child) -> int:
        self._children.discard(child)
        status = child.end()
        log.warning("A process that renders the chat template was ended (status %d).", status)
        return status


def _spans(answer: Any) -> tuple[Span, ...]:
    try:
        pairs = [(text, by_user) for text, by_user in answer]
    except (TypeError, ValueError):
        raise _LostError from None
    if not all(type(text) is str and type(by_user) is bool for text, by_user in pairs):
        raise _LostError
    return tuple(Span(text, by_user) for text, by_user in pairs)


def _end_all(children: set[_Child]) -> None:
    for child in children:
        child.end()
