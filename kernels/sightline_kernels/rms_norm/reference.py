"""Residual add and root-mean-square norm, in plain torch.

Knows one row at a time. Knows nothing of layers. Suffixes: T packed tokens, D model width.
"""

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(normed_TD, residual_TD)``: the sum ``x + residual`` and its norm scaled by ``weight_D``.

    With no residual the sum is ``x`` itself. The norm is computed in at least float32 whatever the dtype.
    """
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    return F.rms_norm(summed_TD, weight_D.shape, weight_D, eps), summed_TD
