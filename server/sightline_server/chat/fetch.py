"""Where an image is, to its bytes: reads ``data:`` URLs and refuses every other kind.

Knows URLs and base64. Knows no picture formats (the media type in a URL is ignored: the bytes decide), and opens no
file and no connection.
"""

import binascii
import time
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from sightline_models.image_header import ImageError

MAX_ESCAPED_CHARACTERS = 1 << 20
"""Longest data: URL that is not base64; undoing its escapes takes many times its memory."""
UNDONE_AT_ONCE = 1 << 18
"""Characters of base64 between two turns of the process's other threads: about half a millisecond."""

_WHITESPACE = b" \t\r\n"
# What senders escape in base64, with the spaces and line breaks that may stand in it.
_ESCAPES = {
    escaped: plain
    for plain in (b"+", b"/", b"=", b" ", b"\r", b"\n")
    for escaped in (b"%%%02X" % plain[0], b"%%%02x" % plain[0])
}


@dataclass(frozen=True)
class ImageSource:
    """An encoded picture, as the user sent it."""

    data: bytes


def read_image_url(url: str, *, max_bytes: int) -> ImageSource:
    """The bytes that a ``data:`` URL holds, in base64 or %-escapes (RFC 2397).

    Base64 is strict: the standard alphabet, padding complete. Spaces and line breaks in it are passed over, as
    browsers do; the URL-safe alphabet is refused. Raises ImageError for anything else, and when there are more than
    ``max_bytes`` bytes.
    """
    comma = url.find(",")
    head = url if comma < 0 else url[:comma]
    scheme, colon, media_type = head.lstrip().partition(":")
    if not colon or scheme.lower() != "data":
        raise _refusal(scheme.lower() if colon else "")
    if comma < 0:
        raise ImageError(
            "invalid_image_url",
            "The data: URL has no comma between its media type and its data. Send data:image/png;base64,...",
        )
    if media_type.lower().rpartition(";")[2].strip() == "base64":
        return ImageSource(_decode_base64(url, comma + 1, max_bytes))
    return ImageSource(_decode_escapes(url, comma + 1, max_bytes))


def _refusal(scheme: str) -> ImageError:
    if scheme in ("http", "https"):
        return ImageError(
            "invalid_image_url",
            "Remote images are disabled: this server fetches nothing. Send the image itself as a data: URL, such as "
            "data:image/png;base64,... (a later release will offer --allow-image-hosts).",
        )
    if scheme == "file":
        return ImageError(
            "invalid_image_url",
            "This server reads no files for its clients. Send the image itself as a data: URL, such as "
            "data:image/png;base64,...",
        )
    return ImageError("invalid_image_url", "An image must be given as a data: URL, such as data:image/png;base64,...")


def _decode_base64(url: str, start: int, max_bytes: int) -> bytes:
    # Before anything is copied. Spaces and escapes make the text longer than its data needs, hence the allowance.
    _check_length((len(url) - start) // 4, max_bytes)
    pieces: list[bytes] = []
    length, left, escape = 0, b"", b""
    for place in range(start, len(url), UNDONE_AT_ONCE):
        text = escape + _ascii(url[place : place + UNDONE_AT_ONCE])
        # An escape that lies across the seam waits for its other half.
        cut = text.rfind(b"%", -2)
        text, escape = (text, b"") if cut < 0 else (text[:cut], text[cut:])
        text = left + _plain(text)
        # The last group may be padded, so one is kept back; before it nothing may be.
        whole = max(len(text) - 1, 0) // 4 * 4
        text, left = text[:whole], text[whole:]
        pieces.append(_strictly(text, padded=False))
        length += len(pieces[-1])
        _check_length(length, max_bytes)
        # Whatever else the process does, such as answering others, gets its turn between two pieces.
        time.sleep(0)
    pieces.append(_strictly(left + escape, padded=True))
    _check_length(length + len(pieces[-1]), max_bytes)
    return b"".join(pieces)


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError:
        raise _bad_base64() from None


def _plain(text: bytes) -> bytes:
    if b"%" in text:
        for escaped, plain in _ESCAPES.items():
            text = text.replace(escaped, plain)
    return text.translate(None, _WHITESPACE)


def _strictly(text: bytes, *, padded: bool) -> bytes:
    if b"=" in text and not padded:
        raise _bad_base64()
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise _bad_base64() from None


def _decode_escapes(url: str, start: int, max_bytes: int) -> bytes:
    length = len(url) - start
    if length > MAX_ESCAPED_CHARACTERS:
        raise ImageError(
            "invalid_image_url",
            f"The data: URL has {length} characters without being base64; at most {MAX_ESCAPED_CHARACTERS} are "
            "allowed. Send data:image/png;base64,... instead.",
        )
    data = unquote_to_bytes(url[start:].encode("utf-8", errors="replace"))
    _check_length(len(data), max_bytes)
    return data


def _bad_base64() -> ImageError:
    return ImageError(
        "invalid_base64_image",
        "The data: URL's base64 is not valid: it needs the standard alphabet (A-Z a-z 0-9 + /) and complete padding.",
    )


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise ImageError(
            "image_file_too_large",
            f"The image has at least {length} bytes; at most {max_bytes} are allowed. Scale it down or compress it.",
        )
