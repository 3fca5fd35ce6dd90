"""Picture files to upright RGB pictures.

Knows picture formats and Pillow. Knows nothing of what a model wants, of prompts or of processes.

What a file's bytes say decides its format; a name or a media type is never asked. Of an animated picture the first
frame counts. Colour profiles are ignored, as they are by the processors that the models were trained with.
"""

import warnings
from collections.abc import Callable, Mapping
from io import BytesIO

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

# Pillow reads every one of them; a hundred thousand short notes take it a second.
_MAX_PNG_CHUNKS = 4096

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION_TAG = 0x0112
_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that can't be used. ``code`` is one of the API's image error codes; ``message`` is ours alone, never
    a library's, which may hold addresses."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The upright RGB picture in ``data`` (PNG, JPEG, WebP, GIF or BMP), transparency laid on white.

    The size is checked from the header, before any pixel is decoded. Raises ImageError.
    """
    if not data:
        raise ImageError("empty_image_file", "The image is empty: it has no bytes.")
    open_file = _opener(data)
    try:
        # Pillow's own size limit warns at some sizes and fails at others; ours is checked right below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_size(_webp_size(data), max_pixels)
            _check_png_chunks(data)
            with open_file(BytesIO(data)) as image:
                _check_size(image.size, max_pixels)
                image.load()
                _match_depth(image, data)
                return _to_rgb(_turn_upright(image))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("image_too_large", "The image needs more memory to decode than is allowed.") from None
    except Exception:
        # Pillow's decoders raise whatever their format code runs into: SyntaxError, struct.error, EOFError, OSError...
        raise ImageError("image_parse_error", "The image is damaged or cut short: it can't be decoded.") from None


def _opener(data: bytes) -> Callable[[BytesIO], Image.Image]:
    # The classes are called directly, not through Image.open: no other format's code is ever run on hostile bytes, and
    # a JPEG with more pictures behind the first (MPO, as phones write it) is simply its first picture.
    if data.startswith(_PNG):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    raise ImageError(
        "unsupported_image_media_type",
        "The file is no PNG, JPEG, WebP, GIF or BMP image. Convert it to one of these formats.",
    )


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is None:
        return
    width, height = size
    if width < 1 or height < 1:
        raise ImageError("image_parse_error", f"The image is {width} x {height} pixels: it has no area.")
    if width * height > max_pixels:
        raise ImageError(
            "image_too_large",
            f"The image is {width} x {height} pixels, {width * height} in all; at most {max_pixels} are allowed. "
            "Scale it down.",
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as a WebP file's first chunk says; Pillow would allocate the whole canvas to find out."""
    if data[:4] != b"RIFF" or len(data) < 30:
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _check_png_chunks(data: bytes) -> None:
    """Raises ImageError when too many chunks stand before the pixels."""
    place = len(_PNG) if data.startswith(_PNG) else len(data)
    for _ in range(_MAX_PNG_CHUNKS):
        if place >= len(data) or data[place + 4 : place + 8] == b"IDAT":
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise ImageError("image_parse_error", f"The PNG has more than {_MAX_PNG_CHUNKS} chunks before its pixels.")


def _match_depth(image: Image.Image, data: bytes) -> None:
    """Pillow keeps the high byte of 16-bit colours, but the transparent colour as the file has it."""
    clear = image.info.get("transparency")
    if data.startswith(_PNG) and data[24] == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        # A picture with broken metadata is still a picture.
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_16_bit(image)
    transparency = image.info.get("transparency")
    if "A" in image.getbands() or transparency is not None:
        # Dropping alpha instead would show colours that no viewer shows: a way to hide text from people.
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, divided by 257; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image)
    grey = ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
