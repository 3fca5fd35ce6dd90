"""What a picture file says of itself, read without decoding a pixel, and the refusal of files that say too much.

Knows the layouts of PNG, JPEG, WebP, GIF and BMP. Knows no Pillow, no pixels and no limits that an operator sets.

Every walk is bounded: it takes a limited number of steps, each over bytes that are there, and allocates nothing by
what a file claims. So it may run on hostile bytes in the process that faces the network.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from struct import Struct
from struct import error as StructError
from typing import Literal

Format = Literal["PNG", "JPEG", "WebP", "GIF", "BMP"]

MAX_PARTS = 32_768
"""Most chunks, segments or blocks that are walked. Honest files of 20 MiB have some thousands."""
MAX_SCANS = 64
"""Most scans of a JPEG. Each goes over the whole picture; encoders write about ten."""
MAX_FRAMES = 10_000
"""Most frames of an animation. One is decoded, but a decoder may note where each begins."""
MAX_EXIF_BYTES = 65_536
"""What is kept of a file's EXIF block: as much as a JPEG segment can hold."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FORMATS: tuple[tuple[re.Pattern[bytes], Format], ...] = (
    (re.compile(re.escape(PNG_SIGNATURE)), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM"), "BMP"),
)

_IHDR = Struct(">IIBBBBB")
_PNG_DEPTHS: Mapping[int, tuple[int, ...]] = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

# Neither a stuffed zero, nor a restart inside a scan, nor one of the fill bytes before a marker.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# A search holds the interpreter: this much takes less than a millisecond.
_SEARCHED_AT_ONCE = 1 << 18
_SOI, _EOI, _SOS, _TEM, _APP1 = 0xD8, 0xD9, 0xDA, 0x01, 0xE1
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_UNUSUAL_JPEGS: Mapping[int, str] = {
    0xC3: "lossless",
    **dict.fromkeys((0xC5, 0xC6, 0xC7), "hierarchical"),
    **dict.fromkeys((0xC9, 0xCA), "arithmetic-coded"),
    0xCB: "arithmetic-coded lossless",
    **dict.fromkeys((0xCD, 0xCE, 0xCF), "arithmetic-coded hierarchical"),
}
_SOF = Struct(">BHHB")

_BMP_INFO = Struct("<iiHHI")
_BMP_CORE = Struct("<HHHH")
_BMP_INFO_SIZES = (40, 52, 56, 64, 108, 124)
_BMP_BITS = (1, 4, 8, 16, 24, 32)
_BMP_PLAIN, _BMP_BITFIELDS = 0, 3


class ImageError(ValueError):
    """A picture that can't be used. ``code`` is one of the API's image error codes; ``message`` is ours alone, never
    a library's, which may hold addresses."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class ImageHeader:
    """A file's own account of the picture in it. A decoder must still find the same size."""

    format: Format
    width: int
    height: int
    """Of the whole picture, in pixels as they are stored: before it is turned upright."""
    frames: int = 1
    """As many as the header counts. A GIF has no count and is read no further than its first."""
    parts: int = 1
    """Chunks, segments or blocks that were walked."""
    scans: int = 1
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) of the first frame, when it isn't the whole picture."""
    exif: bytes = field(default=b"", repr=False)

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes) -> ImageHeader:
    """The header of a PNG, JPEG, WebP, GIF or BMP file; its first bytes decide which it is.

    Raises ImageError for every other file, and for one that is cut short, has no area, is of a kind that isn't
    served, or is made of too many parts.
    """
    if not data:
        raise ImageError("empty_image_file", "The image is empty: it has no bytes. Send the whole file.")
    name = next((name for pattern, name in _FORMATS if pattern.match(data)), None)
    if name is None:
        raise ImageError(
            "unsupported_image_media_type",
            "The file is no PNG, JPEG, WebP, GIF or BMP image. Convert it to one of these formats.",
        )
    try:
        header = _READERS[name](data)
    except (IndexError, StructError):
        raise cut_short(name) from None
    if header.width < 1 or header.height < 1:
        raise ImageError(
            "image_parse_error",
            f"The image is {header.width} x {header.height} pixels: it has no area. Send one that has pixels.",
        )
    return header


def check_size(header: ImageHeader, max_pixels: int) -> None:
    """Raises ImageError when the picture has more than ``max_pixels`` pixels."""
    if header.pixels > max_pixels:
        raise ImageError(
            "image_too_large",
            f"The image is {header.width} x {header.height} pixels, {header.pixels} in all; at most {max_pixels} are "
            "allowed. Scale it down.",
        )


def cut_short(name: Format) -> ImageError:
    return ImageError("image_parse_error", f"The {name} is damaged or cut short. Send the whole file, or save it anew.")


def _too_many(name: Format, count: int, parts: str) -> ImageError:
    return ImageError("image_parse_error", f"The {name} has more than {count} {parts}. Save it anew without them.")


def _unusual(what: str, instead: str) -> ImageError:
    return ImageError("unsupported_image_media_type", f"{what} is not supported. Save the picture as {instead}.")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk up to the last, IEND; ``data[start:end]`` is the whole chunk.

    Raises ImageError where the file ends before its IEND, or has more than MAX_PARTS chunks.
    """
    place = len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if end > len(data):
            raise cut_short("PNG")
        kind = data[place + 4 : place + 8]
        yield kind, place, end
        if kind == b"IEND":
            return
        place = end
    raise _too_many("PNG", MAX_PARTS, "chunks")


def _read_png(data: bytes) -> ImageHeader:
    frames, parts, exif = 1, 0, b""
    if data[12:16] != b"IHDR" or data[8:12] != b"\0\0\0\x0d":
        raise cut_short("PNG")
    width, height, depth, color, _, _, _ = _IHDR.unpack_from(data, 16)
    if depth not in _PNG_DEPTHS.get(color, ()):
        raise cut_short("PNG")
    for kind, start, end in png_chunks(data):
        parts += 1
        if kind == b"eXIf" and not exif:
            exif = data[start + 8 : min(end - 4, start + 8 + MAX_EXIF_BYTES)]
        elif kind == b"acTL" and end - start >= 20:
            frames = int.from_bytes(data[start + 8 : start + 12], "big")
    if frames > MAX_FRAMES:
        raise _too_many("PNG", MAX_FRAMES, "frames")
    return ImageHeader("PNG", width, height, max(frames, 1), parts, exif=exif)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the end of the picture; ``data[start:end]`` begins with the marker.
    What a scan's segment is followed by, up to the next, is its pixels.

    Raises ImageError where a segment is cut off, or there are more than MAX_PARTS of them.
    """
    place = 2
    for _ in range(MAX_PARTS):
        start = _next_marker(data, place)
        if start is None or data[start + 1] == _EOI:
            return
        marker = data[start + 1]
        if marker in (_SOI, _TEM):
            place = start + 2
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        place = start + 2 + length
        if length < 2 or place > len(data):
            raise cut_short("JPEG")
        yield marker, start, place
    raise _too_many("JPEG", MAX_PARTS, "segments")


def _next_marker(data: bytes, place: int) -> int | None:
    while place < len(data):
        # One byte over, for a marker that lies across the seam.
        found = _MARKER.search(data, place, place + _SEARCHED_AT_ONCE + 1)
        if found:
            return found.start()
        place += _SEARCHED_AT_ONCE
    return None


def _read_jpeg(data: bytes) -> ImageHeader:
    size: tuple[int, int] | None = None
    parts, scans, components, one_by_one, exif = 0, 0, 0, False, b""
    for marker, start, end in jpeg_segments(data):
        parts += 1
        if marker in _UNUSUAL_JPEGS:
            raise _unusual(f"A JPEG that is {_UNUSUAL_JPEGS[marker]}", "a baseline or progressive JPEG, or as PNG")
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            precision, height, width, components = _SOF.unpack_from(data, start + 4)
            if size or components not in (1, 3, 4) or end - start != 10 + 3 * components:
                raise cut_short("JPEG")
            if precision != 8:
                raise _unusual(f"A JPEG of {precision} bits a colour", "a JPEG of 8 bits a colour, or as PNG")
            size, one_by_one = (width, height), marker != _PROGRESSIVE
        elif marker == _APP1 and not exif and not scans and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = data[start + 10 : end]
        elif marker == _SOS:
            scans += 1
            if size is None:
                raise cut_short("JPEG")
            if scans > MAX_SCANS:
                raise _too_many("JPEG", MAX_SCANS, "scans")
            # One sequential scan of all colours is the picture: nothing behind it is ever read.
            if one_by_one and data[start + 4] == components:
                break
    if size is None or not scans:
        raise cut_short("JPEG")
    return ImageHeader("JPEG", *size, parts=parts, scans=scans, exif=exif)


def _read_webp(data: bytes) -> ImageHeader:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise cut_short("WebP")
    canvas, image, box = None, None, None
    place, parts, frames, exif = 12, 0, 0, b""
    while place + 8 <= end:
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body, place = place + 8, place + 8 + length + (length & 1)
        if body + length > end:
            raise cut_short("WebP")
        parts += 1
        if parts > MAX_PARTS:
            raise _too_many("WebP", MAX_PARTS, "chunks")
        if kind == b"VP8X" and parts == 1 and length >= 10:
            canvas = _at_24(data, body + 4) + 1, _at_24(data, body + 7) + 1
        elif kind in (b"VP8 ", b"VP8L") and image is None:
            image = _webp_image_size(kind, data[body : body + 10])
        elif kind == b"ANMF":
            frames += 1
            if frames == 1 and length >= 16:
                left, top = 2 * _at_24(data, body), 2 * _at_24(data, body + 3)
                box = left, top, left + _at_24(data, body + 6) + 1, top + _at_24(data, body + 9) + 1
        elif kind == b"EXIF" and not exif:
            exif = data[body : body + min(length, MAX_EXIF_BYTES)].removeprefix(b"Exif\0\0")
    if frames > MAX_FRAMES:
        raise _too_many("WebP", MAX_FRAMES, "frames")
    size = canvas or image
    if size is None or (not frames and image not in (None, size)):
        raise cut_short("WebP")
    if box and (box[2] > size[0] or box[3] > size[1]):
        raise cut_short("WebP")
    return ImageHeader("WebP", *size, max(frames, 1), parts, box=None if box == (0, 0, *size) else box, exif=exif)


def _webp_image_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) == 10:
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise cut_short("WebP")


def _at_24(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 3], "little")


def _at_16(data: bytes, place: int) -> int:
    return data[place] | data[place + 1] << 8


def _read_gif(data: bytes) -> ImageHeader:
    flags = data[10]
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts = 0
    while data[place] == 0x21:
        place += 2
        block = -1
        while block:
            block = data[place]
            place += 1 + block
            parts += 1
            if parts > MAX_PARTS:
                raise _too_many("GIF", MAX_PARTS, "blocks before its picture")
    if data[place] != 0x2C:
        raise cut_short("GIF")
    left, top, across, down = (_at_16(data, place + offset) for offset in (1, 3, 5, 7))
    if not across or not down:
        return ImageHeader("GIF", across, down)
    # A frame that reaches over the edge makes the picture larger.
    size = max(_at_16(data, 6), left + across), max(_at_16(data, 8), top + down)
    box = left, top, left + across, top + down
    return ImageHeader("GIF", *size, parts=parts + 1, box=None if box == (0, 0, *size) else box)


def _read_bmp(data: bytes) -> ImageHeader:
    offset, header_size = int.from_bytes(data[10:14], "little"), int.from_bytes(data[14:18], "little")
    if header_size == 12:
        width, height, _, bits = _BMP_CORE.unpack_from(data, 18)
        packing = _BMP_PLAIN
    elif header_size in _BMP_INFO_SIZES:
        width, height, _, bits, packing = _BMP_INFO.unpack_from(data, 18)
    else:
        raise cut_short("BMP")
    if packing not in (_BMP_PLAIN, _BMP_BITFIELDS):
        raise _unusual("A compressed BMP", "an uncompressed BMP, or as PNG")
    if bits not in _BMP_BITS:
        raise _unusual(f"A BMP of {bits} bits a pixel", "a BMP of 24 bits a pixel, or as PNG")
    # Rows that stand from top to bottom have a negative count. Each is padded to four bytes, the last maybe not.
    rows, row_bits = abs(height), max(width, 0) * bits
    needed = (rows - 1) * ((row_bits + 31) // 32 * 4) + (row_bits + 7) // 8
    if width > 0 and rows and max(offset, 14 + header_size) + needed > len(data):
        raise cut_short("BMP")
    return ImageHeader("BMP", width, rows)


_READERS: Mapping[Format, Callable[[bytes], ImageHeader]] = {
    "PNG": _read_png,
    "JPEG": _read_jpeg,
    "WebP": _read_webp,
    "GIF": _read_gif,
    "BMP": _read_bmp,
}
