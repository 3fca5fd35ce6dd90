"""Sizes planned without torch equal those of the models that torch builds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline_models.config import Normalization, VlmConfig, read_config
from sightline_models.kv import KvPool
from sightline_models.parameter_count import ITEM_BYTES, count_parameters, kv_bytes_per_token, weight_bytes
from sightline_models.presets import PRESETS, demo_checkpoint, write_preset
from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm

_NORMALIZATION = Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale_factor=1 / 255)


def built(config: VlmConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Vlm(config, _NORMALIZATION).parameters())


@pytest.mark.parametrize("name", list(PRESETS))
def test_count_equals_the_built_model(name: str, tmp_path: Path) -> None:
    write_preset(name, tmp_path)
    config = read_config(tmp_path)
    assert count_parameters(config).total == built(config)


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24, "num_kv_heads": 1}],
)
def test_count_follows_every_field(changes: dict[str, object]) -> None:
    config = read_config(demo_checkpoint())
    config = replace(config, decoder=replace(config.decoder, **changes))
    assert count_parameters(config).total == built(config)


def test_tower_layers_that_are_never_run_weigh_nothing() -> None:
    config = read_config(demo_checkpoint())
    first = replace(config, feature_layers=(1,))
    assert count_parameters(first).tower < count_parameters(config).tower
    assert count_parameters(first).total == built(first)


@pytest.mark.parametrize("precision", list(ITEM_BYTES))
def test_cache_arithmetic_equals_the_pools(precision: str) -> None:
    decoder = read_config(demo_checkpoint()).decoder
    a_block = KvPool.bytes_per_block(decoder, block_size=16, dtype=getattr(torch, precision))
    assert 16 * kv_bytes_per_token(decoder, precision) == a_block


def test_precisions_shrink_in_order(tmp_path: Path) -> None:
    write_preset("llava-1.5-7b", tmp_path)
    count = count_parameters(read_config(tmp_path))
    sizes = [weight_bytes(count, precision) / 2**30 for precision in ("float32", "bfloat16", "int8", "nf4")]
    # 7.05 billion parameters, 6.48 billion of them in the decoder's linears.
    assert sizes == pytest.approx([26.27, 13.13, 7.10, 4.46], abs=0.01)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8.0), ("nf4", 4.5)])
def test_a_quantized_tower_weighs_what_the_built_one_does(scheme: Quantization, bits: float, tmp_path: Path) -> None:
    write_preset("tiny", tmp_path)
    config = read_config(tmp_path)
    vision = {
        quantize_vision: random_vlm(
            config,
            _NORMALIZATION,
            dtype=torch.float32,
            device=torch.device("cpu"),
            seed=0,
            quantize=scheme,
            quantize_vision=quantize_vision,
        )
        for quantize_vision in (False, True)
    }
    count = count_parameters(config)
    left = [sum(parameter.numel() for parameter in made.parameters()) for made in vision.values()]
    assert left[0] - left[1] == count.vision_linears
    without, with_it = (weight_bytes(count, scheme, "float32", vision=asked) for asked in vision)
    assert without - with_it == pytest.approx(count.vision_linears * (32 - bits) / 8, abs=1)


def test_compressed_scales_of_a_7b_model(tmp_path: Path) -> None:
    write_preset("llava-1.5-7b", tmp_path)
    count = count_parameters(read_config(tmp_path))
    assert weight_bytes(count, "nf4", compressed_scales=True) / 2**30 == pytest.approx(4.18, abs=0.01)
    assert weight_bytes(count, "int8", compressed_scales=True) == weight_bytes(count, "int8")
