"""A small client of an OpenAI-compatible chat API: model names, and one streamed answer at a time.

Knows HTTP and the wire's JSON. Knows no terminal and keeps no conversation; every failure is a ChatError whose
sentence says what to do. Whatever a server sends is cleaned of control characters before it leaves this file.
"""

import json
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from sightline_server.cli.event_stream import read_events
from sightline_server.cli.terminal import clean, one_line, own_command

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 600.0
"""A long prompt on a slow CPU is silent for minutes before its first token."""

MIN_RATED_TOKENS = 5
MIN_RATED_S = 0.01
"""A rate over fewer tokens, or over a time in which they came all at once, says nothing."""

Message = dict[str, Any]

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_STRANGE = "The server's answer can't be understood: it doesn't speak the OpenAI chat API. Is --url right?"


class ChatError(Exception):
    """A failed exchange with the server; the sentence says what happened and what to do."""


def full_url(text: str) -> str:
    """The API's base address for what a person typed: ``localhost:8000`` means ``http://localhost:8000/v1``.

    Raises ChatError when no address can be made of it.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ChatError(f"{one_line(text)!r} is no address. It should look like http://127.0.0.1:8000/v1.")
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


class AnswerStream:
    """One answer while it arrives: iterate for its text, then read how it ended."""

    def __init__(self, chunks: Iterator[bytes], began: float) -> None:
        """``began`` is when the question was sent, by ``time.monotonic``."""
        self._chunks = chunks
        self._began = began
        self._first: float | None = None
        self._last = began
        self.finish_reason: str | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        """0 until the stream's end, and after it when the server doesn't say."""

    def __iter__(self) -> Iterator[str]:
        for data in read_events(self._chunks):
            if data == "[DONE]":
                return
            chunk = _json_object(data)
            if chunk.get("error"):
                raise ChatError(_error_sentence(chunk, "The server gave up without saying why."))
            try:
                text = self._read(chunk)
            except (AttributeError, TypeError, ValueError):
                raise ChatError(_STRANGE) from None
            if text:
                self._last = time.monotonic()
                self._first = self._first or self._last
                yield text
        if self.finish_reason is None:
            raise ChatError("The connection ended before the answer did. The server's log says why.")

    def _read(self, chunk: Mapping[str, Any]) -> str:
        """The chunk's text; its other news goes into the fields."""
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.completion_tokens = int(usage.get("completion_tokens") or 0)
            self.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        text = ""
        for choice in chunk.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text += (choice.get("delta") or {}).get("content") or ""
        return clean(text)

    @property
    def first_text_s(self) -> float | None:
        """Seconds from the request to the first text, or None when there was none."""
        return None if self._first is None else self._first - self._began

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first text, or None when there were too few to tell."""
        if self._first is None or self.completion_tokens < MIN_RATED_TOKENS:
            return None
        took = self._last - self._first
        return (self.completion_tokens - 1) / took if took >= MIN_RATED_S else None


class ChatClient:
    """A connection to one server. Use as a context manager."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """``url`` is the API's base address, with or without ``/v1``. Raises ChatError when it is no address."""
        self.url = full_url(url)
        self._has_key = bool(api_key)
        # A proxy set for the web can't reach a server in a private network, and needn't see what is sent to one; so
        # nothing comes from the environment but where certificates lie.
        secure = self.url.startswith("https:")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
            verify=ssl.create_default_context() if secure else True,
        )

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def model_names(self) -> list[str]:
        """What the server serves, its first choice first. Raises ChatError."""
        with self._exchange():
            response = self._http.get(f"{self.url}/models")
            self._check(response)
        try:
            names = [one_line(str(entry["id"])) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if not names:
            raise ChatError(f"{self.url} lists no models, so it is no OpenAI-compatible API. Is --url right?")
        return names

    @contextmanager
    def ask(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[AnswerStream]:
        """Ask for an answer. Leaving the context closes the stream, which ends the work on the server too.

        ``options`` are fields of the request's body, ``model`` among them. Raises ChatError, also while the answer
        is iterated inside the context.
        """
        body = {**options, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        with self._exchange(), self._http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            self._check(response)
            yield AnswerStream(response.iter_bytes(), began)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turns whatever httpx raises inside into a sentence."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ChatError(self._unreachable(error)) from None
        except httpx.TimeoutException:
            raise ChatError(f"{self.url} said nothing for {SILENCE_TIMEOUT_S:.0f} s. Is the server stuck?") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = one_line(str(error)) or type(error).__name__
            raise ChatError(f"The connection to {self.url} broke ({reason}). The server's log says why.") from None

    def _unreachable(self, error: Exception) -> str:
        parts = urlsplit(self.url)
        reason = one_line(str(error)) or "no connection in time"
        if "SSL" in reason:
            return f"No secure connection to {self.url} ({reason}). `sightline serve` itself speaks http:// only."
        if parts.hostname not in _LOOPBACK:
            return (
                f"No server can be reached at {self.url} ({reason}). Is it running there, and was it started with "
                "`sightline serve --host 0.0.0.0`, so that other machines may connect?"
            )
        port = parts.port or (443 if parts.scheme == "https" else 80)
        command = f"{own_command()} serve" if port == 8000 else f"{own_command()} serve --port {port}"
        return (
            f"`sightline serve` is not running at {self.url}. Start it in another terminal with `{command}`, "
            "or give the address of a running one with --url."
        )

    def _check(self, response: httpx.Response) -> None:
        """Raises ChatError for any status but 200."""
        if response.status_code == 200:
            return
        response.read()
        try:
            body = _json_object(response.text)
        except ChatError:
            body = {}
        status = response.status_code
        if status == 401:
            wanted = "doesn't accept this key: check --api-key" if self._has_key else "wants a key: give --api-key KEY"
            raise ChatError(f"The server at {self.url} {wanted}.")
        if status == 404 and not body:
            raise ChatError(f"There is no chat API at {self.url}. Does --url lack /v1?")
        sentence = _error_sentence(body, f"The server answered with HTTP status {status} and no reason.")
        retry_after = response.headers.get("retry-after", "")
        if status in (429, 503) and retry_after.isdecimal() and "try again" not in sentence.lower():
            sentence += f" Try again in {retry_after} s."
        raise ChatError(sentence)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ChatError(_STRANGE)
    return value


def _error_sentence(body: Mapping[str, Any], otherwise: str) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return one_line(message) if isinstance(message, str) and message.strip() else otherwise
