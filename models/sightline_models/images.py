"""Pictures to the pixels a vision tower takes: resize, crop and pad as the checkpoint's processor files say.

Knows pixels and processor files. Knows no file formats (`image_files.py` does), no tensors, no prompts.

The prepared pixels are uint8 and equal those of transformers' PIL backend exactly.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightline_models.checkpoint_folder import find_file, read_settings
from sightline_models.config import CheckpointError, Normalization, VlmConfig
from sightline_models.image_files import ImageError, decode_image

__all__ = [
    "ImageError",
    "Pixels",
    "PreparedImage",
    "PreprocessConfig",
    "decode_image",
    "prepare",
    "read_preprocess_config",
]

Pixels = NDArray[np.uint8]

# Most pixels of any picture made on the way: so many times its own, or so many. A narrow strip grows enormously when
# its short edge is scaled up or it is padded to a square, so a limit on the file's own size is not enough.
MOST_GROWTH, FREE_WORK_PIXELS = 12, 16_000_000
MAX_WORK_PIXELS = 100_000_000

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PROCESSOR_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")


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


def prepare(image: Image.Image, config: PreprocessConfig) -> PreparedImage:
    """Resize, crop and pad an RGB ``image`` as ``config`` says. Raises ImageError for a hopeless aspect ratio."""
    assert image.mode == "RGB", f"decode_image makes RGB, this is {image.mode}"
    digest = _digest(image, config)
    if config.pad_color is not None:
        image = _pad_to_square(image, config.pad_color)
    size = _resized_size(image, config)
    if size is not None:
        _check_work(image, size)
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
    allowed = min(MAX_WORK_PIXELS, max(FREE_WORK_PIXELS, MOST_GROWTH * image.width * image.height))
    if size[0] * size[1] > allowed:
        raise ImageError(
            "image_aspect_ratio",
            f"The image is {image.width} x {image.height} pixels: preparing one so narrow would take "
            f"{size[1]} x {size[0]} pixels, more than the {allowed} allowed. Crop it, or cut it into several.",
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


def read_preprocess_config(folder: Path, config: VlmConfig) -> PreprocessConfig:
    """From ``processor_config.json``'s ``image_processor``, else ``preprocessor_config.json``, of a checkpoint.

    Raises CheckpointError, naming the field, for a processor whose pixels we could not reproduce or that doesn't fit
    the tower.
    """
    processor = _read_settings(folder, "processor_config.json")
    fields = processor.get("image_processor") or _read_settings(folder, "preprocessor_config.json")
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
    for field in ("use_square_size", "pad_size"):
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


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    file = find_file(folder, name)
    return {} if file is None else read_settings(file)


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
