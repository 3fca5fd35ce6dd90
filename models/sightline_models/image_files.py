"""Picture files to upright RGB pictures.

Knows Pillow, and which parts of a file it may see. Knows nothing of what a model wants, of prompts or of processes;
how files are laid out is known by `image_header.py`.

What a file's bytes say decides its format; a name or a media type is never asked. Of an animated picture the first
frame counts. Colour profiles are ignored, as they are by the processors that the models were trained with.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from sightline_models.image_header import (
    PNG_SIGNATURE,
    Format,
    ImageError,
    ImageHeader,
    check_size,
    cut_short,
    jpeg_segments,
    png_chunks,
    read_header,
)

__all__ = ["ImageError", "decode_image"]

# The classes are called directly, not through Image.open: no other format's code is ever run on hostile bytes, and a
# JPEG with more pictures behind the first (MPO, as phones write it) is simply its first picture.
_OPENERS: Mapping[Format, Callable[[BytesIO], Image.Image]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_PNG_ESSENTIALS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Segments of applications and comments, but for the two that say how colours are stored (JFIF and Adobe).
_JPEG_NOTES = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}
_JPEG_SCAN = 0xDA

_WHITE = (255, 255, 255)
_ORIENTATION_TAG = 0x0112
_SHORT = 3
_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The upright RGB picture in ``data`` (PNG, JPEG, WebP, GIF or BMP), transparency laid on white.

    The size is checked from the header, before any pixel is decoded. Raises ImageError.
    """
    header = read_header(data)
    check_size(header, max_pixels)
    try:
        # Pillow's own size limit warns at some sizes and fails at others; ours has been checked.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _OPENERS[header.format](BytesIO(_what_makes_pixels(data, header.format))) as image:
                if image.size != (header.width, header.height):
                    # What was checked, and counted in the request's budget, was a lie.
                    raise cut_short(header.format)
                image.load()
                _match_transparent_colour(image, data, header.format)
                picture = _to_rgb(image)
        return _turn_upright(_on_white(picture, header), header.exif)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(
            "image_too_large", "The image needs more memory to decode than is allowed. Scale it down."
        ) from None
    except Exception:
        # Pillow's decoders raise whatever their format code runs into: SyntaxError, struct.error, EOFError, OSError...
        raise ImageError(
            "image_parse_error", "The image is damaged or cut short: it can't be decoded. Save it anew."
        ) from None


def _what_makes_pixels(data: bytes, format: Format) -> bytes:
    """``data`` without texts, profiles, metadata and further frames, so far as that is easily told: Pillow unpacks
    and parses them when it opens a file, and takes some texts for its own notes."""
    if format == "PNG":
        return b"".join([PNG_SIGNATURE, *(data[start:end] for start, end in _essential_chunks(data))])
    if format == "JPEG":
        return b"".join([b"\xff\xd8", *_essential_segments(data)])
    return data


def _essential_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    for kind, start, end in png_chunks(data):
        if kind in _PNG_ESSENTIALS:
            yield start, end


def _essential_segments(data: bytes) -> Iterator[bytes]:
    for marker, start, end in jpeg_segments(data):
        if marker == _JPEG_SCAN:
            yield data[start:]
            return
        if marker not in _JPEG_NOTES:
            yield data[start:end]


def _match_transparent_colour(image: Image.Image, data: bytes, format: Format) -> None:
    """Makes a PNG's transparent colour one of the samples that Pillow made.

    Pillow keeps the colour as the file has it, 16 bits a sample, of which those beyond the picture's depth count for
    nothing; of colours it keeps the high byte of 16 bits, and it spreads grey of 2 or 4 bits over 8.
    """
    clear = image.info.get("transparency")
    if format != "PNG" or image.mode == "P" or clear is None:
        return
    depth = data[24]
    if isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 if depth == 16 else value & 0xFF for value in clear)
    elif image.mode == "L":
        largest = (1 << depth) - 1
        image.info["transparency"] = (clear & largest) * (255 // largest)


def _on_white(picture: Image.Image, header: ImageHeader) -> Image.Image:
    """Where a first frame doesn't reach there is nothing; Pillow fills in black or the file's first colour."""
    if header.box is None:
        return picture
    white = Image.new("RGB", picture.size, _WHITE)
    white.paste(picture.crop(header.box), header.box)
    return white


def _turn_upright(picture: Image.Image, exif: bytes) -> Image.Image:
    method = _UPRIGHT.get(_orientation(exif))
    return picture if method is None else picture.transpose(method)


def _orientation(exif: bytes) -> int:
    """The orientation of an EXIF block, 1 (upright) to 8; 1 when there is none, or none of these."""
    orders: Mapping[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
    order = orders.get(exif[:4])
    if order is None:
        return 1
    start = int.from_bytes(exif[4:8], order)
    entries = int.from_bytes(exif[start : start + 2], order)
    for place in range(start + 2, min(start + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, value = (int.from_bytes(exif[place + at : place + at + 2], order) for at in (0, 2, 8))
        if tag == _ORIENTATION_TAG:
            return value if kind == _SHORT and value in _UPRIGHT else 1
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_16_bit(image)
    transparency = image.info.get("transparency")
    if "A" in image.getbands() or transparency is not None:
        # Dropping alpha instead would show colours that no viewer shows: a way to hide text from people.
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (*_WHITE, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, divided by 257; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = np.clip(values, 0, 65535).astype(np.uint16)
    scaled = ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    grey = scaled[values]
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
