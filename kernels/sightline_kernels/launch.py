"""One launch of a Triton kernel, as a value: what it is called with and what the compiler is told beforehand.

Knows grids and vector widths. Knows no operation. A launch is a value so that a machine without a GPU can compile
exactly what a GPU would be given, and look at the code. A kernel's parameters wear ``"Any"`` in quotes: a bare name in
its signature Triton would look up, and refuse, when it compiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime import JITFunction

MOST_WARPS = 16
VECTOR_BYTES = 16
"""The widest load of one thread."""


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """Tensors and numbers, by the kernel's parameter names."""
    constants: Mapping[str, int | bool | str]
    """What a kernel is compiled for: nothing here changes from step to step, or each step would compile anew."""
    num_warps: int
    num_stages: int = 2
    """Turns of a loop that are on their way at once: more hide more of the memory's delay, and small cards have no room
    for many."""

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside arguments and constants."""
        # Fusion is said outright, since Triton's default for it is about to change.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and stream; with nothing to do, do nothing."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def block_of(size: int) -> int:
    """The power of two that holds ``size`` elements; Triton's blocks have no other sizes."""
    block: int = triton.next_power_of_2(size)
    return block


def warps_for(elements: int, dtype: torch.dtype) -> int:
    """As many warps as give each thread one widest load of a block of ``elements``."""
    return max(1, min(MOST_WARPS, elements * dtype.itemsize // (32 * VECTOR_BYTES)))


def is_interpreting() -> bool:
    """Whether Triton was imported with its interpreter on, which runs kernels on a CPU, slowly."""
    return not isinstance(triton.jit(block_of), JITFunction)
