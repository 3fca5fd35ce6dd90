"""Random checkpoints of any shape, weights included, in genuine Hugging Face layout.

For tests, benchmarks and comparisons with transformers. Knows the names that checkpoints give their tensors; the
loader in ``weights.py`` knows them too, and on its own, so that a slip in either shows.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sightline_models.presets import PRESETS, Preset, write_files

# The parts of a model, as transformers 5 names them and as checkpoints published before it do.
_PREFIXES = {
    "new": {
        "decoder": "model.language_model",
        "head": "lm_head",
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
    },
    "old": {
        "decoder": "language_model.model",
        "head": "language_model.lm_head",
        "vision": "vision_tower.vision_model",
        "projector": "multi_modal_projector",
    },
}


def write_checkpoint(
    folder: Path,
    *,
    preset: str | None = None,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "float32",
    shards: int = 1,
    names: Literal["new", "old"] = "new",
    **overrides: Any,
) -> None:
    """Write a checkpoint folder of a preset's shape (``tiny`` unless told) with ``Preset`` fields replaced.

    Weights are drawn so that activations keep their size from layer to layer and logits spread by a few units.
    Raises KeyError for an unknown preset and TypeError for an unknown field.
    """
    shape = replace(PRESETS[preset or "tiny"], **overrides)
    write_files(shape, folder, dtype=dtype, legacy=names == "old")
    generator = torch.Generator().manual_seed(seed)
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    weights = {
        name: _draw(name, size, generator, tied=shape.tie_word_embeddings).to(torch_dtype)
        for name, size in _tensor_shapes(shape, _PREFIXES[names])
    }
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in sorted(set(weight_map.values())):
        part = {name: weight for name, weight in weights.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _draw(name: str, size: tuple[int, ...], generator: torch.Generator, *, tied: bool) -> Tensor:
    noise: Tensor = torch.randn(size, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(size) == 1 and name.endswith("weight"):
        return 1 + 0.1 * noise
    embedding = name.endswith("embed_tokens.weight")
    if "class_embedding" in name or "position_embedding" in name or (embedding and not tied):
        return noise
    # Rows of length one in the head make logits that spread by one; twice that tells greedy choices well apart.
    gain = 2.0 if embedding or "lm_head" in name else 1.0
    return noise * (gain / math.sqrt(noise[0].numel()))


def _tensor_shapes(shape: Preset, prefixes: dict[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _vision_shapes(shape, prefixes["vision"])
    features = shape.vision_hidden_size
    if not isinstance(shape.feature_layers, int):
        features *= len(shape.feature_layers)
    width, projector = shape.hidden_size, prefixes["projector"]
    yield from _linear(f"{projector}.linear_1", width, features, shape.projector_bias)
    yield from _linear(f"{projector}.linear_2", width, width, shape.projector_bias)
    yield from _decoder_shapes(shape, prefixes["decoder"])
    if not shape.tie_word_embeddings:
        yield f"{prefixes['head']}.weight", (shape.vocab_size, width)


def _vision_shapes(shape: Preset, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, patch = shape.vision_hidden_size, shape.patch_size
    yield f"{prefix}.embeddings.class_embedding", (width,)
    yield f"{prefix}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{prefix}.embeddings.position_embedding.weight", (shape.num_patches + 1, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield from _norm(f"{prefix}.{norm}", width)
    for index in range(shape.vision_num_layers):
        layer = f"{prefix}.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width, True)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", shape.vision_intermediate_size, width, True)
        yield from _linear(f"{layer}.mlp.fc2", width, shape.vision_intermediate_size, True)


def _decoder_shapes(shape: Preset, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.hidden_size
    head_dim = shape.head_dim or width // shape.num_heads
    query_rows, key_rows = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    yield f"{prefix}.embed_tokens.weight", (shape.vocab_size, width)
    for index in range(shape.num_layers):
        layer = f"{prefix}.layers.{index}"
        yield from _linear(f"{layer}.self_attn.q_proj", query_rows, width, shape.attention_bias)
        yield from _linear(f"{layer}.self_attn.k_proj", key_rows, width, shape.attention_bias)
        yield from _linear(f"{layer}.self_attn.v_proj", key_rows, width, shape.attention_bias)
        yield from _linear(f"{layer}.self_attn.o_proj", width, query_rows, shape.attention_bias)
        yield from _linear(f"{layer}.mlp.gate_proj", shape.intermediate_size, width, shape.mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", shape.intermediate_size, width, shape.mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", width, shape.intermediate_size, shape.mlp_bias)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield f"{prefix}.norm.weight", (width,)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)
