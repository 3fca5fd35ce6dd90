"""One connection: uvicorn's protocol with the deadlines and bounds that it lacks, and errors as the API's error object.

uvicorn parses (llhttp, strict), runs the application and writes. This counts what comes before the application sees
it, watches the clock, and says no. It knows no route, no key and nothing of what a body holds.
"""

import asyncio
import json
import time
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Any, NoReturn
from uuid import uuid4

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sightline_server.errors import ApiError, HeadersTooLarge, InvalidRequest, RequestTimeout, UrlTooLong
from sightline_server.http.door import Door
from sightline_server.http.heads import head_refusal, unreadable
from sightline_server.http.limits import FRAMING_SLACK, LINGER_BYTES, LINGER_S, MAX_HEADERS, MAX_URL, HttpLimits
from sightline_server.logs import RequestRecord, log_request

_OF_UPGRADES = (b"connection", b"upgrade", b"http2-settings")


class _Stage(Enum):
    IDLE = auto()
    """Nothing of a request has come yet."""
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    """The request is complete, its answer isn't."""
    REFUSED = auto()
    """Answered by this file; what still comes is dropped."""


class _Stop(Exception):
    """Leaves the parser."""


class HttpProtocol(HttpToolsProtocol):
    def __init__(self, *, limits: HttpLimits, door: Door, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._door = door
        self._stage = _Stage.IDLE
        self._deaf = False
        """Whether the rest of the input is dropped, as a request was sent before the last one was answered."""
        self._started = time.perf_counter()
        self._first = b""
        self._head_bytes = 0
        self._raw_bytes = 0
        self._body_bytes = 0
        self._refusal: ApiError | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._leave_door: Callable[[], None] = lambda: None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        refusal = self._door.enter(self._address)
        if refusal is None:
            self._leave_door = partial(self._door.leave, self._address)
            self._within(self._limits.header_s)
        elif self._door.may_tell():
            self._leave_door = self._door.told
            self._refuse(refusal)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_door()
        self._within(None)
        # Until it fires it would keep what this connection has read.
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unset_stall()
        super().connection_lost(exc)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    # What comes

    def data_received(self, data: bytes) -> None:
        if self._stage is _Stage.REFUSED or self._deaf:
            self._drop(len(data))
            return
        if self._stage is _Stage.BODY:
            self._raw_bytes += len(data)
        in_head = self._stage in (_Stage.IDLE, _Stage.HEAD)
        if in_head and len(self._first) < 16:
            self._first += data[:16]
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._pass_over_upgrade(data[int(upgrade.args[0]) :])
        except httptools.HttpParserError:
            if not self._deaf:
                self._refuse(self._refusal or unreadable(self._first))
            return
        if in_head and self._stage is _Stage.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes:
                self._refuse(self._head_too_large())
        elif self._stage is _Stage.BODY and self._raw_bytes > 2 * self._body_bytes + FRAMING_SLACK:
            self._refuse(InvalidRequest("The body has more chunk framing than content.", code="invalid_http"))

    def on_message_begin(self) -> None:
        if self._unanswered:
            self._turn_deaf()
            raise _Stop
        super().on_message_begin()
        self._stage = _Stage.HEAD
        self._started = time.perf_counter()
        self._head_bytes = 0
        self._within(self._limits.header_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL:
            self._stop(UrlTooLong(f"The URL is longer than {MAX_URL} bytes. Send what is long in the body."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is not _Stage.HEAD:
            # Trailers: they come when the headers have been believed already.
            return
        if len(self.headers) >= MAX_HEADERS:
            self._stop(HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers. Send fewer."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes:
            self._stop(self._head_too_large())
        method, version = self.parser.get_method().decode("ascii"), self.parser.get_http_version()
        refusal = head_refusal(method, version, self.url, self.headers)
        if refusal is not None:
            self._stop(refusal)
        if self.parser.should_upgrade():
            return
        self._stage = _Stage.BODY
        self._raw_bytes = self._body_bytes = 0
        self._within(self._limits.body_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._stage = _Stage.ANSWER if self._unanswered else _Stage.IDLE
        self._within(None if self._unanswered else self._limits.idle_s)

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Read the request, which offers another protocol, as one that doesn't: the parser would lose its body."""
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in _OF_UPGRADES]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]) + rest)

    def _stop(self, refusal: ApiError) -> NoReturn:
        self._refusal = refusal
        raise _Stop

    def _head_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"The request's headers have more than {self._limits.header_bytes} bytes. Send fewer.")

    def _turn_deaf(self) -> None:
        """The next request must wait for this one's answer; it didn't, so it isn't read and the connection ends."""
        self._deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False
            if not self._unanswered:
                self.transport.close()

    def _drop(self, size: int) -> None:
        self._raw_bytes += size
        if self._raw_bytes > LINGER_BYTES and self._stage is _Stage.REFUSED:
            self.transport.abort()

    # What goes

    @property
    def _unanswered(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Its own timer would be undone by any byte, also by one that begins no request.
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            self._within(self._limits.stall_s)
        elif self._stage is _Stage.ANSWER:
            self._stage = _Stage.IDLE
            self._within(self._limits.idle_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset_stall()

    def _unset_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and end the connection once the client had time to read it."""
        if self._stage is _Stage.REFUSED:
            return
        self._stage = _Stage.REFUSED
        self._raw_bytes = 0
        if self._unanswered:
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if begun:
                self.transport.abort()
                return
        record = RequestRecord(f"req_{uuid4().hex}", "-", "-", self._started, status=error.status)
        record.fail(error)
        self.transport.write(_answer(error, record.request_id, self.server_state.default_headers))
        log_request(record, time.perf_counter() - self._started)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._within(LINGER_S)

    # The clock

    def _within(self, seconds: float | None) -> None:
        """The connection must get on within ``seconds`` from now; None: it may take its time."""
        if seconds is None:
            self._deadline = None
            return
        self._deadline = self.loop.time() + seconds
        # A timer that is due before the deadline looks again; cancelling one a request would cost more.
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._deadline > self.loop.time():
            self._timer = self.loop.call_at(self._deadline, self._look)
        elif self._stage is _Stage.HEAD:
            self._refuse(RequestTimeout(f"The headers did not arrive within {self._limits.header_s:g} seconds."))
        elif self._stage in (_Stage.IDLE, _Stage.REFUSED) and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()


def _answer(error: ApiError, request_id: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    body = json.dumps(error.body(), separators=(",", ":")).encode()
    lines = [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += [(b"x-request-id", request_id.encode()), (b"connection", b"close")]
    lines += [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    return STATUS_LINE[error.status] + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n" + body
