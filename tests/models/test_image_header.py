"""Headers are read from bytes alone: the right size of every kind of file, and a quick refusal of those that lie,
boast or never end."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hostile.flat_jpegs import flat_jpeg, segment
from hostile.pictures import mended, png_file
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sightline_models import image_header
from sightline_models.image_files import decode_image
from sightline_models.image_header import MAX_FRAMES, MAX_SCANS, ImageError, ImageHeader, check_size, read_header

MAX_PIXELS = 50_000_000
REFUSED_WITHIN_S = 0.05
MEMORY_OF_A_REFUSAL = 5_000_000


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def refusal(data: bytes) -> ImageError:
    """What a request would be told before anything is decoded, or decoding would be."""
    with pytest.raises(ImageError) as caught:
        check_size(read_header(data), MAX_PIXELS)
    return caught.value


def outcome(data: bytes) -> ImageHeader | ImageError:
    try:
        return read_header(data)
    except ImageError as error:
        return error


def quick_refusal(data: bytes) -> ImageError:
    """The refusal, which must cost little: processor time, so that a busy machine fails nothing, and memory."""
    started = time.process_time()
    error = refusal(data)
    assert time.process_time() - started < REFUSED_WITHIN_S
    tracemalloc.start()
    try:
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_OF_A_REFUSAL
    finally:
        tracemalloc.stop()
    return error


def ihdr(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def canvas(width: int, height: int, flags: int = 0x10) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def lossy(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(4)


def lossless(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little")


def gif(screen: tuple[int, int], *blocks: bytes, frame: tuple[int, int, int, int] | None = None) -> bytes:
    frame = frame or (0, 0, *screen)
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"".join(blocks) + b"," + struct.pack("<HHHHB", *frame, 0) + b"\2\1\0\0;"


def bmp(width: int, height: int, *, size: int = 40, bits: int = 24, packing: int = 0, rows: int | None = None) -> bytes:
    if size == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHI", size, width, height, 1, bits, packing) + bytes(size - 20)
    stride = (width * bits + 31) // 32 * 4
    data = bytes(max(stride, 0) * (abs(height) if rows is None else rows))
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data


def sof(marker: int, width: int, height: int, *, precision: int = 8, components: int = 3) -> bytes:
    rows = b"".join(bytes([index + 1, 0x11, 0]) for index in range(components))
    return segment(marker, struct.pack(">BHHB", precision, height, width, components) + rows)


def jpeg(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + segment(0xDA, b"\1\1\0\0\x3f\0") + b"\0\xff\xd9"


MODES = {
    "PNG": ["RGB", "L", "RGBA", "P", "1", "LA", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["RGB", "L", "P", "1", "RGBA"],
    "BMP": ["RGB", "L", "P", "1", "RGBA"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_sizes_of_what_encoders_write(format: str, mode: str) -> None:
    data = encoded(Image.new(mode, (41, 30)), format)
    header = read_header(data)
    assert (header.format.upper(), header.width, header.height) == (format, 41, 30)
    assert (header.frames, header.box, header.exif) == (1, None, b"")
    assert 1 <= header.parts < 20


def test_sizes_of_other_kinds() -> None:
    kinds = [
        encoded(noise(300, 200), "JPEG", progressive=True),
        encoded(noise(300, 200), "JPEG", restart_marker_blocks=2, subsampling=0),
        encoded(noise(300, 200), "WEBP", lossless=True),
        encoded(noise(300, 200), "WEBP", exif=Image.Exif(), icc_profile=b"x" * 333),
        encoded(noise(300, 200), "PNG", pnginfo=None, compress_level=0),
        b"\xff\xd8\xff" + encoded(noise(300, 200), "JPEG")[2:],
        *(bmp(300, 200, size=size) for size in (12, 40, 52, 56, 64, 108, 124)),
        bmp(300, -200),
        *(bmp(300, 200, bits=bits) for bits in (1, 4, 8, 16, 32)),
        bmp(300, 200, bits=16, packing=3, size=108),
        webp(canvas(300, 200), (b"ICCP", b"abc"), lossy(300, 200)),
    ]
    assert {(read_header(data).width, read_header(data).height) for data in kinds} == {(300, 200)}
    assert 2 < read_header(kinds[0]).scans < 12
    assert read_header(kinds[0]).parts < 40


def test_what_lies_behind_a_seam_of_the_search_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    expected = read_header(data)
    for piece in (1, 2, 3, 7, 64):
        monkeypatch.setattr(image_header, "_SEARCHED_AT_ONCE", piece)
        assert read_header(data) == expected


def test_I1_no_bytes_and_one_byte() -> None:
    assert refusal(b"").code == "empty_image_file"
    for byte in range(256):
        assert refusal(bytes([byte])).code == "unsupported_image_media_type"


SIGNATURES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\xff\0\0WEBP", b"GIF89a", b"BM"]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
def test_I3_any_bytes_behind_a_signature_are_a_header_or_an_image_error(signature: bytes, rest: bytes) -> None:
    header = outcome(signature + rest)
    if isinstance(header, ImageError):
        assert header.code in ("image_parse_error", "unsupported_image_media_type")
    else:
        assert header.pixels > 0


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_I2_I3_every_beginning_of_a_file_is_a_header_or_an_image_error(format: str) -> None:
    data = encoded(noise(20, 10), format)
    whole = read_header(data)
    for length in range(len(data)):
        header = outcome(data[:length])
        if isinstance(header, ImageError):
            assert "whole file" in header.message or header.code != "image_parse_error"
        else:
            assert (header.width, header.height) == (whole.width, whole.height)
            assert format in ("JPEG", "GIF"), "the others say how long they are"


BOMBS: dict[str, Callable[[], bytes]] = {
    "png 182 MP": lambda: png_file(ihdr(13_000, 14_000), bytes(10_000_000)),
    "png 2^31-1": lambda: png_file(ihdr(2**31 - 1, 2**31 - 1), b""),
    "png 2^32-1": lambda: png_file(ihdr(2**32 - 1, 2**32 - 1), b""),
    "png 1 bit": lambda: png_file(ihdr(9_000, 9_000, 1, 0), bytes(9_000 * 1126)),
    "jpeg": lambda: jpeg(sof(0xC0, 65_535, 65_535)),
    "jpeg progressive": lambda: jpeg(sof(0xC2, 8_000, 8_000)),
    "webp lossy": lambda: webp(lossy(16_383, 16_383)),
    "webp lossless": lambda: webp(lossless(8_000, 8_000)),
    "webp canvas": lambda: webp(canvas(2**24, 2**24), lossy(1, 1), (b"ANMF", bytes(16))),
    "gif screen": lambda: gif((65_535, 65_535)),
    "gif frame": lambda: gif((1, 1), frame=(65_535, 65_535, 1, 1)),
    "bmp": lambda: bmp(20_000, 20_000, bits=1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_I4_I5_a_bomb_is_refused_from_its_header(name: str) -> None:
    data = BOMBS[name]()
    error = quick_refusal(data)
    assert error.code == "image_too_large"
    assert str(MAX_PIXELS) in error.message
    assert "Scale it down" in error.message


def test_I5_formats_that_make_the_smallest_bombs_are_not_read_at_all() -> None:
    for data in (
        encoded(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"),
        encoded(Image.new("L", (800, 800)), "JPEG2000"),
        encoded(Image.new("L", (800, 800)), "AVIF"),
        b"\0\0\0\x20ftypavif" + bytes(1000),
        b"\xff\x4f\xff\x51" + bytes(400),
    ):
        assert quick_refusal(data).code == "unsupported_image_media_type"


def test_I4_I12_pictures_without_an_area() -> None:
    for data in (
        png_file(ihdr(0, 5), b""),
        png_file(ihdr(5, 0), b""),
        jpeg(sof(0xC0, 5, 0)),
        jpeg(sof(0xC0, 0, 5)),
        gif((5, 5), frame=(0, 0, 5, 0)),
        webp(lossy(0, 5)),
        bmp(0, 5),
        bmp(5, 0),
        bmp(-5, 5, rows=5),
    ):
        error = quick_refusal(data)
        assert error.code == "image_parse_error"
        assert "no area" in error.message


def test_I6_frames_are_counted_and_no_frame_is_read() -> None:
    frames = [noise(16 + index, 16).crop((0, 0, 16, 16)) for index in range(40)]
    for format in ("PNG", "WEBP", "GIF"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert read_header(data).frames == (1 if format == "GIF" else 40)
    anmf = b"ANMF", bytes(16)
    assert read_header(webp(canvas(5, 5), *[anmf] * MAX_FRAMES)).frames == MAX_FRAMES
    assert "frames" in refusal(webp(canvas(5, 5), *[anmf] * (MAX_FRAMES + 1))).message
    count = (b"acTL", struct.pack(">II", MAX_FRAMES + 1, 0))
    assert "frames" in refusal(png_file(ihdr(1, 1), b"", count)).message


def test_I6_where_a_first_frame_lies() -> None:
    assert read_header(gif((20, 10), frame=(3, 4, 5, 6))).box == (3, 4, 8, 10)
    assert read_header(gif((20, 10), frame=(18, 0, 5, 10))).box == (18, 0, 23, 10)
    assert read_header(gif((20, 10), frame=(18, 0, 5, 10))).width == 23
    assert read_header(gif((20, 10))).box is None
    frame = (b"ANMF", (2).to_bytes(3, "little") * 2 + (4).to_bytes(3, "little") * 2 + bytes(4))
    assert read_header(webp(canvas(20, 10), frame)).box == (4, 4, 9, 9)
    assert refusal(webp(canvas(8, 10), frame)).code == "image_parse_error"


ENDLESS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "png": (lambda count: png_file(ihdr(1, 1), b"", *[(b"tEXt", b"a\0b")] * count), "chunks"),
    "png pixels": (lambda count: png_file(ihdr(1, 1), b"", *[(b"IDAT", b"")] * count), "chunks"),
    "jpeg": (lambda count: jpeg(segment(0xFE, b"") * count, sof(0xC0, 1, 1)), "segments"),
    "webp": (lambda count: webp(lossy(1, 1), *[(b"ABCD", b"")] * count), "chunks"),
    "gif": (lambda count: gif((1, 1), b"!\xfe" + b"\1a" * count + b"\0"), "blocks"),
    "gif empty": (lambda count: gif((1, 1), b"!\xfe\0" * count), "blocks"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_I7_files_of_a_hundred_thousand_parts_are_refused(kind: str) -> None:
    make, named = ENDLESS[kind]
    error = refusal(make(100_000))
    assert error.code == "image_parse_error"
    assert named in error.message
    read_header(make(1000))


def test_I7_the_longest_walks_end_soon() -> None:
    """Twenty mebibytes that make each step as dear as can be."""
    longest = [
        flat_jpeg([[(1,)]], progressive=True)[:-2] + b"\xff\0" * (10 << 20),
        b"\xff\xd8\xff" + b"\xff" * (20 << 20),
        gif((1, 1), b"!\xfe" + b"\xff" * (20 << 20)),
        png_file(ihdr(1, 1), b"")[:-12] + bytes(20 << 20),
        webp(lossy(1, 1))[:-1] + bytes(20 << 20),
    ]
    for data in longest:
        started = time.process_time()
        outcome(data)
        assert time.process_time() - started < 1.0


def test_I7_sizes_that_are_claimed_are_not_allocated() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    chunks = [(b"iCCP", b"p\0\0" + bomb), (b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)]
    for data in (
        png_file(ihdr(2, 1), b"\0" * 7, *chunks),
        png_file(ihdr(2, 1), b"\0" * 7) + b"\xff" * 8,
        jpeg(b"\xff\xe2\xff\xff"),
        webp(lossy(1, 1))[:-10] + b"\xff" * 10,
        png_file(ihdr(1, 1), b"").replace(struct.pack(">I", 8), b"\xff\xff\xff\xff"),
        png_file(ihdr(1, 1), b"").replace(struct.pack(">I", 8), b"\x7f\xff\xff\xff"),
    ):
        tracemalloc.start()
        try:
            outcome(data)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("marker", "name"),
    [(0xC3, "lossless"), (0xC5, "hierarchical"), (0xC9, "arithmetic"), (0xCA, "arithmetic"), (0xCF, "hierarchical")],
)
def test_I13_kinds_of_jpeg_that_are_refused_by_name(marker: int, name: str) -> None:
    error = refusal(jpeg(sof(marker, 8, 8)))
    assert error.code == "unsupported_image_media_type"
    assert name in error.message
    assert "PNG" in error.message


def test_I13_other_kinds_that_are_refused_by_name() -> None:
    for data, name in (
        (jpeg(sof(0xC0, 8, 8, precision=12)), "12 bits"),
        *((bmp(8, 8, bits=8, packing=packing), "compressed BMP") for packing in (1, 2, 4, 5, 6, 11)),
        (bmp(8, 8, bits=64), "64 bits"),
    ):
        error = refusal(data)
        assert error.code == "unsupported_image_media_type"
        assert name in error.message
        assert "Save" in error.message


@pytest.mark.parametrize(
    "data",
    [
        jpeg(sof(0xC0, 8, 8), sof(0xC0, 8, 8)),
        jpeg(sof(0xC0, 8, 8, components=2)),
        jpeg(segment(0xC0, b"\x08\0\x08\0\x08\3")),
        jpeg(),
        b"\xff\xd8" + sof(0xC0, 8, 8) + b"\xff\xd9",
        png_file(ihdr(1, 1, depth=3), b""),
        png_file(ihdr(1, 1, depth=16, color=3), b""),
        png_file(ihdr(1, 1, color=7), b""),
        webp(canvas(9, 9), lossy(8, 9)),
        webp((b"VP8L", b"\x2e" + bytes(4))),
        webp((b"VP8 ", bytes(10))),
        webp((b"ALPH", b"x")),
        b"RIFF\xff\xff\xff\xffWEBP" + bytes(40),
        bmp(8, 8, rows=7)[:-4],
        bmp(8, 8, size=40)[:14] + b"\x29" + bytes(60),
        gif((8, 8))[:26],
        b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"x" * 40,
        b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";",
    ],
)
def test_I3_headers_that_contradict_themselves(data: bytes) -> None:
    assert refusal(data).code == "image_parse_error"


def test_I18_scans_of_a_jpeg_are_counted() -> None:
    for later in (0, 9, MAX_SCANS - 1):
        data = flat_jpeg([[(9,)]], progressive=True, later_scans=later)
        assert read_header(data).scans == later + 1
    for later in (MAX_SCANS, 5000):
        error = quick_refusal(flat_jpeg([[(9,)]], progressive=True, later_scans=later))
        assert error.code == "image_parse_error"
        assert f"{MAX_SCANS} scans" in error.message
    # A baseline picture ends with its only scan: what follows is never read, so it isn't walked.
    assert read_header(flat_jpeg([[(9,)]], later_scans=5000)).scans == 1


def test_I18_pictures_behind_the_first_are_not_walked() -> None:
    first = encoded(noise(40, 30), "JPEG", progressive=True)
    alone = read_header(first)
    assert read_header(first + encoded(noise(4000, 10), "JPEG") * 3) == alone


# Found by tests/fuzz/fuzz_image_header.py.
@pytest.mark.parametrize(
    "exif",
    [b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\0", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0"],
)
def test_I8_an_orientation_that_is_none_of_the_eight(exif: bytes) -> None:
    data = png_file(ihdr(2, 1), b"\0\1\2\3\4\5\6", (b"eXIf", exif))
    assert read_header(data).exif == exif
    assert decode_image(data, max_pixels=MAX_PIXELS).size == (2, 1)


def test_the_helpers_of_these_tests_write_true_files() -> None:
    data = png_file(ihdr(2, 1), b"\0" * 7)
    assert [decode_image(file, max_pixels=64).width for file in (bmp(8, -8), bmp(8, 8, size=12), data)] == [8, 8, 2]
    spoiled = data[:29] + b"abcd" + data[33:]
    assert mended(spoiled) == mended(data) == data != spoiled
