"""What a server said to raw bytes, and whether it may say so. Knows HTTP/1.1 answers and the API's error object; knows
no request but for its method."""

import json
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field

STATUSES = frozenset({200, 400, 401, 403, 404, 405, 408, 413, 414, 429, 431, 503})
UNAVAILABLE = frozenset(
    {
        "engine_oom",
        "engine_restarting",
        "engine_starting",
        "queue_timeout",
        "request_crashed_engine",
        "server_is_draining",
        "server_is_overloaded",
        "server_shutting_down",
        "too_many_connections",
    }
)
_TELLTALE = re.compile(
    rb"0x[0-9a-fA-F]{6,}|Traceback|site-packages|/(?:usr|home|root|work|tmp|opt|var)/|\.py\b|Internal Server Error"
)
_ERROR_KEYS = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class RawResponse:
    status: int | None
    """None: the connection ended, or time ran out, before a status line came."""
    headers: dict[str, str] = field(default_factory=dict)
    """By lower-case name; of several, the last."""
    body: bytes = b""
    """Chunks joined."""
    complete: bool = False
    closed: bool = False
    """Whether the server closed the connection."""
    has_body: bool = True
    """False for answers to HEAD."""


def exchange(
    address: tuple[str, int], raw: bytes, *, timeout_s: float = 10.0, waits_for_close: bool = False
) -> RawResponse:
    """Send ``raw`` on a connection of its own and read one answer. Never raises for what the server does."""
    received, closed = b"", False
    is_head = raw.lstrip(b"\r\n").startswith(b"HEAD ")
    with socket.create_connection(address, timeout=timeout_s) as connection:
        with suppress(OSError):
            connection.sendall(raw)
        while True:
            response = parse(received, is_head=is_head, closed=closed)
            if closed or (response.complete and not waits_for_close):
                return response
            try:
                part = connection.recv(65536)
            except TimeoutError:
                return response
            except OSError:
                part = b""
            closed = part == b""
            received += part


def parse(raw: bytes, *, is_head: bool = False, closed: bool = False) -> RawResponse:
    """The first final answer in ``raw``; ``complete`` when all of it is there."""
    while raw.startswith(b"HTTP/1.1 100 ") and b"\r\n\r\n" in raw:
        raw = raw.partition(b"\r\n\r\n")[2]
    head, end, rest = raw.partition(b"\r\n\r\n")
    if not end or not re.match(rb"HTTP/1\.1 \d{3} ", head):
        return RawResponse(None, closed=closed, body=raw)
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if is_head:
        body, complete = b"", True
    elif headers.get("transfer-encoding") == "chunked":
        body, complete = _join_chunks(rest)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        body, complete = rest[:length], len(rest) >= length
    else:
        body, complete = rest, closed
    return RawResponse(int(lines[0][9:12]), headers, body, complete, closed, not is_head)


def _join_chunks(rest: bytes) -> tuple[bytes, bool]:
    body = b""
    while True:
        size, end, rest = rest.partition(b"\r\n")
        if not end:
            return body, False
        length = int(size, 16)
        if length == 0:
            return body, True
        body += rest[:length]
        if len(rest) < length + 2:
            return body, False
        rest = rest[length + 2 :]


def problem_with(response: RawResponse) -> str | None:
    """What is wrong with an answer, whatever was asked; None if nothing is."""
    if response.status is None:
        return f"no status line, but {response.body[:80]!r}"
    if response.status not in STATUSES:
        return f"status {response.status}: {response.body[:200]!r}"
    if not response.complete:
        return f"status {response.status}, and the body ends early: {response.body[-80:]!r}"
    if not response.has_body:
        return None
    if (found := _TELLTALE.search(response.body)) is not None:
        return f"the body tells of the inside: {found[0]!r}"
    kind = response.headers.get("content-type", "")
    if response.status >= 400:
        return _problem_with_error(response, kind)
    if kind.startswith("text/event-stream"):
        return _problem_with_stream(response.body)
    if kind.startswith("application/json"):
        return _problem_with_json(response.body)
    return None if kind.startswith("text/plain") else f"a 200 of type {kind!r}"


def _problem_with_error(response: RawResponse, kind: str) -> str | None:
    if kind != "application/json":
        return f"an error of type {kind!r}"
    if "x-request-id" not in response.headers:
        return "an error without x-request-id"
    try:
        body = json.loads(response.body)
    except ValueError:
        return f"an error that is no JSON: {response.body[:80]!r}"
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or set(error) != _ERROR_KEYS:
        return None if _is_status(body) else f"not the error object: {response.body[:200]!r}"
    if not isinstance(error["message"], str) or not 0 < len(error["message"]) <= 1000:
        return f"the message of an error has {len(str(error['message']))} characters"
    if response.status == 503 and error["code"] not in UNAVAILABLE:
        return f"503 for the reason {error['code']!r}"
    return None


def _is_status(body: object) -> bool:
    """What /ready says while it isn't."""
    return isinstance(body, dict) and set(body) == {"status"}


def _problem_with_json(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return f"a 200 that is no JSON: {body[:80]!r}"
    return "a 200 with an 'error'" if isinstance(found, dict) and "error" in found else None


def _problem_with_stream(body: bytes) -> str | None:
    blocks = body.split(b"\n\n")
    if blocks[-1]:
        return f"the stream ends within an event: {blocks[-1][:80]!r}"
    data = [line[6:] for block in blocks for line in block.split(b"\n") if line.startswith(b"data: ")]
    try:
        events = [json.loads(item) for item in data if item != b"[DONE]"]
    except ValueError:
        return "an event of the stream is no JSON"
    failed = any("error" in event for event in events)
    if (data[-1:] == [b"[DONE]"]) is failed:
        return "a stream that failed ends with [DONE]" if failed else "a stream ends without [DONE] or an error"
    return None
