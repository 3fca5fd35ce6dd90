"""One measured request: send it, take the time of every content chunk, say how it ended.

Knows chat completion streams and clocks. Knows nothing of workloads, concurrency or statistics. Works with any
OpenAI-compatible server, so it trusts nothing: odd chunks are errors with a name, never exceptions.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from sightline_server.bench.http import Endpoint, TransportError, open_request


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class Record(msgspec.Struct, kw_only=True):
    """What one request did. Times are seconds; ``started_s`` counts from the start of the run."""

    index: int
    started_s: float
    error: str | None = None
    """Nothing, or a short name to count by: ``400 invalid_value``, ``closed_early``, ``timeout`` ..."""
    message: str | None = None
    """The server's sentence for ``error``."""
    ttft_s: float | None = None
    """From before connecting to the first content chunk."""
    e2e_s: float = 0.0
    gaps_s: list[float] = []
    """Between one content chunk and the next; a server may put several tokens in a chunk."""
    chunks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int | None = None
    """From the server's usage; nothing when it reports none."""
    finish_reason: str | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens by the server's usage, else content chunks."""
        return self.chunks if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


class EventLines:
    """The ``data:`` payloads of an event stream that arrives in arbitrary pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


_chunk_decoder = msgspec.json.Decoder(Chunk)


class _StreamError(Exception):
    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def ask(
    endpoint: Endpoint,
    body: bytes,
    *,
    headers: Mapping[str, str],
    index: int,
    run_started: float,
    timeout_s: float,
) -> Record:
    """Stream one chat completion and return its record; every failure is in the record, none is raised."""
    began = time.perf_counter()
    record = Record(index=index, started_s=began - run_started, gaps_s=[])
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(endpoint, body, headers, record, began)
    except TimeoutError:
        record.error, record.message = "timeout", f"no whole answer within {timeout_s:g} s"
    except TransportError as error:
        record.error, record.message = error.kind, str(error)
    except _StreamError as error:
        record.error, record.message = error.name, str(error)
    record.e2e_s = time.perf_counter() - began
    return record


async def _stream(endpoint: Endpoint, body: bytes, headers: Mapping[str, str], record: Record, began: float) -> None:
    sent = {"Content-Type": "application/json", "Accept": "text/event-stream", **headers}
    async with open_request(endpoint, "POST", "/chat/completions", headers=sent, body=body) as reply:
        if reply.status != 200:
            name, message = describe_error(reply.status, await reply.read_all())
            raise _StreamError(name, message)
        lines = EventLines()
        last = began
        while data := await reply.read_some():
            arrived = time.perf_counter()
            for payload in lines.feed(data):
                if payload == b"[DONE]" or not payload:
                    continue
                if _take_chunk(payload, record):
                    if record.ttft_s is None:
                        record.ttft_s = arrived - began
                    else:
                        record.gaps_s.append(arrived - last)
                    last = arrived
    if record.finish_reason is None:
        raise _StreamError("ended_early", "the stream ended without a finish_reason")


def _take_chunk(payload: bytes, record: Record) -> bool:
    """Fold one chunk into ``record``; whether it carried content."""
    try:
        chunk = _chunk_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise _StreamError("bad_chunk", f"{error}: {payload[:200].decode('utf-8', 'replace')}") from None
    if chunk.error is not None:
        name, message = _read_error(chunk.error)
        raise _StreamError(f"in_stream {name}".strip(), message)
    if chunk.usage is not None:
        record.prompt_tokens = chunk.usage.prompt_tokens
        record.completion_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        record.cached_tokens = (details.cached_tokens or 0) if details else 0
    has_content = False
    for choice in chunk.choices or ():
        record.finish_reason = choice.finish_reason or record.finish_reason
        if choice.delta is not None and (choice.delta.content or choice.delta.reasoning_content):
            has_content = True
    record.chunks += has_content
    return has_content


def describe_error(status: int, body: bytes) -> tuple[str, str]:
    """A short name to count a failed answer by, and the server's sentence."""
    try:
        decoded = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return str(status), body[:300].decode("utf-8", "replace")
    error = decoded.get("error", decoded.get("detail", decoded)) if isinstance(decoded, dict) else decoded
    name, message = _read_error(error)
    return f"{status} {name}".strip(), message


def _read_error(error: Any) -> tuple[str, str]:
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or ""), str(error.get("message") or error)
    return "", str(error)
