"""Prepared pixels equal those of transformers' PIL backend, for every shape and processor we accept."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sightline_models.config import CheckpointError, VlmConfig, read_config
from sightline_models.images import ImageError, PreprocessConfig, prepare, read_preprocess_config
from sightline_models.presets import demo_checkpoint

SIDE = 96
SHAPES = [
    (1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (3, 1000), (1000, 3), (95, 96), (96, 95), (96, 96), (97, 96), (97, 97),
    (96, 193), (193, 96), (47, 48), (640, 480), (480, 640), (101, 203), (203, 101), (1920, 1080), (31, 17), (1500, 64),
]  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    coarse = rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height))).astype(int)
    return Image.fromarray((smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8))


def config_for(tmp_path: Path, fields: dict[str, Any], *, nested: bool = False) -> PreprocessConfig:
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    return read_preprocess_config(tmp_path, demo_config())


def demo_config() -> VlmConfig:
    return read_config(demo_checkpoint())


def reference(processor: Any, image: Image.Image) -> np.ndarray[Any, Any]:
    made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return np.asarray(made[0]).transpose(1, 2, 0)


CLIP: dict[str, dict[str, Any]] = {
    "crop": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    "bilinear": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 2},
    "ints": {"size": SIDE, "crop_size": SIDE, "resample": 3},
    "exact": {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "resample": 3},
    "larger": {"size": {"shortest_edge": 110}, "crop_size": {"height": SIDE, "width": SIDE}},
    "smaller": {"size": {"shortest_edge": 51}, "crop_size": {"height": SIDE, "width": SIDE}},
    "unscaled": {"do_resize": False, "crop_size": {"height": SIDE, "width": SIDE}},
}
LLAVA: dict[str, dict[str, Any]] = {
    "padded": {"do_pad": True, "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    "padded uncropped": {"do_pad": True, "size": {"shortest_edge": SIDE}, "do_center_crop": False, "resample": 2},
    "padded exact": {"do_pad": True, "size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    "unpadded": {"do_pad": False, "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
}


@pytest.mark.parametrize("fields", CLIP.values(), ids=CLIP.keys())
def test_clip_pixels_equal_the_reference(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = config_for(tmp_path, {"image_processor_type": "CLIPImageProcessor", **fields})
    processor = CLIPImageProcessorPil(**fields)
    for width, height in SHAPES:
        image = picture(width, height)
        assert np.array_equal(prepare(image, config).pixels, reference(processor, image)), (width, height)


@pytest.mark.parametrize("fields", LLAVA.values(), ids=LLAVA.keys())
def test_llava_pixels_equal_the_reference(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = config_for(tmp_path, {"image_processor_type": "LlavaImageProcessorFast", **fields}, nested=True)
    processor = LlavaImageProcessorPil(**fields)
    for width, height in SHAPES:
        image = picture(width, height)
        assert np.array_equal(prepare(image, config).pixels, reference(processor, image)), (width, height)


def test_the_pixels_are_ready_to_send() -> None:
    config = read_preprocess_config(demo_checkpoint(), demo_config())
    made = prepare(picture(50, 80), config)
    assert made.pixels.flags.c_contiguous
    assert made.pixels.dtype == np.uint8
    assert made.pixels.shape == (SIDE, SIDE, 3)
    assert made.num_tokens == 144


def test_the_digest_tells_pictures_and_processing_apart() -> None:
    config = read_preprocess_config(demo_checkpoint(), demo_config())
    flat = np.arange(30 * 100 * 3, dtype=np.uint32).astype(np.uint8)
    shapes = [Image.fromarray(flat.reshape(height, -1, 3)) for height in (30, 100, 1, 3000)]
    one_off = flat.copy()
    one_off[-1] ^= 1
    images = [*shapes, Image.fromarray(one_off.reshape(30, -1, 3))]
    digests = [prepare(image, config).digest for image in images]
    digests += [prepare(images[0], replace(config, resample=2)).digest]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {32}
    assert prepare(images[0].copy(), config).digest == digests[0]


def test_the_config_survives_the_way_to_a_worker(tmp_path: Path) -> None:
    for number, fields in enumerate(itertools.chain(CLIP.values(), LLAVA.values())):
        folder = tmp_path / str(number)
        folder.mkdir()
        kind = "LlavaImageProcessor" if "do_pad" in fields else "CLIPImageProcessor"
        config = config_for(folder, {"image_processor_type": kind, **fields})
        again = PreprocessConfig.from_json(config.to_json())
        assert again == config
        assert again.digest == config.digest


def test_normalization_is_the_processors(tmp_path: Path) -> None:
    config = config_for(tmp_path, CLIP["crop"] | {"image_mean": [0.5, 0.25, 0.125], "image_std": [1, 2, 3]})
    assert config.normalization.mean == (0.5, 0.25, 0.125)
    assert config.normalization.std == (1.0, 2.0, 3.0)
    off = config_for(tmp_path, CLIP["crop"] | {"do_normalize": False, "do_rescale": False})
    assert (off.normalization.mean, off.normalization.rescale_factor) == ((0.0, 0.0, 0.0), 1.0)


def test_a_hopelessly_narrow_picture_is_refused_before_any_work(tmp_path: Path) -> None:
    crop = config_for(tmp_path, CLIP["crop"])
    with pytest.raises(ImageError, match="1 x 65535 pixels") as refused:
        prepare(Image.new("RGB", (1, 65535)), crop)
    assert refused.value.code == "image_aspect_ratio"
    padded = config_for(tmp_path, {"image_processor_type": "LlavaImageProcessor", **LLAVA["padded"]})
    with pytest.raises(ImageError, match="20000 x 20000"):
        prepare(Image.new("RGB", (20000, 2)), padded)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map"),
        ({"do_pad": True, "size": SIDE, "crop_size": SIDE}, "do_pad"),
        ({"size": SIDE, "crop_size": SIDE, "pad_size": {"height": 9, "width": 9}}, "pad_size"),
        ({"size": {"shortest_edge": SIDE, "longest_edge": 200}, "crop_size": SIDE}, "longest_edge"),
        ({"size": SIDE, "do_center_crop": False}, "varying size"),
        ({"size": SIDE, "crop_size": 224}, "224x224"),
        ({"size": SIDE, "crop_size": {"height": SIDE}}, "crop_size"),
        ({"size": SIDE, "crop_size": SIDE, "resample": 9}, "resample 9"),
        ({"size": SIDE, "crop_size": SIDE, "image_mean": [0.5]}, "image_mean"),
    ],
)
def test_a_processor_we_cannot_reproduce_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        config_for(tmp_path, fields)


def test_processor_files_must_agree_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP["crop"]))
    for field, wrong in [
        ("patch_size", 14),
        ("num_additional_image_tokens", 0),
        ("vision_feature_select_strategy", "full"),
    ]:
        (tmp_path / "processor_config.json").write_text(json.dumps({field: wrong}))
        with pytest.raises(CheckpointError, match=field):
            read_preprocess_config(tmp_path, demo_config())


def test_a_folder_without_processor_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_preprocess_config(tmp_path, demo_config())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_preprocess_config(tmp_path, demo_config())
