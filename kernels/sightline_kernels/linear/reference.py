"""Linear layers in plain torch, with an order of weights that a CPU multiplies faster.

``F.linear`` on a CPU goes to MKL for float32, which off Intel falls back to narrow vectors. oneDNN, inside every torch
for x86, runs the widest there are once a weight lies in its own blocked order; torch's compiler calls it the same way.
Suffixes: I input width, O output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(weight_OI: Tensor) -> bool:
    """Whether ``pack`` takes this weight: on a CPU, in a dtype that oneDNN multiplies without losing parity."""
    return weight_OI.is_cpu and weight_OI.dtype in (torch.float32, torch.bfloat16) and torch._C._has_mkldnn


def pack(weight_OI: Tensor) -> Tensor:
    """Return a copy in oneDNN's order: of the same shape, good for ``linear`` and nothing else."""
    packed_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return packed_OI


def linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` over the last axis of ``x``, any number of axes before it."""
    if not weight_OI.is_mkldnn:
        return F.linear(x_I, weight_OI, bias_O)
    y_O: Tensor = torch.ops.mkldnn._linear_pointwise(x_I, weight_OI, bias_O, "none", [], "")
    return y_O


def multiply_row(x_1I: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """What ``linear`` returns for a single row [1, I], by a float32 weight turned round: nothing to set out."""
    if x_1I.dtype != torch.float32:
        return multiply_row(x_1I.float(), weight_IO, bias_O).to(x_1I.dtype)
    return torch.mm(x_1I, weight_IO) if bias_O is None else torch.addmm(bias_O.float(), x_1I, weight_IO)
