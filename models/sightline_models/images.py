"""Picture files into the pixels a vision tower takes: decode, make upright RGB, then resize, crop and pad.

Knows picture formats, Pillow and the checkpoint's processor files. Knows no tensors, no prompts, no processes.

The prepared pixels are uint8 and equal those of transformers' PIL backend exactly. What a file's bytes say decides
its format; a name or a media type is never asked. Of an animated picture the first frame counts. Colour profiles are
ignored, as they are by the processors that the models were trained with.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from sightline_models.config import CheckpointError, Normalization, VlmConfig

Pixels = NDArray[np.uint8]

# Most pixels of any picture made on the way. A narrow strip grows enormously when its short edge is scaled up or it is
# padded to a square, so a limit on the file's own size is not enough.
MAX_WORK_PIXELS = 100_000_000

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

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PROCESSOR_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")


class ImageError(ValueError):
    """A picture that can't be used. ``code`` is one of the API's image error codes; ``message`` is ours alone, never
    a library's, which may hold addresses."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class PreprocessConfig:
    """What happens to an upright RGB picture, in the order of the fields. Sizes are (height, width) in pixels."""

    pad_color: tuple[int, int, int] | None
    """Pad to a square with this colour first."""
    shortest_edge: int | None
    """Scale to this length of the shorter edge, aspect ratio kept."""
    resize: tuple[int, int] | None
    """Scale to exactly this size."""
    resample: int
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None
    """Cut this out of the middle; what lies outside the picture is black."""
    normalization: Normalization
    num_tokens: int
    """Decoder positions one picture takes."""

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ when anything differs that pixels or tower input depend on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PreprocessConfig":
        fields = json.loads(text)
        norm = fields.pop("normalization")
        pairs = {name: _tuple_or_none(fields.pop(name)) for name in ("pad_color", "resize", "crop")}
        normalization = Normalization(tuple(norm["mean"]), tuple(norm["std"]), norm["rescale_factor"])
        return cls(**fields, **pairs, normalization=normalization)


@dataclass(frozen=True)
class PreparedImage:
    """What the tower gets, and its identity."""

    pixels: Pixels
    """[H, W, 3], C-contiguous."""
    num_tokens: int
    digest: bytes
    """32 bytes over the decoded picture's pixels, size and mode, and the preprocessing."""


# --- the file ---


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
            with open_file(BytesIO(data)) as image:
                _check_size(image.size, max_pixels)
                image.load()
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
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
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
        raise ImageError("image_parse_error", f"The image is {width}x{height} pixels: it has no area.")
    if width * height > max_pixels:
        raise ImageError(
            "image_too_large",
            f"The image has {width}x{height} = {width * height} pixels; at most {max_pixels} are allowed. Scale it "
            "down.",
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
    values = np.asarray(image).astype(np.int64)
    grey = ((np.clip(values, 0, 65535) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


# --- the pixels ---


def prepare(image: Image.Image, config: PreprocessConfig) -> PreparedImage:
    """Resize, crop and pad an RGB ``image`` as ``config`` says. Raises ImageError for a hopeless aspect ratio."""
    assert image.mode == "RGB", f"decode_image makes RGB, this is {image.mode}"
    digest = _digest(image, config)
    if config.pad_color is not None:
        image = _pad_to_square(image, config.pad_color)
    size = _resized_size(image, config)
    if size is not None:
        _check_work(image, size)
        # On arrays, as the reference does it: Pillow resizes the same either way.
        image = image.resize((size[1], size[0]), resample=config.resample)
    pixels = np.asarray(image)
    if config.crop is not None:
        pixels = _center_crop(pixels, config.crop)
    return PreparedImage(np.ascontiguousarray(pixels), config.num_tokens, digest)


def _digest(image: Image.Image, config: PreprocessConfig) -> bytes:
    state = hashlib.sha256(config.digest)
    state.update(f"{image.mode} {image.width} {image.height} ".encode())
    # In strips, so that a large picture isn't held twice.
    for top in range(0, image.height, 512):
        state.update(image.crop((0, top, image.width, min(top + 512, image.height))).tobytes())
    return state.digest()


def _resized_size(image: Image.Image, config: PreprocessConfig) -> tuple[int, int] | None:
    if config.shortest_edge is None:
        return config.resize
    short, long = sorted(image.size)
    scaled = int(config.shortest_edge * long / short)
    return (scaled, config.shortest_edge) if image.width <= image.height else (config.shortest_edge, scaled)


def _check_work(image: Image.Image, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_WORK_PIXELS:
        raise ImageError(
            "image_aspect_ratio",
            f"The image is {image.width}x{image.height} pixels: preparing one so narrow would take "
            f"{size[1]}x{size[0]} pixels, more than the {MAX_WORK_PIXELS} allowed. Crop it, or cut it into several.",
        )


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    _check_work(image, (side, side))
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _center_crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of ``pixels`` [H, W, 3], as [size[0], size[1], 3].

    Where the picture is smaller than the crop it stands in black, and where the margin is odd the extra line is on
    the side where the reference has it.
    """
    for axis, wanted in enumerate(size):
        have = pixels.shape[axis]
        start = (have - wanted) // 2
        if start < 0:
            grown = list(pixels.shape)
            grown[axis] = wanted
            before = math.ceil((wanted - have) / 2)
            canvas = np.zeros(grown, dtype=np.uint8)
            canvas[(slice(None),) * axis + (slice(before, before + have),)] = pixels
            pixels, start = canvas, start + before
        pixels = pixels[(slice(None),) * axis + (slice(start, start + wanted),)]
    return pixels


# --- the checkpoint's processor files ---


def read_preprocess_config(folder: Path, config: VlmConfig) -> PreprocessConfig:
    """From ``processor_config.json``'s ``image_processor``, else ``preprocessor_config.json``, of a checkpoint.

    Raises CheckpointError, naming the field, for a processor whose pixels we could not reproduce or that doesn't fit
    the tower.
    """
    processor = _read_json(folder / "processor_config.json")
    fields = processor.get("image_processor") or _read_json(folder / "preprocessor_config.json")
    if not isinstance(fields, dict) or not fields:
        raise CheckpointError(
            f"{folder.name} has no preprocessor_config.json and no image_processor in processor_config.json: pictures "
            "can't be prepared as the model was trained. Copy the file from the original checkpoint."
        )
    _check_token_count(processor, config)
    kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "CLIPImageProcessor")
    base = kind.removesuffix("Fast").removesuffix("Pil")
    if base not in _PROCESSOR_TYPES:
        raise CheckpointError(
            f"image_processor_type {kind!r} is not supported; this release prepares pictures as "
            f"{' or '.join(_PROCESSOR_TYPES[::2])} does."
        )
    for field in ("auto_map", "use_square_size", "pad_size"):
        if fields.get(field):
            raise CheckpointError(f"The image processor's field {field!r} is not supported by this release.")
    pads = bool(fields.get("do_pad"))
    if pads and base != "LlavaImageProcessor":
        raise CheckpointError(
            f"The image processor's do_pad is supported for LlavaImageProcessor only, not for {kind}."
        )

    mean = _three(fields, "image_mean", _CLIP_MEAN)
    shortest_edge, resize = _read_size(fields)
    crop = _read_crop(fields)
    _check_shape(crop, resize, shortest_edge if pads else None, config.vision.image_size)
    normalize = fields.get("do_normalize") is not False
    return PreprocessConfig(
        pad_color=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)) if pads else None,
        shortest_edge=shortest_edge,
        resize=resize,
        resample=_read_resample(fields),
        crop=crop,
        normalization=Normalization(
            mean=mean if normalize else (0.0, 0.0, 0.0),
            std=_three(fields, "image_std", _CLIP_STD) if normalize else (1.0, 1.0, 1.0),
            rescale_factor=_read_rescale(fields),
        ),
        num_tokens=config.num_image_tokens,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path.name} can't be read as JSON; copy it from the original checkpoint.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _check_token_count(processor: Mapping[str, Any], config: VlmConfig) -> None:
    expected: dict[str, Any] = {
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": config.select_strategy,
        "num_additional_image_tokens": 1,
    }
    for field, value in expected.items():
        given = processor.get(field)
        if given is not None and given != value:
            raise CheckpointError(
                f"processor_config.json says {field} is {given!r}, but the model in config.json needs {value!r}: an "
                f"image would not take {config.num_image_tokens} tokens. Correct the file that is wrong."
            )


def _read_size(fields: Mapping[str, Any]) -> tuple[int | None, tuple[int, int] | None]:
    if fields.get("do_resize") is False:
        return None, None
    size = fields.get("size", {"shortest_edge": 224})
    if isinstance(size, int):
        return size, None
    if isinstance(size, dict):
        given = {name: edge for name, edge in size.items() if edge is not None}
        if all(isinstance(edge, int) and edge > 0 for edge in given.values()):
            if given.keys() == {"shortest_edge"}:
                return given["shortest_edge"], None
            if given.keys() == {"height", "width"}:
                return None, (given["height"], given["width"])
    raise CheckpointError(
        f"The image processor's size {size!r} is not supported: give shortest_edge, or height and width."
    )


def _read_crop(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    if fields.get("do_center_crop") is False:
        return None
    crop = fields.get("crop_size", 224)
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    try:
        return int(crop["height"]), int(crop["width"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"The image processor's crop_size {crop!r} must have height and width.") from None


def _check_shape(
    crop: tuple[int, int] | None, resize: tuple[int, int] | None, squared: int | None, image_size: int
) -> None:
    made = crop or resize or (None if squared is None else (squared, squared))
    if made is None:
        raise CheckpointError(
            "The image processor makes pictures of varying size (no crop, no fixed height and width), which this "
            f"vision tower of {image_size}x{image_size} pixels can't take."
        )
    if made != (image_size, image_size):
        raise CheckpointError(
            f"The image processor makes {made[1]}x{made[0]} pixels, but vision_config.image_size in config.json is "
            f"{image_size}. Correct the file that is wrong."
        )


def _read_resample(fields: Mapping[str, Any]) -> int:
    resample = fields.get("resample", int(Image.Resampling.BICUBIC))
    if resample not in [int(method) for method in Image.Resampling]:
        raise CheckpointError(f"The image processor's resample {resample!r} is no filter of Pillow (0 to 5).")
    return int(resample)


def _read_rescale(fields: Mapping[str, Any]) -> float:
    return 1.0 if fields.get("do_rescale") is False else float(fields.get("rescale_factor", 1 / 255))


def _three(fields: Mapping[str, Any], name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = fields.get(name) or default
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"The image processor's {name} must be three numbers, not {value!r}.")
    return float(value[0]), float(value[1]), float(value[2])


def _tuple_or_none(value: Any) -> Any:
    return None if value is None else tuple(value)
