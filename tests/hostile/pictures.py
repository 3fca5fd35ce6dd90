"""Pictures spoiled by chance, and the oracle for them: a picture comes out, or an ImageError, and nothing else.

Needs nothing of pytest, so that a script can run a million of them. Equal seeds give equal files.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from hostile.flat_jpegs import flat_jpeg
from PIL import Image

from sightline_models.config import Normalization
from sightline_models.image_files import decode_image
from sightline_models.image_header import ImageError
from sightline_models.images import PreprocessConfig, prepare

MAX_PIXELS = 1_000_000
SIDE = 96
PREPROCESS = PreprocessConfig(
    pad_color=None,
    shortest_edge=SIDE,
    resize=None,
    resample=Image.Resampling.BICUBIC,
    crop=(SIDE, SIDE),
    normalization=Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255),
    num_tokens=16,
)
"""As CLIP's, and smaller: what a decode worker does to a picture, from its bytes to the engine's pixels."""
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_PNG = b"\x89PNG\r\n\x1a\n"


def check_picture(data: bytes) -> str:
    """``decoded``, or the code of the ImageError. Everything else that comes of it is raised."""
    try:
        made = decode_image(data, max_pixels=MAX_PIXELS)
        prepared = prepare(made, PREPROCESS)
    except ImageError as error:
        _check_sentence(error.message)
        return error.code
    assert prepared.pixels.shape == (SIDE, SIDE, 3), prepared.pixels.shape
    assert made.mode == "RGB", made.mode
    assert 0 < made.width * made.height <= MAX_PIXELS, made.size
    assert len(made.tobytes()) == 3 * made.width * made.height
    return "decoded"


def _check_sentence(message: str) -> None:
    for leaked in ("0x", "BytesIO", "PIL", "<", "/"):
        assert leaked not in message, f"{leaked!r} in {message!r}"


def mutated_pictures(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` files, each with a name that tells what was done to which picture."""
    rng = random.Random(seed)
    bases = base_pictures()
    for index in range(count):
        name, data = rng.choice(bases)
        done = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            spoil = rng.choice(_SPOILERS)
            data = spoil(rng, data)
            done.append(spoil.__name__.strip("_"))
        if data.startswith(_PNG) and rng.random() < 0.7:
            # Else hardly any would get past its checksums.
            data = mended(data)
            done.append("mended")
        yield f"{seed}:{index} {name} {' '.join(done)}", data


@cache
def base_pictures() -> tuple[tuple[str, bytes], ...]:
    """(name, file) of small pictures in every format, and in the kinds of each that are decoded differently."""
    coarse = Image.frombytes("RGB", (4, 3), bytes(range(30, 246, 6)))
    color = coarse.resize((24, 17))
    clear = color.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(color.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [color, color.rotate(180), color.rotate(90)]
    rows = [[(60, 120, 180), (200, 40, 90)], [(10, 20, 30), (250, 240, 230)]]
    made: dict[str, bytes] = {
        "png": as_file(color, "PNG"),
        "png-exif": as_file(color, "PNG", exif=exif),
        "png-alpha": as_file(clear, "PNG"),
        "png-grey-alpha": as_file(clear.convert("LA"), "PNG"),
        "png-palette": as_file(color.quantize(9), "PNG", transparency=b"\0\x80"),
        "png-bit": as_file(color.convert("1"), "PNG"),
        "png-interlaced": _interlaced(),
        "png-16": as_file(Image.frombytes("I;16", (3, 2), bytes(range(12))), "PNG"),
        "png-animated": as_file(color, "PNG", save_all=True, append_images=frames[1:]),
        "jpeg": as_file(color, "JPEG", exif=exif),
        "jpeg-progressive": as_file(color, "JPEG", progressive=True),
        "jpeg-restarts": as_file(color, "JPEG", restart_marker_blocks=1, subsampling=0),
        "jpeg-grey": as_file(color.convert("L"), "JPEG"),
        "jpeg-cmyk": as_file(color.convert("CMYK"), "JPEG"),
        "jpeg-flat": flat_jpeg(rows, adobe=0),
        "jpeg-scans": flat_jpeg(rows, progressive=True, later_scans=9),
        "webp": as_file(color, "WEBP", exif=exif),
        "webp-lossless": as_file(clear, "WEBP", lossless=True),
        "webp-alpha": as_file(clear, "WEBP"),
        "webp-animated": as_file(color, "WEBP", save_all=True, append_images=frames[1:]),
        "gif": as_file(color.quantize(20), "GIF"),
        "gif-clear": as_file(color.quantize(20), "GIF", transparency=3),
        "gif-animated": as_file(color, "GIF", save_all=True, append_images=frames[1:]),
        "bmp": as_file(color, "BMP"),
        "bmp-palette": as_file(color.quantize(16), "BMP"),
        "bmp-bit": as_file(color.convert("1"), "BMP"),
        "bmp-alpha": as_file(clear, "BMP"),
    }
    return tuple(made.items())


def as_file(image: Image.Image, format: str, **options: object) -> bytes:
    """``image`` as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def png_file(header: bytes, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of an IHDR's 13 bytes, ``chunks`` and filtered rows."""
    entries = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return _PNG + b"".join(png_chunk(*entry) for entry in entries)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _interlaced() -> bytes:
    # Eight by eight grey pixels in the seven passes: a filter byte before each row of each.
    rows = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)]
    pixels = b"".join((b"\0" + bytes(range(width))) * height for height, width in rows)
    return png_file(struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1), pixels)


def exif_block(orientation: int, order: str = ">", kind: int = 3, entries: int = 2) -> bytes:
    """An EXIF block of two entries, the second of which is the orientation."""
    width = struct.pack(order + "HHIHH", 0x0100, 3, 1, 999, 0)
    turn = struct.pack(order + "HHIHH", 0x0112, kind, 1, orientation, 0)
    return (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, entries) + width + turn


def mended(data: bytes) -> bytes:
    """A PNG with the right checksum at the end of each chunk that lies within it."""
    made, place = bytearray(data), len(_PNG)
    while place + 12 <= len(made):
        end = place + 8 + int.from_bytes(made[place : place + 4], "big")
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(made[place + 4 : end]))
        place = end + 4
    return bytes(made)


Spoiler = Callable[[random.Random, bytes], bytes]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 12, 40, 200)))


def _flipped(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 12)) if made else 0):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _flipped_in_front(rng: random.Random, data: bytes) -> bytes:
    return _flipped(rng, data[:64]) + data[64:]


def _deleted(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _doubled(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 30)) + data[end:]


def _swapped(rng: random.Random, data: bytes) -> bytes:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[: cuts[0]] + data[cuts[1] : cuts[2]] + data[cuts[0] : cuts[1]] + data[cuts[2] :]


def _extreme(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice((1, 2, 3, 4))
    value = (rng.choice(EXTREMES) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))
    place = rng.randrange(min(len(data), rng.choice((32, 120, 100_000))) + 1)
    return data[:place] + value + data[place + size :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _spliced(rng: random.Random, data: bytes) -> bytes:
    """The beginning of another picture before the rest of this one."""
    _, other = rng.choice(base_pictures())
    return other[: rng.randrange(len(other) + 1)] + data[rng.randrange(len(data) + 1) :]


def _inserted(rng: random.Random, data: bytes) -> bytes:
    """A piece of another picture somewhere in this one."""
    _, other = rng.choice(base_pictures())
    start, end = _span(rng, other)
    place = rng.randrange(len(data) + 1)
    return data[:place] + other[start:end] + data[place:]


_SPOILERS: Sequence[Spoiler] = (
    *(_flipped, _flipped_in_front, _deleted, _doubled, _swapped, _extreme, _extreme, _cut, _spliced, _inserted),
)
