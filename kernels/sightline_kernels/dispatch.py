"""Chooses, once for a model, the fused twin or the reference of every operation, and says why.

The mode is the caller's: ``auto`` takes each twin that doesn't refuse, ``reference`` none, ``fused`` all or raises.
Knows what a model will ask of its kernels. Knows no step, and costs nothing in one: the choice is made beforehand.
"""

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from sightline_kernels.int8_linear.reference import int8_linear
from sightline_kernels.layout import PagedLayout
from sightline_kernels.nf4_linear.reference import BytePairs, Scales, nf4_linear
from sightline_kernels.paged_attention.reference import paged_attention
from sightline_kernels.quick_gelu.reference import quick_gelu
from sightline_kernels.rms_norm.reference import add_rms_norm
from sightline_kernels.rotary_store_kv.reference import rotary_store_kv
from sightline_kernels.sample.reference import sample
from sightline_kernels.silu_mul.reference import silu_mul
from sightline_kernels.store_kv.reference import store_kv

Mode = Literal["auto", "reference", "fused"]

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs the twins are compiled for in the tests."""


class FusedRefusedError(ValueError):
    """Fused kernels were demanded where one of them can't be used; the sentence says which and why."""


class Sample(Protocol):
    """One token a row; ``sample/reference.py`` says how."""

    def __call__(
        self,
        logits_BV: Tensor,
        temperature_B: Tensor,
        top_k_B: Tensor,
        top_p_B: Tensor,
        min_p_B: Tensor,
        seed_B: Tensor,
        choice_B: Tensor,
        position_B: Tensor,
        *,
        filtered: bool = True,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """The operations of a model and its sampler, each its reference or the fused twin of the same signature."""

    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    rotary_store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    paged_attention: Callable[[Tensor, Tensor, Tensor, PagedLayout, float], Tensor]
    int8_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    nf4_linear: Callable[[Tensor, Tensor, Scales, BytePairs, Tensor | None, int], Tensor]
    """Of blocks of 64; others are the reference's."""
    sample: Sample
    quick_gelu: Callable[[Tensor], Tensor]

    @property
    def can_be_recorded(self) -> bool:
        """Whether a step of decodes reads nothing of the layout but device tensors, so that it can be replayed."""
        return self.paged_attention is not paged_attention


REFERENCES = Kernels(
    add_rms_norm, silu_mul, store_kv, rotary_store_kv, paged_attention, int8_linear, nf4_linear, sample, quick_gelu
)
OPERATIONS = tuple(field.name for field in fields(Kernels))


@dataclass(frozen=True)
class Workload:
    """What one model will ask of its kernels: all that a twin may refuse by."""

    device: torch.device
    capability: tuple[int, int]
    """The GPU's compute capability; (0, 0) for a CPU."""
    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    row_invariant: bool
    """Whether steps will have to be row-invariant (``--deterministic``)."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the weights of its linears are kept."""
    can_build: bool = True
    """Whether the machine has what Triton builds with; see ``can_build_launchers``."""


@dataclass(frozen=True)
class Choice:
    """What would be used for one operation."""

    operation: str
    fused: bool
    reason: str
    """Why; of a twin that refused, its sentence."""


def capability_of(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; (0, 0) for one that is no CUDA GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def can_build_launchers() -> bool:
    """Whether there are a C compiler and Python's headers, with which Triton builds what starts a kernel."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that is empty; Triton looks where the headers are.
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    has_compiler = any(shutil.which(name) for name in ("gcc", "clang"))
    return has_compiler and Path(paths["include"], "Python.h").is_file()


def choose(mode: Mode, workload: Workload) -> Kernels:
    """The kernels to construct a model with. Raises FusedRefusedError in mode ``fused`` when a twin refuses."""
    choices = explain(mode, workload)
    if not any(choice.fused for choice in choices):
        return REFERENCES
    twins, _ = _twins(workload)
    return Kernels(**{each.operation: getattr(twins if each.fused else REFERENCES, each.operation) for each in choices})


def explain(mode: Mode, workload: Workload) -> tuple[Choice, ...]:
    """What ``choose`` takes for each operation, and why. Raises as it does."""
    if mode == "reference":
        return tuple(Choice(operation, False, "references were asked for") for operation in OPERATIONS)
    if mode == "auto" and workload.device.type == "cpu":
        return tuple(Choice(operation, False, "a CPU runs the references") for operation in OPERATIONS)
    refused = _refusals(workload)
    if mode == "fused" and refused:
        operation, reason = next(iter(refused.items()))
        raise FusedRefusedError(f"The fused {operation} can't be used: {reason}")
    return tuple(
        Choice(operation, operation not in refused, refused.get(operation, "its fused twin takes this"))
        for operation in OPERATIONS
    )


def _refusals(workload: Workload) -> dict[str, str]:
    """The sentence of every twin that can't be used."""
    everywhere = _refusal_of_all(workload)
    if everywhere is None:
        try:
            return _twins(workload)[1]
        except ImportError as error:
            everywhere = f"Triton can't be imported ({error}); install it with pip install triton"
    return dict.fromkeys(OPERATIONS, everywhere)


def _refusal_of_all(workload: Workload) -> str | None:
    if workload.device.type not in ("cuda", "cpu"):
        return f"Triton runs on CUDA GPUs, and this is {workload.device}"
    if workload.device.type == "cuda" and workload.capability < LEAST_CAPABILITY:
        had, least = (".".join(map(str, each)) for each in (workload.capability, LEAST_CAPABILITY))
        return f"this GPU has compute capability {had}, and {least} is the least it was compiled for"
    if workload.device.type == "cuda" and not workload.can_build:
        return "Triton builds with a C compiler and Python's headers; install gcc and python3-dev"
    if workload.dtype not in FUSED_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FUSED_DTYPES)
        return f"it computes in {known}, not in {str(workload.dtype).removeprefix('torch.')}"
    if workload.row_invariant:
        return "only the references promise bytes that don't depend on what else runs (--deterministic)"
    return None


def _twins(workload: Workload) -> tuple[Kernels, dict[str, str]]:
    """The twins, and what those that refuse say. Triton is imported here and no earlier: a CPU has no use for it."""
    from sightline_kernels.int8_linear import fused as int8
    from sightline_kernels.launch import is_interpreting
    from sightline_kernels.nf4_linear import fused as nf4
    from sightline_kernels.paged_attention import fused as attention
    from sightline_kernels.quick_gelu import fused as quick_gelu
    from sightline_kernels.rms_norm import fused as rms_norm
    from sightline_kernels.rotary_store_kv import fused as rotary
    from sightline_kernels.sample import fused as sampling
    from sightline_kernels.silu_mul import fused as silu
    from sightline_kernels.store_kv import fused as store

    twins = Kernels(
        rms_norm.add_rms_norm,
        silu.silu_mul,
        store.store_kv,
        rotary.rotary_store_kv,
        attention.paged_attention,
        int8.int8_linear,
        nf4.nf4_linear,
        sampling.sample,
        quick_gelu.quick_gelu,
    )
    widths = (workload.hidden_size, workload.num_heads * workload.head_dim, workload.intermediate_size)
    said = {
        "add_rms_norm": rms_norm.refusal(workload.hidden_size),
        "silu_mul": silu.refusal(workload.intermediate_size),
        "store_kv": store.refusal(),
        "quick_gelu": quick_gelu.refusal(),
        "rotary_store_kv": rotary.refusal(workload.head_dim),
        "paged_attention": attention.refusal(workload.num_heads, workload.num_kv_heads, workload.head_dim),
        "sample": sampling.refusal(),
    }
    # Of the linears only those that the model has can be in the way.
    if workload.quantization == "int8":
        said["int8_linear"] = next(filter(None, map(int8.refusal, widths)), None)
    if workload.quantization == "nf4":
        said["nf4_linear"] = next(filter(None, map(nf4.refusal, widths)), None)
    if workload.device.type == "cpu" and not is_interpreting():
        said = dict.fromkeys(OPERATIONS, "Triton runs on CUDA GPUs, and this is a CPU")
    return twins, {operation: reason for operation, reason in said.items() if reason is not None}
