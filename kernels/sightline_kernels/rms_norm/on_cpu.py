"""Residual add and root-mean-square norm on a CPU in half precision, in fewer operations than torch builds its own of.

A few rows take torch's layer norm, which is one operation: of a row and its negation side by side the mean is 0 and the
variance the row's mean square. In float32 that mean's rounding would show in numbers much smaller than the row's
largest. Knows one row at a time. Suffixes: T packed tokens, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.rms_norm import reference

_FEW = 64
"""Rows up to which it is operations that cost, not numbers."""


def can_pack(weight_D: Tensor) -> bool:
    """Whether ``pack`` takes this scale: on a CPU, in half precision."""
    return weight_D.is_cpu and weight_D.dtype in (torch.bfloat16, torch.float16)


def pack(weight_D: Tensor) -> Tensor:
    """Return the scale as ``add_rms_norm`` takes it: [2 * D], itself twice in a row."""
    return weight_D.repeat(2)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor | None, packed_2D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What ``reference.add_rms_norm`` computes, in its precision, for a scale that is packed."""
    width = x_TD.shape[-1]
    if len(x_TD) > _FEW:
        return reference.add_rms_norm(x_TD, residual_TD, packed_2D[:width], eps)
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    both_T2D = torch.cat((summed_TD, summed_TD.neg()), dim=-1)
    return F.layer_norm(both_T2D, packed_2D.shape, packed_2D, None, eps)[:, :width], summed_TD
