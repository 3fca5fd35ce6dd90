"""Quantized linear layers, and one handler a scheme that makes them, from full weights or from bitsandbytes' own.

Knows the tensors that bitsandbytes keeps for a matrix and how transformers names them in a file. Knows nothing of
models or of folders: which matrices are quantized is ``weights.py``'s to find.
Suffixes: I input width, O output width, Q packed bytes, K blocks, P values of a byte.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_kernels.int8_linear import on_cpu as int8_on_cpu
from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.nf4_linear import reference as nf4
from sightline_models.layers import Linear

_LARGEST_BLOCK = 2**16
_LARGEST_OFFSET = 1e38


@dataclass(frozen=True)
class Int8Weight:
    """A matrix, or several with rows after one another."""

    codes_OI: Tensor
    absmax_O: Tensor


@dataclass(frozen=True)
class Nf4Weight:
    """A matrix, or several with rows after one another, whose numbers are cut into blocks of one size."""

    packed_Q: Tensor
    scales: nf4.Scales
    shape: tuple[int, int]
    block_size: int


QuantizedWeight = Int8Weight | Nf4Weight


class Int8Linear(nn.Module):
    """Stands where a ``Linear`` stands; int8 in memory, with inputs and outputs of one dtype."""

    codes_OI: Tensor
    absmax_O: Tensor

    def __init__(self, weight: Int8Weight, bias: nn.Parameter | None, kernels: Kernels) -> None:
        super().__init__()
        self.multiply = kernels.int8_linear
        self.scales: int8_on_cpu.Scales | None = None
        self.out_features, self.in_features = weight.codes_OI.shape
        self.register_buffer("codes_OI", weight.codes_OI)
        self.register_buffer("absmax_O", weight.absmax_O)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self.scales is not None:
            return int8_on_cpu.int8_linear(x, self.codes_OI, self.absmax_O, self.bias, self.scales)
        return self.multiply(x, self.codes_OI, self.absmax_O, self.bias)

    def pack(self) -> None:
        """Multiply as this CPU does it fastest, if it is one that can, and keep the codes in the order it likes."""
        if self.multiply is int8.int8_linear and int8_on_cpu.can_multiply(self.codes_OI):
            self.codes_OI = int8_on_cpu.pack(self.codes_OI)
            self.scales = int8_on_cpu.scales_of(self.absmax_O)


class Nf4Linear(nn.Module):
    """Stands where a ``Linear`` stands; NF4 in memory, multiplied in the dtype of its input."""

    packed_Q: Tensor
    float32_P2: Tensor
    half_2P: Tensor
    absmax_K: Tensor
    """Where scales are in float32; where they are compressed, these four and ``group``."""
    codes_K: Tensor
    map_P: Tensor
    absmax_C: Tensor
    offset_C: Tensor

    def __init__(self, weight: Nf4Weight, bias: nn.Parameter | None, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.out_features, self.in_features = weight.shape
        self.block_size = weight.block_size
        self.register_buffer("packed_Q", weight.packed_Q)
        scales = weight.scales
        self.group = 0
        if isinstance(scales, nf4.CompressedScales):
            self.group = scales.group
            self.register_buffer("codes_K", scales.codes_K)
            self.register_buffer("map_P", scales.map_P)
            self.register_buffer("absmax_C", scales.absmax_C)
            self.register_buffer("offset_C", scales.offset_C)
        else:
            self.register_buffer("absmax_K", scales)
        pairs = nf4.byte_pairs(weight.packed_Q.device)
        self.register_buffer("float32_P2", pairs.float32_P2, persistent=False)
        self.register_buffer("half_2P", pairs.half_2P, persistent=False)
        self.bias = bias

    @property
    def scales(self) -> nf4.Scales:
        if not self.group:
            return self.absmax_K
        return nf4.CompressedScales(self.codes_K, self.map_P, self.absmax_C, self.offset_C, self.group)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed_Q, self.scales, nf4.BytePairs(self.float32_P2, self.half_2P)
        if self.block_size != nf4.BLOCK_SIZE:
            return nf4.nf4_linear(x, *weight, self.bias, self.out_features, self.block_size)
        return self.kernels.nf4_linear(x, *weight, self.bias, self.out_features)


class SideBySide(nn.Module):
    """Stands where a ``Linear`` of fused matrices stands when these can't be kept as one."""

    def __init__(self, parts: Sequence[nn.Module], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias


def make_linear(
    parts: Sequence[QuantizedWeight | Tensor], bias: nn.Parameter | None, kernels: Kernels = REFERENCES
) -> nn.Module:
    """One layer whose weight is ``parts``, rows after one another; nothing is quantized a second time."""
    if all(isinstance(part, Int8Weight) for part in parts):
        joined = [part for part in parts if isinstance(part, Int8Weight)]
        codes_OI = _joined([part.codes_OI for part in joined])
        return Int8Linear(Int8Weight(codes_OI, _joined([part.absmax_O for part in joined])), bias, kernels)
    blocks = [part for part in parts if isinstance(part, Nf4Weight)]
    if len(blocks) == len(parts) and _share_blocks(blocks):
        first = blocks[0]
        shape = (sum(part.shape[0] for part in blocks), first.shape[1])
        packed_Q, scales = _joined([part.packed_Q for part in blocks]), _joined_scales([part.scales for part in blocks])
        return Nf4Linear(Nf4Weight(packed_Q, scales, shape, first.block_size), bias, kernels)
    return SideBySide([_make_part(part, kernels) for part in parts], bias)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _joined_scales(parts: Sequence[nf4.Scales]) -> nf4.Scales:
    """Compressed scales stay so where the groups of all lie in step, else they are made whole."""
    compressed = [part for part in parts if isinstance(part, nf4.CompressedScales)]
    first = compressed[0] if len(compressed) == len(parts) else None
    if (
        first is None
        or any(part.group != first.group or not torch.equal(part.map_P, first.map_P) for part in compressed)
        or any(part.codes_K.numel() % first.group for part in compressed[:-1])
    ):
        return _joined([nf4.expand_scales(part) for part in parts])
    return nf4.CompressedScales(
        _joined([part.codes_K for part in compressed]),
        first.map_P,
        _joined([part.absmax_C for part in compressed]),
        _joined([part.offset_C for part in compressed]),
        first.group,
    )


def _share_blocks(weights: Sequence[Nf4Weight]) -> bool:
    """Whether the blocks of all lie in step: of one size, and none but the last weight's last cut short."""
    size = weights[0].block_size
    return all(weight.block_size == size for weight in weights) and all(
        math.prod(weight.shape) % size == 0 for weight in weights[:-1]
    )


def _make_part(part: QuantizedWeight | Tensor, kernels: Kernels) -> nn.Module:
    if isinstance(part, Int8Weight):
        return Int8Linear(part, None, kernels)
    if isinstance(part, Nf4Weight):
        return Nf4Linear(part, None, kernels)
    with torch.device("meta"):
        linear = Linear(part.shape[1], part.shape[0], bias=False)
    linear.weight = nn.Parameter(part, requires_grad=False)
    return linear


class Scheme(ABC):
    """How one kind of quantized matrix is made and read."""

    name: str
    companions: tuple[str, ...]
    """Endings of the tensors that a file keeps beside ``weight``, in place of that ending."""
    required: tuple[str, ...]
    """Those of them without which the matrix can't be read."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor) -> QuantizedWeight:
        """As bitsandbytes' own layer would quantize it. Raises ValueError for numbers that the scheme can't hold."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """Take the matrix of ``shape`` that bitsandbytes quantized, its tensors by their endings.

        Raises ValueError, with a sentence, for tensors that don't fit one another.
        """

    def split(self, name: str) -> tuple[str, str] | None:
        """The name of the weight that ``name`` stands beside, and the ending it has instead; None if it doesn't."""
        for ending in self.companions:
            if name.endswith(f".{ending}"):
                return name.removesuffix(ending) + "weight", ending
        return None


class Int8Scheme(Scheme):
    name = "int8"
    companions = ("SCB", "weight_format")
    required = ("SCB",)

    def quantize(self, weight_OI: Tensor) -> Int8Weight:
        # bitsandbytes' layer takes its weight in half precision, whatever the checkpoint has.
        codes_OI, absmax_O = int8.quantize(weight_OI.half())
        if not absmax_O.isfinite().all():
            raise ValueError("holds numbers beyond 65504, which int8 can't be made from; use --quantize nf4")
        return Int8Weight(codes_OI, absmax_O)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Int8Weight:
        codes_OI, absmax_O = tensors["weight"], tensors["SCB"].float().reshape(-1)
        if codes_OI.dtype != torch.int8 or codes_OI.shape != shape:
            raise ValueError(f"is {_words(codes_OI)} instead of int8 {list(shape)}")
        if absmax_O.shape != shape[:1] or not absmax_O.isfinite().all():
            raise ValueError(f"has scales (SCB) that are not {shape[0]} finite numbers")
        layout = tensors.get("weight_format")
        if layout is not None and (layout.numel() != 1 or layout.item() != 0):
            raise ValueError("has its rows reordered (weight_format is not 0); save it with a newer bitsandbytes")
        return Int8Weight(codes_OI, absmax_O)


class Nf4Scheme(Scheme):
    name = "nf4"
    _STATE = "weight.quant_state.bitsandbytes__nf4"
    companions = (
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        _STATE,
    )
    required = ("weight.absmax", _STATE)

    def quantize(self, weight_OI: Tensor) -> Nf4Weight:
        rows, columns = weight_OI.shape
        if weight_OI.dtype == torch.float64:
            weight_OI = weight_OI.float()
        packed_Q, absmax_K = nf4.quantize(weight_OI)
        return Nf4Weight(packed_Q, absmax_K, (rows, columns), nf4.BLOCK_SIZE)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Nf4Weight:
        state = _read_state(tensors[self._STATE])
        if state.get("shape") != list(shape):
            raise ValueError(f"has shape {state.get('shape')} instead of {list(shape)}")
        size, count = state.get("blocksize"), math.prod(shape)
        if type(size) is not int or not 2 <= size <= _LARGEST_BLOCK or size % 2:
            raise ValueError(f"has blocksize {size!r}")
        # It may be stored in a wider type, of the same bytes.
        packed_Q = tensors["weight"].contiguous().reshape(-1).view(torch.uint8)
        if packed_Q.numel() != -(-count // 2):
            raise ValueError(f"has {packed_Q.numel()} bytes instead of {-(-count // 2)}")
        quant_map = tensors.get("weight.quant_map")
        known = nf4.levels(packed_Q.device)
        if quant_map is not None and (quant_map.shape != (16,) or not torch.allclose(quant_map.float(), known)):
            raise ValueError("has a quant_map that is not NF4's")
        scales = self._scales(tensors, state)
        absmax_K = nf4.expand_scales(scales)
        if absmax_K.numel() != -(-count // size) or not absmax_K.isfinite().all():
            raise ValueError(f"has scales (absmax) that are not {-(-count // size)} finite numbers")
        return Nf4Weight(packed_Q, scales, shape, size)

    @staticmethod
    def _scales(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> nf4.Scales:
        absmax_K = tensors["weight.absmax"].reshape(-1)
        if absmax_K.is_floating_point():
            return absmax_K.float()
        group, offset = state.get("nested_blocksize"), state.get("nested_offset")
        nested_absmax, nested_map = tensors.get("weight.nested_absmax"), tensors.get("weight.nested_quant_map")
        if nested_absmax is None or nested_map is None or type(group) is not int or not isinstance(offset, int | float):
            raise ValueError("has quantized scales (absmax) and not all that nested_* must say about them")
        absmax_C = nested_absmax.reshape(-1).float()
        if (
            not 1 <= group <= _LARGEST_BLOCK
            or absmax_K.dtype != torch.uint8
            or nested_map.shape != (256,)
            or absmax_C.numel() != -(-absmax_K.numel() // group)
            or not abs(offset) < _LARGEST_OFFSET
        ):
            raise ValueError("has quantized scales (absmax) that don't fit their nested_* tensors")
        offset_C = torch.full_like(absmax_C, offset)
        return nf4.CompressedScales(absmax_K, nested_map.float(), absmax_C, offset_C, group)


SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (Int8Scheme(), Nf4Scheme())}
"""By the names that settings and ``quantization_config.py`` use."""


def _read_state(blob: Tensor) -> dict[str, Any]:
    """The JSON that bitsandbytes keeps as a tensor of bytes."""
    try:
        state = json.loads(bytes(blob.reshape(-1).to("cpu", torch.uint8).tolist()))
    except ValueError as error:
        raise ValueError("has a quant_state that is not JSON") from error
    if not isinstance(state, dict):
        raise ValueError("has a quant_state that is not an object")
    return state


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
