"""Where an image is, to its bytes: reads ``data:`` URLs and refuses every other kind.

Knows URLs and base64. Knows no picture formats (the media type in a URL is ignored: the bytes decide), and opens no
file and no connection.
"""

import binascii
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from sightline_models.images import ImageError

MAX_ESCAPED_CHARACTERS = 1 << 20
"""Longest data: URL that is not base64; undoing its escapes takes many times its memory."""

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
    scheme, colon, rest = url.lstrip().partition(":")
    if not colon or scheme.lower() != "data":
        raise _refusal(scheme.lower() if colon else "")
    header, comma, payload = rest.partition(",")
    if not comma:
        raise ImageError("invalid_image_url", "The data: URL has no comma between its media type and its data.")
    if header.lower().rpartition(";")[2].strip() == "base64":
        return ImageSource(_decode_base64(payload, max_bytes))
    return ImageSource(_decode_escapes(payload, max_bytes))


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


def _decode_base64(payload: str, max_bytes: int) -> bytes:
    # Before any copy is made. Spaces and escapes make the text longer than its data needs, hence the allowance.
    _check_length(len(payload) // 4, max_bytes)
    try:
        encoded = payload.encode("ascii")
    except UnicodeEncodeError:
        raise _bad_base64() from None
    if b"%" in encoded:
        for escaped, plain in _ESCAPES.items():
            encoded = encoded.replace(escaped, plain)
    encoded = encoded.translate(None, _WHITESPACE)
    _check_length(len(encoded) // 4 * 3 - 2, max_bytes)
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error:
        raise _bad_base64() from None
    _check_length(len(data), max_bytes)
    return data


def _decode_escapes(payload: str, max_bytes: int) -> bytes:
    if len(payload) > MAX_ESCAPED_CHARACTERS:
        raise ImageError(
            "invalid_image_url",
            f"The data: URL has {len(payload)} characters without being base64; at most {MAX_ESCAPED_CHARACTERS} are "
            "allowed. Send data:image/png;base64,... instead.",
        )
    data = unquote_to_bytes(payload.encode("utf-8", errors="replace"))
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
