"""One HTTP request's choices on their way through the engine: submitted together, read as one, ended together.

Knows engine events and the text made of them. Knows no HTTP and no wire format.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from sightline_server.chat.deltas import ChoiceText, TextDelta
from sightline_server.engine.client import EngineClient, PixelSource
from sightline_server.engine.types import FinishEvent, FinishReason, Request, TokenEvent, Usage
from sightline_server.errors import ApiError, InvalidRequest, ServerFault, Unavailable
from sightline_server.logs import frames
from sightline_server.metrics import Timeline

log = logging.getLogger(__name__)

ABORT_GRACE_S = 2.0
"""How long an aborted choice may take to tell its usage before it is left alone."""
_EVENTS_AT_ONCE = 32

_Arrival = TokenEvent | FinishEvent | ApiError


@dataclass
class _Choice:
    request: Request
    text: ChoiceText
    pump: asyncio.Task[None] | None = None
    usage: Usage | None = None


class Generation:
    """Start it, take what arrives until nothing does, close it. ``close`` may be called at any time, also twice."""

    def __init__(
        self,
        engine: EngineClient,
        requests: Sequence[Request],
        texts: Sequence[ChoiceText],
        pixels: PixelSource,
        timeline: Timeline,
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._pixels = pixels
        self._timeline = timeline
        self._on_first_token = on_first_token
        self.begun = False
        """Whether there has been a token."""
        self._choices = [_Choice(request, text) for request, text in zip(requests, texts, strict=True)]
        self._inbox: deque[tuple[int, _Arrival]] = deque()
        self._news = asyncio.Event()
        self._running = len(self._choices)

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def finished(self) -> bool:
        """Whether every choice's text is complete."""
        return all(choice.text.finished for choice in self._choices)

    def start(self) -> None:
        for index, choice in enumerate(self._choices):
            choice.pump = asyncio.create_task(self._pump(index, choice.request), name=choice.request.id)

    def close(self) -> None:
        """End what still runs; the engine frees its slots at once. Never waits, so it is safe while being cancelled."""
        for choice in self._choices:
            if choice.pump is not None:
                choice.pump.cancel()

    def fail(self, error: ApiError) -> None:
        """End every choice that still runs with ``error``, as if the engine had said so."""
        for index in range(len(self._choices)):
            self._put(index, error)

    async def admitted(self, timeout_s: float | None) -> None:
        """Wait for the first sign of life, so that a refusal can still be an HTTP status; ``timeout_s`` is patience.

        Raises the ApiError that the engine answered with.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return
        for _, arrival in self._inbox:
            if (error := _error_of(arrival)) is not None:
                raise error

    async def arrivals(self, timeout_s: float | None = None) -> dict[int, TextDelta]:
        """The next text of each choice that has some; empty when all have ended.

        Raises TimeoutError after ``timeout_s`` without any, and the ApiError that ended a choice.
        """
        made: dict[int, TextDelta] = {}
        async with asyncio.timeout(timeout_s):
            while True:
                for _ in range(min(_EVENTS_AT_ONCE, len(self._inbox))):
                    index, arrival = self._inbox.popleft()
                    delta = self._take(self._choices[index], arrival)
                    if delta:
                        made[index] = made[index] + delta if index in made else delta
                if made or (self._running == 0 and not self._inbox):
                    return made
                if not self._inbox:
                    self._news.clear()
                    await self._news.wait()

    def usage(self) -> Usage:
        """All choices together; the prompt, which they share, counts once. Complete when ``arrivals`` has ended."""
        first = self._choices[0]
        return Usage(
            prompt_tokens=len(first.request.prompt.token_ids),
            completion_tokens=sum(_sampled(choice) for choice in self._choices),
            cached_tokens=first.usage.cached_tokens if first.usage else 0,
            image_tokens=first.request.prompt.num_image_tokens,
        )

    async def _pump(self, index: int, request: Request) -> None:
        try:
            async with aclosing(self._engine.submit(request, self._pixels)) as events:
                async for event in events:
                    if isinstance(event, TokenEvent):
                        self._timeline.token(index)
                        self._note_first_token()
                    self._put(index, event)
        except ApiError as error:
            self._put(index, error)
        except Exception as error:
            log.error("Request %s failed between the API and the engine.\n%s", request.id, frames(error))
            self._put(index, ServerFault("The server failed on this request. Its log says more."))
        finally:
            self._running -= 1
            self._news.set()

    def _note_first_token(self) -> None:
        if not self.begun:
            self.begun = True
            self._on_first_token()

    def _put(self, index: int, arrival: _Arrival) -> None:
        self._inbox.append((index, arrival))
        self._news.set()

    def _take(self, choice: _Choice, arrival: _Arrival) -> TextDelta | None:
        if isinstance(arrival, FinishEvent):
            choice.usage = arrival.usage
        if choice.text.finished:
            # The engine was on its way while the stop string was found.
            return None
        error = _error_of(arrival)
        if error is not None:
            raise error
        if isinstance(arrival, FinishEvent):
            return choice.text.end(arrival.reason)
        assert isinstance(arrival, TokenEvent), arrival
        delta = choice.text.push(arrival)
        if delta.finish is not None:
            self._stop(choice)
        return delta

    def _stop(self, choice: _Choice) -> None:
        """End a choice whose text is complete, but hear its FinishEvent, which alone knows about the cache."""
        assert choice.pump is not None, "a choice that was not started has no tokens"
        self._engine.abort(choice.request.id)
        asyncio.get_running_loop().call_later(ABORT_GRACE_S, choice.pump.cancel)


def _sampled(choice: _Choice) -> int:
    if choice.usage is None or choice.usage.completion_tokens < choice.text.num_tokens:
        return choice.text.num_tokens
    # After a stop string the engine may have sampled on; after a stop token it has sampled one that isn't shown.
    return choice.text.num_tokens if choice.text.stopped else choice.usage.completion_tokens


def _error_of(arrival: _Arrival) -> ApiError | None:
    if isinstance(arrival, ApiError):
        return arrival
    if isinstance(arrival, TokenEvent):
        return None
    if arrival.reason is FinishReason.ABORTED:
        return Unavailable(
            "The server ended this request while shutting down. Send it again when it is back.",
            code="server_shutting_down",
            retry_after_s=5.0,
        )
    return engine_failure(arrival) if arrival.reason is FinishReason.ERROR else None


def engine_failure(event: FinishEvent) -> ApiError:
    """The public error for what the engine calls a failure."""
    message = event.error_message
    match event.error_code:
        case "engine_restarting":
            return Unavailable(
                message or "The engine is restarting. Send the request again shortly.",
                code="engine_restarting",
                retry_after_s=5.0,
            )
        case "server_shutting_down":
            return Unavailable(
                message or "The server is shutting down. Send the request again when it is back.",
                code="server_shutting_down",
                retry_after_s=5.0,
            )
        case "request_crashed_engine":
            return Unavailable(
                message or "The engine stopped each time it worked on this request. Change it.",
                code="request_crashed_engine",
                should_retry=False,
            )
        case "server_is_overloaded":
            return Unavailable(message or "The queue is full. Try again later.", retry_after_s=2.0)
        case "engine_oom":
            return Unavailable(
                message or "This request needs more memory than the engine has.",
                code="engine_oom",
                should_retry=False,
            )
        case "context_length_exceeded":
            return InvalidRequest(
                message or "The prompt is longer than this model's context.",
                code="context_length_exceeded",
                param="messages",
            )
        case str(code) if "image" in code:
            return InvalidRequest(message or "An image could not be read.", code=code, param="messages")
        case _:
            return ServerFault("The engine failed on this request. The server's log says more.")
