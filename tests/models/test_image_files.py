"""Picture files become the upright RGB picture a viewer shows, or a refusal in our own words."""

import io
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hostile.pictures import base_pictures, check_picture, exif_block, mutated_pictures
from hostile.pictures import png_file as png
from PIL import Image, ImageFile, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sightline_models.config import Normalization
from sightline_models.images import ImageError, PreprocessConfig, decode_image, prepare

MAX_PIXELS = 50_000_000
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def picture(width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray[Any, Any]:
    image = decode_image(data, max_pixels=max_pixels)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_pixels=max_pixels)
    for leaked in ("0x", "BytesIO", "PIL", "<"):
        assert leaked not in caught.value.message
    return caught.value


@pytest.mark.parametrize("format", FORMATS)
def test_the_formats_we_take(format: str) -> None:
    data = encoded(picture(), format)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(decoded(data), np.asarray(expected.convert("RGB")))


# Upright pictures stored turned, as a camera stores them: pixels turned one way, the tag says how to turn them back.
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_I8_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture()
    data = encoded(stored, format, exif=exif, **({"quality": 100} if format != "PNG" else {}))
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        assert upright is not None
        assert np.array_equal(decoded(data), np.asarray(upright.convert("RGB")))
    assert decoded(data).shape[:2] == ((40, 30) if orientation > 4 else (30, 40))


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_I8_broken_exif_is_ignored(exif: bytes) -> None:
    assert np.array_equal(decoded(encoded(picture(), "JPEG", exif=exif)), decoded(encoded(picture(), "JPEG")))


def test_I8_an_orientation_out_of_range_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(decoded(encoded(picture(), exif=exif)), np.asarray(picture()))


def with_alpha(mode: str) -> Image.Image:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    return rgba.convert(mode)


def reference_of(image: Image.Image) -> np.ndarray[Any, Any]:
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.asarray(pixels).transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_I9_alpha_is_laid_on_white_as_the_reference_does(mode: str) -> None:
    if not reference_of(Image.new("RGBA", (1, 1))).any():
        pytest.skip("this transformers drops alpha, as its versions before 5.23 may")
    image = with_alpha(mode)
    assert np.array_equal(decoded(encoded(image)), reference_of(image))


def test_I9_invisible_colours_stay_invisible() -> None:
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    pictures = [
        encoded(hidden),
        encoded(hidden, "WEBP", lossless=True, exact=True),
        encoded(palette, transparency=1),
        encoded(palette, transparency=b"\xff\x00"),
        encoded(palette, "GIF", transparency=1),
        encoded(Image.new("RGB", (8, 8), (255, 0, 0)), transparency=(255, 0, 0)),
        encoded(Image.new("L", (8, 8), 7), transparency=7),
        encoded(Image.new("1", (8, 8), 0), transparency=0),
        encoded(Image.fromarray(np.full((8, 8), 4660, np.uint16)), transparency=4660),
        rgb16_png(transparent=True),
    ]
    for data in pictures:
        assert np.array_equal(decoded(data), np.full_like(decoded(data), 255))
    assert (decoded(rgb16_png(transparent=False)) == [0x12, 0x34, 0x56]).all()


def rgb16_png(*, transparent: bool) -> bytes:
    color = struct.pack(">3H", 0x1278, 0x3478, 0x5678)
    extra = [(b"tRNS", color)] if transparent else []
    return png(struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0), (b"\0" + color * 4) * 2, *extra)


def test_I10_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 32768, 65407, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    made = decoded(encoded(Image.fromarray(values)))
    assert np.array_equal(made, np.repeat(expected[..., None], 3, axis=2))


def test_cmyk_palette_and_1_bit() -> None:
    for image in (picture().convert("P"), picture().convert("1"), picture().convert("L")):
        assert np.array_equal(decoded(encoded(image)), np.asarray(image.convert("RGB")))
    cmyk = encoded(picture().convert("CMYK"), "JPEG", quality=100)
    difference = decoded(cmyk).astype(int) - np.asarray(picture()).astype(int)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_I6_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=10, **options)
    assert (decoded(data) == [255, 0, 0]).all()


def test_I18_a_jpeg_with_more_pictures_behind_it_is_its_first() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 20)])
    assert decoded(data).shape == (30, 40, 3)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "TIFF"),
        encoded(picture(), "ICO"),
        encoded(picture(), "PPM"),
        encoded(picture(), "PDF"),
        encoded(picture(), "EPS"),
        encoded(picture(), "JPEG2000"),
        encoded(picture(), "AVIF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html><img src=x>",
        b"8BPS\0\1" + bytes(20),
        b"SIMPLE  =                    T",
        b"\x00\x00\x00\x18ftypheic",
        b"RIFF\x00\x00\x00\x00WAVE",
        b"\x89",
        b" " + encoded(picture()),
    ],
)
def test_I13_other_formats_are_refused_by_their_bytes(data: bytes) -> None:
    error = refusal(data)
    assert error.code == "unsupported_image_media_type"
    assert "PNG, JPEG, WebP, GIF or BMP" in error.message


def test_I1_nothing_at_all_is_refused() -> None:
    assert refusal(b"").code == "empty_image_file"


def outcome(data: bytes) -> np.ndarray[Any, Any] | ImageError:
    try:
        return decoded(data, max_pixels=1_000_000)
    except ImageError as error:
        return error


@pytest.mark.parametrize("format", FORMATS)
def test_I2_a_cut_file_is_refused_or_loses_nothing(format: str) -> None:
    data = encoded(picture(160, 120), format)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    whole = decoded(data)
    for percent in range(100):
        made = outcome(data[: len(data) * percent // 100])
        if isinstance(made, ImageError):
            assert made.code in ("image_parse_error", "unsupported_image_media_type", "empty_image_file")
        else:
            assert np.array_equal(made, whole), f"{percent} % of the file made another picture"


def test_I3_spoiled_files_decode_or_are_refused() -> None:
    outcomes = [check_picture(data) for _, data in mutated_pictures(7, 3000)]
    assert outcomes.count("decoded") > 300, "most are refused, but the decoders must have been reached"
    assert len(set(outcomes)) > 3


def test_I3_the_pictures_that_are_spoiled_are_whole() -> None:
    assert {check_picture(data) for _, data in base_pictures()} == {"decoded"}
    again = [data for _, data in mutated_pictures(3, 50)]
    assert again == [data for _, data in mutated_pictures(3, 50)]
    assert again != [data for _, data in mutated_pictures(4, 50)]


def test_I4_the_size_is_refused_from_the_header() -> None:
    huge = struct.pack(">IIBBBBB", 13_000, 14_000, 8, 2, 0, 0, 0)
    error = refusal(png(huge, b""))
    assert error.code == "image_too_large"
    assert "13000 x 14000 pixels, 182000000 in all" in error.message
    assert "50000000" in error.message
    assert refusal(png(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0), b"")).code == "image_too_large"
    assert refusal(png(struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0), b"")).code == "image_parse_error"


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "make",
    [
        lambda: webp(b"VP8X", b"\x10\0\0\0" + (15_999).to_bytes(3, "little") * 2 + bytes(20)),
        lambda: webp(b"VP8L", b"\x2f" + (15_999 | 15_999 << 14).to_bytes(4, "little") + bytes(20)),
        lambda: webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_000, 16_000) + bytes(20)),
    ],
    ids=["extended", "lossless", "lossy"],
)
def test_I5_a_webp_canvas_is_measured_before_it_is_made(make: Callable[[], bytes]) -> None:
    error = refusal(make())
    assert error.code == "image_too_large"
    assert "16000 x 16000" in error.message


def test_a_limit_is_reached_and_not_passed() -> None:
    for format in FORMATS:
        data = encoded(picture(40, 30), format)
        assert decoded(data, max_pixels=1200).shape == (30, 40, 3)
        assert refusal(data, max_pixels=1199).code == "image_too_large"


def test_I7_texts_and_profiles_are_never_unpacked() -> None:
    header, pixels = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), b"\0\1\2\3"
    bomb = zlib.compress(bytes(20_000_000), 9)
    notes = [(b"tEXt", b"a\0b")] * 20_000
    bombs = [(b"iCCP", b"p\0\0" + bomb), (b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)] * 40
    for chunks in (notes, bombs):
        data = png(header, pixels, *chunks)
        started = time.process_time()
        assert decoded(data).tolist() == [[[1, 2, 3]]]
        assert time.process_time() - started < 0.1
    assert refusal(png(header, pixels, *notes * 5)).code == "image_parse_error"


def test_I9_texts_are_not_taken_for_what_makes_pixels() -> None:
    # Pillow keeps a PNG's texts beside the transparent colour, under names that the file chooses.
    color, text = (b"tRNS", bytes([0, 1, 0, 2, 0, 3])), (b"tEXt", b"transparency\x007")
    header, pixels = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0), b"\0\1\2\3\4\5\6"
    assert decoded(png(header, pixels, text)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert decoded(png(header, pixels, color, text)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


NORMAL = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
PREPARATIONS = {
    "scaled": PreprocessConfig(None, None, (96, 96), 3, None, NORMAL, 16),
    "cropped": PreprocessConfig(None, 96, None, 3, (96, 96), NORMAL, 16),
    "padded": PreprocessConfig((9, 9, 9), 96, None, 3, (96, 96), NORMAL, 16),
}


@pytest.mark.parametrize("size", [(600, 6_000), (1_080, 6_000), (5_000, 1_000), (4_096, 512)])
def test_I12_long_pictures_as_people_have_them_are_taken(size: tuple[int, int]) -> None:
    """Receipts, scrolled screens, panoramas and banners."""
    for config in PREPARATIONS.values():
        assert prepare(Image.new("RGB", size), config).pixels.shape == (96, 96, 3)


@pytest.mark.parametrize(("kind", "most"), [("cropped", (20, 34_000)), ("padded", (4_000, 20))])
def test_I12_few_pixels_do_not_become_many(kind: str, most: tuple[int, int]) -> None:
    """Each of these files is a few hundred bytes."""
    prepare(Image.new("RGB", most), PREPARATIONS[kind])
    for size in ((3, 32_514), (32_514, 3), (4_100, 20)):
        if kind == "cropped" and min(size) == 20:
            continue
        began = time.process_time()
        with pytest.raises(ImageError, match="more than the 16000000 allowed"):
            prepare(Image.new("RGB", size), PREPARATIONS[kind])
        assert time.process_time() - began < 0.2


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (1, 900), (900, 1), (1, 65_535), (65_535, 1)])
@pytest.mark.parametrize("kind", PREPARATIONS)
def test_I12_narrow_pictures_are_prepared_or_refused(kind: str, size: tuple[int, int]) -> None:
    image = decode_image(encoded(Image.new("RGB", size, (9, 9, 9))), max_pixels=MAX_PIXELS)
    if max(size) > 900 and kind != "scaled":
        with pytest.raises(ImageError) as caught:
            prepare(image, PREPARATIONS[kind])
        assert caught.value.code == "image_aspect_ratio"
        assert "Crop it" in caught.value.message
        return
    prepared = prepare(image, PREPARATIONS[kind])
    assert prepared.num_tokens == 16
    assert (prepared.pixels == np.full((96, 96, 3), 9)).all()


def test_I17_pictures_that_differ_have_other_names() -> None:
    config = PREPARATIONS["scaled"]
    bits, other = bytes(range(30)) * 300, bytes(reversed(range(30))) * 300
    colors = [bytes([value for index in range(256) for value in (index, index, shade)]) for shade in (0, 1)]

    def of(size: tuple[int, int], color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
        samples = {0: 1, 2: 3, 3: 1}[color]
        stride = size[0] * samples
        lines = b"".join(b"\0" + rows[place : place + stride] for place in range(0, size[1] * stride, stride))
        return png(struct.pack(">IIBBBBB", *size, 8, color, 0, 0, 0), lines, *chunks)

    files = {
        "30 x 100": of((30, 100), 2, bits),
        "100 x 30": of((100, 30), 2, bits),
        "other pixels": of((30, 100), 2, other),
        "the same bytes as grey": of((30, 100), 0, bits),
        "as a palette": of((30, 100), 3, bits, (b"PLTE", colors[0])),
        "as another palette": of((30, 100), 3, bits, (b"PLTE", colors[1])),
        "turned": of((30, 100), 2, bits, (b"eXIf", exif_block(6))),
        "mirrored": of((30, 100), 2, bits, (b"eXIf", exif_block(2))),
        "one colour clear": of((30, 100), 2, bits, (b"tRNS", bytes([0, 0, 0, 1, 0, 2]))),
    }
    names = {prepare(decode_image(data, max_pixels=MAX_PIXELS), config).digest for data in files.values()}
    assert len(names) == len(files)
    prepared = {
        prepare(decode_image(files["30 x 100"], max_pixels=MAX_PIXELS), one).digest for one in PREPARATIONS.values()
    }
    assert len(prepared) == len(PREPARATIONS), "the same pixels, prepared otherwise"
    again = encoded(decode_image(files["30 x 100"], max_pixels=MAX_PIXELS), "BMP")
    assert prepare(decode_image(again, max_pixels=MAX_PIXELS), config).digest in names, "the file is not the picture"


WITNESS = """
import builtins, json, sys
events = []
def note(event, args):
    if event in ("open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        events.append((event, str(args[0])))
    if event == "import" and str(args[0]).startswith("PIL."):
        events.append((event, str(args[0])))
from sightline_models.images import ImageError, decode_image
# What is loaded on first use, so that only what a file causes is noted.
data = [bytes.fromhex(line) for line in sys.stdin]
sys.addaudithook(note)
codes = []
for one in data:
    try:
        decode_image(one, max_pixels=1_000_000)
        codes.append("decoded")
    except ImageError as error:
        codes.append(error.code)
plugins = sorted(name for name in sys.modules if name.startswith("PIL.") and name.endswith("Plugin"))
print(json.dumps([events, codes, plugins]))
"""


def test_I13_no_program_is_started_and_no_other_decoder_is_loaded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    mine = [encoded(picture(), format, exif=exif) for format in ("PNG", "JPEG", "WEBP")]
    mine += [encoded(picture(), "GIF"), encoded(picture(), "BMP")]
    others = [
        *(
            encoded(picture(), format)
            for format in ("EPS", "PDF", "TIFF", "ICO", "PPM", "JPEG2000", "ICNS", "PCX", "TGA")
        ),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) run\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"8BPS\0\1" + bytes(20),
        b"SIMPLE  =                    T",
        b"\0\0\0\x18ftypheic" + bytes(16),
        # A page's script that begins as a GIF does, and a GIF's beginning alone.
        b"GIF89a=1;alert(1)//",
        b"GIF89a/*" + bytes(200) + b"*/=1;",
    ]
    sent = "\n".join(data.hex() for data in mine + others)
    ended = subprocess.run([sys.executable, "-c", WITNESS], input=sent, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    events, codes, plugins = json.loads(ended.stdout)
    assert events == []
    assert codes[: len(mine)] == ["decoded"] * len(mine)
    assert set(codes[len(mine) :]) <= {"unsupported_image_media_type", "image_parse_error"}
    assert codes[len(mine) : -2] == ["unsupported_image_media_type"] * (len(others) - 2)
    assert plugins == [f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "WebP")]


def test_I5_a_header_that_lies_is_refused_before_its_pixels_are_made() -> None:
    small, large = (struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0) for side in (4, 6000))
    data = png(small, b"\0" * 20, (b"IHDR", large))
    assert refusal(data).code == "image_parse_error"
