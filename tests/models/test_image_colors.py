"""Which way up a picture is, and which colours: compared with what the formats' standards say, written out by hand."""

import struct
from typing import Any

import numpy as np
import pytest
from hostile.flat_jpegs import flat_jpeg, segment
from hostile.pictures import as_file, exif_block
from hostile.pictures import png_file as png
from PIL import Image

from sightline_models.image_files import decode_image


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    image = decode_image(data, max_pixels=10_000)
    assert image.mode == "RGB"
    return np.asarray(image)


# Of the EXIF standard: which edges of the scene the first row and the first column of the stored picture are.
STORED = [[1, 2, 3], [4, 5, 6]]
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}
GREY = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
GREY_PIXELS = b"\0\1\2\3\0\4\5\6"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 99, 65535])
def test_I8_upright_pictures_as_the_standard_draws_them(orientation: int, order: str) -> None:
    data = png(GREY, GREY_PIXELS, (b"eXIf", exif_block(orientation, order)))
    assert decoded(data)[..., 0].tolist() == UPRIGHT.get(orientation, STORED)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"MM",
        b"XX\0*" + bytes(30),
        exif_block(6)[:-5],
        exif_block(6)[:9],
        exif_block(6, kind=4),
        exif_block(6).replace(b"\0\0\0\x08", b"\xff\xff\xff\xff", 1),
        exif_block(6, entries=1),
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(12) * 10_000,
    ],
)
def test_I8_exif_that_says_nothing(exif: bytes) -> None:
    assert decoded(png(GREY, GREY_PIXELS, (b"eXIf", exif)))[..., 0].tolist() == STORED


def test_I8_the_first_of_several_exif_blocks_counts() -> None:
    two = [(b"eXIf", exif_block(6)), (b"eXIf", exif_block(3))]
    assert decoded(png(GREY, GREY_PIXELS, *two))[..., 0].tolist() == UPRIGHT[6]
    more = exif_block(6, entries=3) + struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0)
    assert decoded(png(GREY, GREY_PIXELS, (b"eXIf", more)))[..., 0].tolist() == UPRIGHT[6]
    flat = flat_jpeg([[(10,), (200,)]])
    noted = flat[:2] + b"".join(segment(0xE1, b"Exif\0\0" + exif_block(turn)) for turn in (8, 1)) + flat[2:]
    assert decoded(noted)[::8, ::8, 0].tolist() == [[200], [10]]


# (bits a sample, colour type, rows with their filter bytes, chunks, the colours that a viewer shows on white)
SHOWN: dict[str, tuple[int, int, bytes, list[tuple[bytes, bytes]], list[list[int]]]] = {
    "palette": (8, 3, b"\0\0\1", [(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))], [[255, 0, 0], [0, 0, 255]]),
    "palette, half clear": (
        *(8, 3, b"\0\0\1"),
        [(b"PLTE", bytes([255, 0, 0, 0, 0, 255])), (b"tRNS", b"\x80\0")],
        [[255, 127, 127], [255, 255, 255]],
    ),
    "palette of 2 bits": (2, 3, b"\0\x40", [(b"PLTE", b"abc\1\2\3"), (b"tRNS", b"\0")], [[1, 2, 3], [255] * 3]),
    "RGB": (8, 2, b"\0\1\2\3\4\5\6", [(b"tRNS", b"\0\4\0\5\0\6")], [[1, 2, 3], [255] * 3]),
    # Samples of 8 bits: the upper byte of the transparent colour's counts for nothing.
    "RGB, odd": (8, 2, b"\0\1\2\3\4\5\6", [(b"tRNS", b"\1\4\2\5\3\6")], [[1, 2, 3], [255] * 3]),
    "RGB of 16 bits": (16, 2, b"\0\x12\x11\x34\x33\x56\x55\xff\xff\x80\x80\0\0", [], [[18, 52, 86], [255, 128, 0]]),
    "grey": (8, 0, b"\0\7\x64", [(b"tRNS", b"\0\7")], [[255] * 3, [100] * 3]),
    "grey, odd": (8, 0, b"\0\7\x64", [(b"tRNS", b"\xff\7")], [[255] * 3, [100] * 3]),
    "grey of 1 bit": (1, 0, b"\0\x40", [(b"tRNS", b"\0\0")], [[255] * 3, [255] * 3]),
    "grey of 1 bit, white clear": (1, 0, b"\0\x40", [(b"tRNS", b"\0\1")], [[0] * 3, [255] * 3]),
    "grey of 2 bits": (2, 0, b"\0\x60", [(b"tRNS", b"\0\1")], [[255] * 3, [170] * 3]),
    "grey of 4 bits": (4, 0, b"\0\x73", [(b"tRNS", b"\0\7")], [[255] * 3, [51] * 3]),
    "grey of 4 bits, odd": (4, 0, b"\0\x73", [(b"tRNS", b"\xff\xf7")], [[255] * 3, [51] * 3]),
    "grey of 16 bits": (16, 0, b"\0\x12\x34\x80\0", [(b"tRNS", b"\x12\x34")], [[255] * 3, [128] * 3]),
    "grey and alpha": (8, 4, b"\0\0\x80\0\0", [], [[127] * 3, [255] * 3]),
    "grey and alpha of 16 bits": (16, 4, b"\0\0\0\x80\x80\0\0\0\0", [], [[127] * 3, [255] * 3]),
    "RGBA": (8, 6, b"\0\xff\0\0\0\0\0\xff\x40", [], [[255] * 3, [191, 191, 255]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHOWN)
def test_I9_I10_colours_as_a_viewer_shows_them_on_white(kind: str) -> None:
    depth, color, rows, chunks, expected = SHOWN[kind]
    made = decoded(png(struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0), rows, *chunks))[0]
    tolerance = 1 if "alpha" in kind or "half" in kind or "RGBA" in kind else 0
    assert np.abs(made.astype(int) - np.array(expected)).max() <= tolerance


def test_I9_where_a_first_frame_does_not_reach_is_white() -> None:
    palette = bytes([10, 20, 30, 200, 100, 50])
    head = b"GIF89a" + struct.pack("<HHBBB", 3, 2, 0x80, 0, 0) + palette
    # One pixel of the second colour, at (1, 1): clear code, 1, end, of three bits each.
    frame = b"," + struct.pack("<HHHHB", 1, 1, 1, 1, 0) + b"\2\2\x4c\1\0;"
    white, shown = [255] * 3, [200, 100, 50]
    assert decoded(head + frame).tolist() == [[white] * 3, [white, shown, white]]
    clear = b"!\xf9\4" + bytes([1, 0, 0, 1]) + b"\0"
    assert (decoded(head + clear + frame) == 255).all()


def test_I11_cmyk_as_adobe_stores_it() -> None:
    """Inks are stored inverted, and printed on white: red, green and blue are what the four inks leave of it."""
    stored = [[(255, 255, 255, 255), (0, 255, 255, 255), (255, 0, 255, 255), (255, 255, 0, 255)]]
    stored += [[(255, 255, 255, 0), (128, 64, 200, 100), (10, 20, 30, 250), (0, 0, 0, 255)]]
    expected = np.array(stored, float)[..., :3] * np.array(stored, float)[..., 3:] / 255
    made = decoded(flat_jpeg(stored, adobe=0))
    assert made.shape == (16, 32, 3)
    assert np.abs(made[::8, ::8] - expected).max() <= 2
    assert np.abs(made[7::8, 7::8] - expected).max() <= 2


def test_I11_ycck_as_adobe_stores_it() -> None:
    stored = [[(255, 128, 128, 255), (0, 128, 128, 255), (76, 85, 255, 255), (150, 44, 21, 200)]]
    y, cb, cr, k = np.moveaxis(np.array(stored, float), -1, 0)
    rgb = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])
    expected = np.moveaxis((255 - rgb.clip(0, 255)) * k / 255, 0, -1)
    assert np.abs(decoded(flat_jpeg(stored, adobe=2))[::8, ::8] - expected).max() <= 2


def test_I11_colour_transforms_of_jpeg() -> None:
    stored = [[(120, 60, 200), (30, 220, 90)]]
    y, cb, cr = np.moveaxis(np.array(stored, float), -1, 0)
    rgb = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])
    expected = np.moveaxis(rgb.clip(0, 255), 0, -1)
    assert np.abs(decoded(flat_jpeg(stored, adobe=1))[::8, ::8] - expected).max() <= 2
    assert np.abs(decoded(flat_jpeg(stored))[::8, ::8] - expected).max() <= 2
    assert decoded(flat_jpeg(stored, adobe=0))[::8, ::8].tolist() == [[list(sample) for sample in stored[0]]]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("profile", [b"", b"no profile", b"\0" * 200, bytes(range(256)) * 40])
def test_I11_profiles_good_or_bad_change_nothing(profile: bytes) -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        plain, noted = (as_file(noise(40, 30), format, icc_profile=icc, **options) for icc in (None, profile))
        assert np.array_equal(decoded(noted), decoded(plain))
    damaged = png(GREY, GREY_PIXELS, (b"iCCP", b"p\0\0not deflated"))
    assert decoded(damaged)[..., 0].tolist() == STORED
