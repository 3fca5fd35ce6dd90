"""Whether the head of a request is one that every program on the way reads alike. A function of bytes.

What the parser already refuses (two Content-Lengths, folded lines, bare line feeds, spaces before a colon) isn't asked
again, but for the pair that smuggles requests past a proxy.
"""

from collections.abc import Sequence

from sightline_server.errors import ApiError, InvalidRequest, MethodNotAllowed

Headers = Sequence[tuple[bytes, bytes]]
SERVED_VERSIONS = ("1.0", "1.1")


def head_refusal(method: str, version: str, target: bytes, headers: Headers) -> ApiError | None:
    """Why the request is refused before any of its body is read; None if it isn't. Names in ``headers`` are lower
    case."""
    if version not in SERVED_VERSIONS:
        return _broken(f"HTTP/{version} is not served: use HTTP/1.1.")
    if method == "CONNECT":
        return MethodNotAllowed("This server is no proxy: CONNECT is not served.")
    if not target.startswith(b"/") and not (target == b"*" and method == "OPTIONS"):
        return _broken("The request target must be a path such as /v1/models, without a host.")
    if b"#" in target:
        return _broken("The request target holds a '#': fragments stay with the client.")
    return _framing_refusal(version, headers) or _upgrade_refusal(headers)


def _framing_refusal(version: str, headers: Headers) -> ApiError | None:
    lengths = [value for name, value in headers if name == b"content-length"]
    encodings = [value for name, value in headers if name == b"transfer-encoding"]
    if len(lengths) + len(encodings) > 1:
        return _broken("Give the body's length once: one Content-Length, or Transfer-Encoding: chunked.")
    if encodings and (version == "1.0" or encodings[0].strip().lower() != b"chunked"):
        return _broken("The one Transfer-Encoding served is chunked, in HTTP/1.1.")
    return None


def _upgrade_refusal(headers: Headers) -> ApiError | None:
    wanted = b",".join(value for name, value in headers if name == b"upgrade").lower()
    # An offer of HTTP/2, which some clients make with every request, may be passed over in silence.
    if b"websocket" in wanted:
        return _broken("There are no websockets here: send plain requests, with 'stream': true for a stream.")
    return None


def unreadable(start: bytes) -> ApiError:
    """For what the parser gave up on. ``start``: the first bytes that came on the connection."""
    if start.startswith(b"\x16\x03"):
        return _broken("This port speaks plain HTTP: use http:// in the address, or put a proxy with TLS in front.")
    if start.startswith(b"PRI * HTTP/2"):
        return _broken("HTTP/2 is not served: use HTTP/1.1.")
    return _broken("This is not a valid HTTP/1.1 request.")


def _broken(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_http")
