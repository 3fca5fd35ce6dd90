"""Puts a checkpoint's weights, or random ones, into a model.

Knows the names that both generations of checkpoints give their tensors, and how separate matrices fuse. Reads tensor
by tensor, and quantizes as it reads, so that memory peaks at about the final weights and one matrix. What a quantized
matrix is, ``quantize.py`` knows. Knows nothing of serving.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.checkpoint_files import read_entries
from sightline_models.config import CheckpointError, Normalization, VlmConfig
from sightline_models.layers import Linear
from sightline_models.quantization_config import Quantization, choose_quantization
from sightline_models.quantize import SCHEMES, QuantizedWeight, Scheme, make_linear
from sightline_models.safetensors_files import TensorEntry
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
    linear: Linear | None = None
    """The layer whose weight this is, or is a part of; None for whatever can't be quantized."""
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class _Reading:
    """One tensor to read and, of a matrix that was quantized before, those that stand beside it in the file."""

    name: str
    """Of its slot."""
    entry: TensorEntry
    companions: Mapping[str, TensorEntry] = field(default_factory=dict)
    """By their endings; empty for a tensor in full precision."""

    @property
    def num_bytes(self) -> int:
        return self.entry.num_bytes + sum(entry.num_bytes for entry in self.companions.values())


def load_vlm(
    folder: Path,
    config: VlmConfig,
    normalization: Normalization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels = REFERENCES,
    quantize: Quantization = "none",
    quantize_vision: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Vlm:
    """Read a checkpoint folder's safetensors onto ``device``, cast to ``dtype`` what isn't quantized.

    ``quantize`` names a scheme for the decoder's linears, and with ``quantize_vision`` for tower's and projector's; a
    checkpoint that is quantized is loaded as it lies.
    ``progress`` is told the fraction of bytes read. Raises CheckpointError naming each tensor that is missing,
    unknown or of the wrong shape, before anything is read.
    """
    scheme = SCHEMES.get(choose_quantization(config.quantization, quantize, vision=quantize_vision))
    is_stored = config.quantization != "none"
    entries = read_entries(folder)
    vlm = _meta_vlm(config, normalization, kernels)
    slots = dict(_slots(vlm))
    plan = _match(folder, config, entries, slots, scheme if is_stored else None)
    quantized: set[Linear] = set()
    if is_stored:
        quantized = {linear for reading in plan if reading.companions and (linear := slots[reading.name].linear)}
    elif scheme is not None:
        quantized = linears_to_quantize(vlm, vision=quantize_vision)
    _materialize(vlm, dtype=dtype, device=device, but=quantized)
    slots = dict(_slots(vlm))
    total = sum(reading.num_bytes for reading in plan) or 1
    done = 0
    waiting: dict[Linear, list[QuantizedWeight | Tensor | None]] = {}
    with ExitStack() as stack, torch.no_grad():
        names = {entry.file for reading in plan for entry in (reading.entry, *reading.companions.values())}
        files = {file: stack.enter_context(_open(file)) for file in names}
        for reading in plan:
            slot = slots[reading.name]
            tensors = {
                ending: files[entry.file].get_tensor(entry.name)
                for ending, entry in {"weight": reading.entry, **reading.companions}.items()
            }
            if slot.linear is None or slot.linear not in quantized:
                slot.target.copy_(tensors["weight"].view(slot.target.shape))
                _check_finite(slot.target, reading.entry, dtype)
            else:
                parts = waiting.setdefault(slot.linear, [None] * slot.parts)
                # A matrix that was left in full precision may stand beside quantized ones.
                keeps = is_stored and not reading.companions
                parts[slot.part] = _take(reading.entry, tensors, None if keeps else scheme, slot.shape, dtype, device)
                whole = [part for part in parts if part is not None]
                if len(whole) == slot.parts:
                    _replace(vlm, slot.linear, whole)
                    del waiting[slot.linear]
            done += reading.num_bytes
            if progress is not None:
                progress(done / total)
    assert not waiting, f"{len(waiting)} layers lack parts"
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
    quantize: Quantization = "none",
    quantize_vision: bool = False,
) -> Vlm:
    """A model of the true shape with random weights made on the device, scaled so that sampled text varies.

    With ``quantize``, linears are those drawn without it, each quantized as soon as it is drawn.
    """
    vlm = _meta_vlm(config, normalization, kernels)
    scheme = SCHEMES.get(quantize)
    quantized = linears_to_quantize(vlm, vision=quantize_vision) if scheme is not None else set()
    linears = {linear.weight: linear for linear in quantized}
    _materialize(vlm, dtype=dtype, device=device, but=quantized)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in list(vlm.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # Rows of length one keep activations their size and, in the head, make logits that spread by one.
            is_table = name.endswith("position_embedding") or (
                name.endswith("embed_tokens.weight") and not config.decoder.tie_word_embeddings
            )
            std = 1.0 if is_table else 1 / math.sqrt(parameter.shape[-1])
            linear = linears.get(parameter)
            if linear is None or scheme is None:
                parameter.normal_(0.0, std, generator=generator)
                continue
            drawn = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
            _replace(vlm, linear, [scheme.quantize(drawn)])
    vlm.pack_weights()
    return vlm


def linears_to_quantize(vlm: Vlm, *, vision: bool) -> set[Linear]:
    """What ``--quantize`` quantizes: the decoder's, and with ``vision`` all that bitsandbytes would.

    It leaves the head alone. What cuts a picture into patches is a linear layer only here; there it is a convolution.
    """
    parts: list[nn.Module] = [vlm.decoder.layers]
    if vision:
        parts += [vlm.vision.layers, vlm.projector]
    return {module for part in parts for module in part.modules() if isinstance(module, Linear)}


def _meta_vlm(config: VlmConfig, normalization: Normalization, kernels: Kernels) -> Vlm:
    with torch.device("meta"):
        return Vlm(config, normalization, kernels)


def _materialize(vlm: Vlm, *, dtype: torch.dtype, device: torch.device, but: set[Linear]) -> None:
    """Give every parameter uninitialized memory in its final dtype and place, once; no weight to the layers ``but``."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in vlm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if module in but and name == "weight":
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[parameter])
    vlm.build_tables()
    vlm.eval()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        # It holds more against a file than its header, or the file has changed since that was read.
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}; download it again") from error


def _take(
    entry: TensorEntry,
    tensors: Mapping[str, Tensor],
    scheme: Scheme | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> QuantizedWeight | Tensor:
    """One matrix of a quantized layer, on the device: quantized now, taken as it is, or kept in full precision."""
    rows, columns = shape
    try:
        if scheme is not None and len(tensors) > 1:
            # Copies, here and below, even on the CPU: what was read is a view of the file.
            copies = {ending: tensor.to(device, copy=True) for ending, tensor in tensors.items()}
            return scheme.read(copies, (rows, columns))
        if scheme is not None:
            weight = tensors["weight"].to(device)
            _check_finite(weight, entry, weight.dtype)
            return scheme.quantize(weight)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{entry.file}: {entry.name} {error}") from error
    kept = tensors["weight"].to(device, dtype, copy=True)
    _check_finite(kept, entry, dtype)
    return kept


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. The least and the greatest tell: whatever is no number is both of them, too.

    On a CPU this takes a thirtieth of the time of asking every number.
    """
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _check_finite(tensor: Tensor, entry: TensorEntry, dtype: torch.dtype) -> None:
    if not is_finite(tensor):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{entry.file}: {entry.name} holds numbers that are not finite in {kind}; "
            "choose a wider --dtype, or download the file again"
        )


def _replace(vlm: Vlm, linear: Linear, parts: Sequence[QuantizedWeight | Tensor]) -> None:
    """Put a layer made of ``parts`` where ``linear`` stood without a weight."""
    name = next(name for name, module in vlm.named_modules() if module is linear)
    # Twins were asked only about the decoder's widths, and a picture has more rows than they'd take anyway.
    kernels = vlm.decoder.kernels if name.startswith("decoder.") else REFERENCES
    vlm.set_submodule(name, make_linear(parts, linear.bias, kernels).eval())


def _match(
    folder: Path,
    config: VlmConfig,
    entries: tuple[TensorEntry, ...],
    slots: dict[str, _Slot],
    stored: Scheme | None,
) -> list[_Reading]:
    """Find every slot its tensor, with companions where the checkpoint is quantized, or say which don't fit."""
    known = {name: entry for entry in entries if (name := _canonical(entry.name)) is not None}
    companions: dict[str, dict[str, TensorEntry]] = {}
    plan = []
    filled: dict[str, TensorEntry] = {}
    problems = []
    for entry in entries:
        name = _canonical(entry.name)
        beside = stored.split(name) if stored is not None and name is not None else None
        if beside is not None and beside[0] in known:
            companions.setdefault(beside[0], {})[beside[1]] = entry
        elif name is None or (name not in slots and not _is_unused(name, config)):
            problems.append(f"{entry.name} is unknown")
        elif name in filled:
            problems.append(f"{entry.name} and {filled[name].name} are the same weight")
        elif name in slots:
            filled[name] = entry
    for name, entry in filled.items():
        slot, beside_it = slots[name], companions.get(name, {})
        if stored is not None and beside_it:
            problems += [f"{entry.name} lacks its {ending}" for ending in stored.required if ending not in beside_it]
            if slot.linear is None:
                problems.append(f"{entry.name} is quantized, which only matrices of linear layers can be")
        else:
            if entry.shape != slot.shape:
                problems.append(f"{entry.name} has shape {list(entry.shape)} instead of {list(slot.shape)}")
            if entry.dtype not in _FLOATING:
                problems.append(f"{entry.name} has dtype {entry.dtype} instead of one of {', '.join(_FLOATING)}")
        plan.append(_Reading(name, entry, beside_it))
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
        linear = module if isinstance(module, Linear) and kind == "weight" else None
        yield f"{name}.{kind}", _Slot(tuple(parameter.shape), parameter, linear)


def _fused_slots(
    prefix: str, names: tuple[str, ...], module: nn.Module, rows: tuple[int, ...]
) -> Iterator[tuple[str, _Slot]]:
    """The row ranges of one fused matrix (and bias), one for each separate matrix of the checkpoint."""
    for kind, parameter in module.named_parameters(recurse=False):
        linear = module if isinstance(module, Linear) and kind == "weight" else None
        for part, (name, target) in enumerate(zip(names, torch.split(parameter, list(rows)), strict=True)):
            yield f"{prefix}.{name}.{kind}", _Slot(tuple(target.shape), target, linear, part, len(names))
