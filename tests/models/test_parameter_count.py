"""Sizes planned without torch equal those of the models that torch builds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline_models.config import Normalization, VlmConfig, read_config
from sightline_models.kv import KvPool
from sightline_models.parameter_count import (
    ITEM_BYTES,
    QUANTIZED_BITS,
    count_parameters,
    kv_bytes_per_token,
    weight_bytes,
)
from sightline_models.presets import PRESETS, demo_checkpoint, write_preset
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm

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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        # Rows whose NF4 blocks are out of step, and one whose last block is short.
        {"hidden_size": 36, "head_dim": 12, "num_heads": 3, "num_kv_heads": 1, "intermediate_size": 50},
    ],
)
@pytest.mark.parametrize(
    ("precision", "rest"), [*((p, p) for p in ITEM_BYTES), ("int8", "float32"), ("nf4", "bfloat16")]
)
@pytest.mark.parametrize("vision", [False, True])
def test_weights_weigh_what_was_planned(
    precision: str, rest: str, vision: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    """To the byte, tables and scales among them."""
    if vision and precision not in QUANTIZED_BITS:
        pytest.skip("nothing of it is quantized")
    write_checkpoint(tmp_path, **changes)
    config = read_config(tmp_path)
    quantize = precision if precision in QUANTIZED_BITS else "none"
    model = load_vlm(
        tmp_path,
        config,
        _NORMALIZATION,
        dtype=getattr(torch, rest),
        device=torch.device("cpu"),
        quantize=quantize,  # type: ignore[arg-type]
        quantize_vision=vision,
    )
    assert weight_bytes(config, precision, rest, on_cpu=True, vision=vision) == model.num_bytes


def test_precisions_shrink_in_order(tmp_path: Path) -> None:
    write_preset("llava-1.5-7b", tmp_path)
    config = read_config(tmp_path)
    sizes = [weight_bytes(config, precision) / 2**30 for precision in ("float32", "bfloat16", "int8", "nf4")]
    # 7.05 billion parameters, 6.48 billion of them in the decoder's linears.
    assert sizes == pytest.approx([26.27, 13.13, 7.10, 4.46], abs=0.01)


def test_compressed_scales_of_a_7b_model(tmp_path: Path) -> None:
    write_preset("llava-1.5-7b", tmp_path)
    plain = read_config(tmp_path)
    compressed = replace(plain, compressed_scales=True)
    assert weight_bytes(compressed, "nf4") / 2**30 == pytest.approx(4.18, abs=0.01)
    assert weight_bytes(compressed, "int8") == weight_bytes(plain, "int8")
