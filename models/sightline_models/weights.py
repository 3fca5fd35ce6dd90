"""Puts a checkpoint's weights, or random ones, into a model.

Knows the names that both generations of checkpoints give their tensors, and how separate matrices fuse. Reads tensor
by tensor, so that memory peaks at about the weights once. Knows nothing of serving.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.checkpoint_files import TensorEntry, read_entries
from sightline_models.config import CheckpointError, Normalization, VlmConfig
from sightline_models.vlm import Vlm

# A prefix of either generation and the part it belongs to; the first that fits counts.
_PREFIXES = (
    ("model.language_model.", "decoder."),
    ("language_model.model.", "decoder."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", "vision."),
    ("model.vision_tower.", "vision."),
    ("vision_tower.vision_model.", "vision."),
    ("vision_tower.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
)

_FLOATING = ("BF16", "F16", "F32", "F64")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Constants that older versions of transformers saved beside the weights; they are computed here.
_CONSTANTS = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class _Slot:
    """Where one checkpoint tensor goes: a view of a parameter, with the shape the checkpoint gives it."""

    shape: tuple[int, ...]
    target: Tensor


def load_vlm(
    folder: Path,
    config: VlmConfig,
    normalization: Normalization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels = REFERENCES,
    progress: Callable[[float], None] | None = None,
) -> Vlm:
    """Read a checkpoint folder's safetensors, cast to ``dtype``, onto ``device``.

    ``progress`` is told the fraction of bytes read. Raises CheckpointError naming each tensor that is missing,
    unknown or of the wrong shape, before anything is read.
    """
    entries = read_entries(folder)
    vlm = _empty_vlm(config, normalization, dtype=dtype, device=device, kernels=kernels)
    slots = dict(_slots(vlm))
    plan = _match(folder, config, entries, slots)
    total = sum(entry.num_bytes for entry, _ in plan) or 1
    done = 0
    with ExitStack() as stack, torch.no_grad():
        files = {file: stack.enter_context(safe_open(file, "pt")) for file in {entry.file for entry, _ in plan}}
        for entry, slot in plan:
            slot.target.copy_(files[entry.file].get_tensor(entry.name).view(slot.target.shape))
            if not slot.target.isfinite().all():
                kind = str(dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{entry.file}: {entry.name} holds numbers that are not finite in {kind}; "
                    "choose a wider --dtype, or download the file again"
                )
            done += entry.num_bytes
            if progress is not None:
                progress(done / total)
    vlm.pack_weights()
    return vlm


def random_vlm(
    config: VlmConfig,
    normalization: Normalization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    kernels: Kernels = REFERENCES,
) -> Vlm:
    """A model of the true shape with random weights made on the device, scaled so that sampled text varies."""
    vlm = _empty_vlm(config, normalization, dtype=dtype, device=device, kernels=kernels)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                # Rows of length one keep activations their size and, in the head, make logits that spread by one.
                is_table = name.endswith("position_embedding") or (
                    name.endswith("embed_tokens.weight") and not config.decoder.tie_word_embeddings
                )
                std = 1.0 if is_table else 1 / math.sqrt(parameter.shape[-1])
                parameter.normal_(0.0, std, generator=generator)
    vlm.pack_weights()
    return vlm


def _empty_vlm(
    config: VlmConfig, normalization: Normalization, *, dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> Vlm:
    """Build without memory, then give every parameter uninitialized memory in its final dtype and place, once."""
    with torch.device("meta"):
        vlm = Vlm(config, normalization, kernels)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in vlm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[parameter])
    vlm.build_tables()
    return vlm.eval()


def _match(
    folder: Path, config: VlmConfig, entries: tuple[TensorEntry, ...], slots: dict[str, _Slot]
) -> list[tuple[TensorEntry, _Slot]]:
    """Pair every tensor with its slot, or say which don't fit."""
    plan = []
    filled: dict[str, TensorEntry] = {}
    problems = []
    for entry in entries:
        name = _canonical(entry.name)
        if name is None or (name not in slots and not _is_unused(name, config)):
            problems.append(f"{entry.name} is unknown")
        elif name in filled:
            problems.append(f"{entry.name} and {filled[name].name} are the same weight")
        elif name in slots:
            filled[name] = entry
            if entry.shape != slots[name].shape:
                problems.append(f"{entry.name} has shape {list(entry.shape)} instead of {list(slots[name].shape)}")
            if entry.dtype not in _FLOATING:
                problems.append(f"{entry.name} has dtype {entry.dtype} instead of one of {', '.join(_FLOATING)}")
            plan.append((entry, slots[name]))
    problems += [f"{name} is missing" for name in slots if name not in filled]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"{folder}: the weights don't fit config.json: {listed}. Take config.json and weights of one download"
        )
    return plan


def _canonical(name: str) -> str | None:
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part + name.removeprefix(prefix)
    return None


def _is_unused(name: str, config: VlmConfig) -> bool:
    """Weights that belong to the checkpoint but that the model has no use for."""
    if name.endswith(_CONSTANTS) or name.startswith("vision.post_layernorm."):
        return True
    if name == "lm_head.weight":
        return config.decoder.tie_word_embeddings
    layer = name.removeprefix("vision.encoder.layers.").split(".")[0]
    return layer.isdecimal() and max(config.feature_depths) <= int(layer) < config.vision.num_layers


def _slots(vlm: Vlm) -> Iterator[tuple[str, _Slot]]:
    """Every tensor the model needs, by its name without the generation's prefix."""
    yield from _vision_slots(vlm)
    for name in ("linear_1", "linear_2"):
        yield from _module_slots(f"projector.{name}", vlm.projector.get_submodule(name))
    yield from _decoder_slots(vlm)


def _vision_slots(vlm: Vlm) -> Iterator[tuple[str, _Slot]]:
    vision, patch = vlm.vision, vlm.vision.config.patch_size
    embedding = vision.patch_embedding.weight
    yield "vision.embeddings.patch_embedding.weight", _Slot((embedding.shape[0], 3, patch, patch), embedding)
    yield "vision.embeddings.class_embedding", _slot(vision.class_embedding)
    yield "vision.embeddings.position_embedding.weight", _slot(vision.position_embedding)
    # The misspelling is the checkpoints'.
    yield from _module_slots("vision.pre_layrnorm", vision.pre_norm)
    for index, layer in enumerate(vision.layers):
        prefix = f"vision.encoder.layers.{index}"
        width = vision.config.hidden_size
        yield from _fused_slots(prefix, _QKV, layer.get_submodule("qkv"), (width, width, width))
        for theirs, ours in (
            ("self_attn.out_proj", "out"),
            ("layer_norm1", "norm_1"),
            ("layer_norm2", "norm_2"),
            ("mlp.fc1", "fc_1"),
            ("mlp.fc2", "fc_2"),
        ):
            yield from _module_slots(f"{prefix}.{theirs}", layer.get_submodule(ours))


def _decoder_slots(vlm: Vlm) -> Iterator[tuple[str, _Slot]]:
    decoder, config = vlm.decoder, vlm.decoder.config
    yield "decoder.embed_tokens.weight", _slot(decoder.embed_tokens.weight)
    query_rows, key_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(decoder.layers):
        prefix = f"decoder.layers.{index}"
        yield from _fused_slots(prefix, _QKV, layer.get_submodule("attention.qkv"), (query_rows, key_rows, key_rows))
        width = config.intermediate_size
        yield from _fused_slots(prefix, _GATE_UP, layer.get_submodule("feed_forward.gate_up"), (width, width))
        for theirs, ours in (
            ("self_attn.o_proj", "attention.o"),
            ("mlp.down_proj", "feed_forward.down"),
            ("input_layernorm", "input_norm"),
            ("post_attention_layernorm", "post_norm"),
        ):
            yield from _module_slots(f"{prefix}.{theirs}", layer.get_submodule(ours))
    yield from _module_slots("decoder.norm", decoder.norm)
    if not config.tie_word_embeddings:
        yield from _module_slots("lm_head", decoder.lm_head)


def _slot(target: Tensor) -> _Slot:
    return _Slot(tuple(target.shape), target)


def _module_slots(name: str, module: nn.Module) -> Iterator[tuple[str, _Slot]]:
    for kind, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{kind}", _slot(parameter)


def _fused_slots(
    prefix: str, names: tuple[str, ...], module: nn.Module, rows: tuple[int, ...]
) -> Iterator[tuple[str, _Slot]]:
    """The row ranges of one fused matrix (and bias), one for each separate matrix of the checkpoint."""
    for kind, parameter in module.named_parameters(recurse=False):
        for name, target in zip(names, torch.split(parameter, list(rows)), strict=True):
            yield f"{prefix}.{name}.{kind}", _slot(target)
