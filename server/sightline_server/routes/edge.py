"""What every request passes on its way in and out: its id, its log line, its count, the limits on its body.

Pure ASGI. Knows HTTP messages. Knows no route and no content.
"""

import asyncio
import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline_server.errors import ApiError, BodyTooLarge, RequestTimeout, Unavailable
from sightline_server.logs import RequestRecord, frames, log_request
from sightline_server.metrics import Metrics
from sightline_server.routes.failures import error_response, server_fault

log = logging.getLogger(__name__)

MIB = 2**20
LINGER_S = 5.0
"""How long the rest of a refused body is read and dropped, so that the client gets to see why."""
BODIES_RETRY_S = 5.0
WATCHING = ("health", "metrics")
"""Endpoints whose calls are no work and are not counted as such."""
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Edge:
    """Gives every request an id and every answer its ``x-request-id``; logs and counts each once, at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"], time.perf_counter())
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", record.request_id.encode()))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            record.outcome = "cancelled"
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        except Exception as error:
            # The text of an exception may quote what the user sent; where it was raised is enough to find it.
            log.error("Request %s failed unexpectedly.\n%s", record.request_id, frames(error))
            record.outcome = "failed"
            if record.status == 0:
                await error_response(server_fault())(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - record.started
            self._metrics.in_flight.dec()
            self._count(record, seconds)
            log_request(record, seconds)

    def _count(self, record: RequestRecord, seconds: float) -> None:
        outcome = record.ended_as()
        if record.endpoint not in WATCHING:
            self._metrics.requests.labels(record.endpoint, outcome).inc()
        if record.endpoint == "chat" and outcome == "completed":
            self._metrics.end_to_end.observe(seconds)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req_{uuid4().hex}"


class _BodyRefused(Exception):
    """Carries a refusal past every handler inside, to the middleware that has to close the connection."""

    def __init__(self, error: ApiError) -> None:
        self.error = error


class BodyLimits:
    """413 for a body over ``max_mb`` MiB, from its Content-Length before a byte is read; 408 when it takes too long;
    503 when the bodies of all requests that aren't answered yet would have more than ``all_mb`` MiB together."""

    def __init__(self, app: ASGIApp, max_mb: float, all_mb: float, timeout_s: float) -> None:
        self._app = app
        self._limit = int(max_mb * MIB)
        self._budget = _Budget(int(all_mb * MIB))
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limit, self._budget, self._timeout_s)
        announced = _announced_bytes(scope)
        try:
            if announced > self._limit:
                raise _BodyRefused(_too_large(announced, self._limit))
            await self._app(scope, body.receive, send)
        except _BodyRefused as refusal:
            await self._refuse(refusal.error, scope, body, send)
        finally:
            body.release()

    async def _refuse(self, error: ApiError, scope: Scope, body: "_Body", send: Send) -> None:
        """Answer at once, then read on for a moment: closing on a client in mid-sentence would reset the connection
        and lose the answer."""
        scope["state"]["record"].fail(error)
        body.release()
        response = error_response(error)
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        await body.drop(self._limit)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class _Budget:
    """Bytes of bodies that are held for requests in progress."""

    limit: int
    held: int = 0


class _Body:
    def __init__(self, receive: Receive, limit: int, budget: _Budget, timeout_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._budget = budget
        self._held = 0
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._taken = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise _BodyRefused(
                RequestTimeout(f"The request body did not arrive within {self._timeout_s:g} seconds.")
            ) from None
        self._count(message)
        if self._taken > self._limit:
            raise _BodyRefused(_too_large(self._taken, self._limit))
        self._hold(len(message.get("body", b"")))
        return message

    def _hold(self, size: int) -> None:
        self._held += size
        self._budget.held += size
        if self._budget.held > self._budget.limit:
            raise _BodyRefused(
                Unavailable(
                    "The requests in progress fill the memory for request bodies. Try again later.",
                    retry_after_s=BODIES_RETRY_S,
                )
            )

    def release(self) -> None:
        """The body is held no longer. May be called twice."""
        self._budget.held -= self._held
        self._held = 0

    async def drop(self, allowance: int) -> None:
        """Read and forget up to ``allowance`` bytes."""
        stop = self._taken + allowance
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._complete and self._taken < stop:
                    self._count(await self._receive())

    def _count(self, message: Message) -> None:
        self._taken += len(message.get("body", b""))
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)


def _announced_bytes(scope: Scope) -> int:
    """The Content-Length; 0 for a body that doesn't say."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body has at least {size} bytes; at most {limit} are allowed. Send smaller or fewer images."
    )
