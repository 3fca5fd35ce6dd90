"""The gate of a SwiGLU feed-forward, in plain torch.

Suffixes: T packed tokens, F feed-forward width.
"""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` [T, F]; the gate is the first half of the last axis, the up projection the second."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
