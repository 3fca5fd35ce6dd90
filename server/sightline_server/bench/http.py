"""A small HTTP/1.1 client for measuring: one request a connection, the body handed over as it arrives.

Knows sockets, TLS and body framing. Knows nothing of JSON, events or models. It exists because a general client costs
a good part of a core at a few thousand chunks a second, and that core is the server's while both share a machine.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

READ_SIZE = 1 << 16


class TransportError(Exception):
    """No whole answer came: ``kind`` is a short name to count by, the message says what happened."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """The root of an API, such as ``http://127.0.0.1:8000/v1``."""

    host: str
    port: int
    root: str
    """Path without a trailing slash."""
    tls: bool

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Raises ValueError with the fix when ``url`` is no http(s) address. A URL without a path means ``/v1``."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must look like http://127.0.0.1:8000/v1, not {url!r}.")
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=parts.port or (443 if tls else 80),
            root=parts.path.rstrip("/") or "/v1",
            tls=tls,
        )

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class ChunkedBody:
    """Takes the chunked transfer coding off a body that arrives in arbitrary pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._buffer = bytearray()
        self._left = 0
        self._skip = 0

    def feed(self, data: bytes) -> bytes:
        """The payload that ``data`` completes. Raises TransportError when a chunk size is no hexadecimal number."""
        buffer = self._buffer
        buffer += data
        payload = bytearray()
        while not self.ended:
            if self._left:
                part = buffer[: self._left]
                del buffer[: len(part)]
                payload += part
                self._left -= len(part)
                if self._left:
                    break
                self._skip = 2
            if self._skip:
                dropped = min(self._skip, len(buffer))
                del buffer[:dropped]
                self._skip -= dropped
                if self._skip:
                    break
            end = buffer.find(b"\r\n")
            if end < 0:
                break
            size = bytes(buffer[:end]).partition(b";")[0].strip()
            del buffer[: end + 2]
            try:
                self._left = int(size, 16)
            except ValueError:
                raise TransportError("bad_framing", f"a chunk's size reads {size[:20]!r}") from None
            self.ended = self._left == 0
        return bytes(payload)


class Reply:
    """An answer whose status and headers have arrived and whose body is on its way."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader
        self._chunked = ChunkedBody() if "chunked" in headers.get("transfer-encoding", "").lower() else None
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() and self._chunked is None else None

    async def read_some(self) -> bytes:
        """The next piece of the body, empty at its end. Raises TransportError when the body is cut short."""
        while not (self._chunked.ended if self._chunked else self._left == 0):
            data = await self._reader.read(READ_SIZE)
            if not data:
                if self._chunked is not None or self._left is not None:
                    raise TransportError("closed_early", "the server closed the connection inside its answer")
                return b""
            if self._chunked is not None:
                data = self._chunked.feed(data)
                if not data:
                    continue
            elif self._left is not None:
                data = data[: self._left]
                self._left -= len(data)
            return data
        return b""

    async def read_all(self) -> bytes:
        pieces = []
        while piece := await self.read_some():
            pieces.append(piece)
        return b"".join(pieces)


@contextlib.asynccontextmanager
async def open_request(
    endpoint: Endpoint, method: str, path: str, *, headers: Mapping[str, str], body: bytes = b""
) -> AsyncGenerator[Reply, None]:
    """Send one request on a connection of its own and yield its ``Reply``; the connection closes on the way out.

    ``path`` is joined to the endpoint's root. Raises TransportError when no answer starts.
    """
    try:
        reader, writer = await asyncio.open_connection(
            endpoint.host, endpoint.port, ssl=ssl.create_default_context() if endpoint.tls else None
        )
    except OSError as error:
        raise TransportError(
            "connection_failed", f"no connection to {endpoint.authority}: {error.strerror or error}"
        ) from None
    try:
        head = [
            f"{method} {endpoint.root}{path} HTTP/1.1",
            f"Host: {endpoint.authority}",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        writer.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
        yield await _read_head(reader)
    except ConnectionError as error:
        raise TransportError("connection_lost", f"the connection broke: {error.strerror or error}") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> Reply:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        raise TransportError("closed_early", "the server closed the connection before answering") from None
    except asyncio.LimitOverrunError:
        raise TransportError("bad_framing", "the answer's headers are longer than 64 KiB") from None
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise TransportError("bad_framing", f"the answer starts with {lines[0][:40]!r}, which is no HTTP/1.1")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return Reply(int(words[1]), headers, reader)
