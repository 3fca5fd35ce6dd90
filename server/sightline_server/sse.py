"""Server-sent events as OpenAI's clients read them; the only file of the server that writes ``data: `` and ``[DONE]``.

One line of data and a blank line an event, and never an ``id:``. Knows framing. Knows no field of what it frames.
"""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sightline_server.errors import ApiError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n"
"""No blank line behind it: some clients take that for an empty event."""

# Legal inside JSON strings, but line ends to clients that split text by Python's or JavaScript's idea of a line.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_TABLE = str.maketrans(_LINE_ENDS)


def encode(event: BaseModel) -> bytes:
    return _frame(event.model_dump_json(exclude_unset=True))


def encode_error(error: ApiError) -> bytes:
    """The event that ends a stream in failure; no ``[DONE]`` follows it."""
    return _frame(json.dumps(error.body(), ensure_ascii=False))


def _frame(text: str) -> bytes:
    return f"data: {text if text.isascii() else text.translate(_TABLE)}\n\n".encode()


class EventStream(StreamingResponse):
    """Sends ``events`` as they come; ``on_end`` is called whatever happens, so that it may free what makes them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, on_end: Callable[[], None]) -> None:
        # Proxies must neither keep nor collect what is meant to arrive at once.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Here and not in the generator: one that was never started runs none of its code when it is closed.
            self._on_end()

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)
