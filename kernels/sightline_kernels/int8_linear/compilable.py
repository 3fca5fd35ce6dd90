"""Int8 products written for torch's compiler: what ``on_cpu`` computes from digits, and a way for a single row.

Compiled with ``freezing``, codes are put in oneDNN's order once. Not to be run as it stands: it would order them at
each call. Suffixes as in ``on_cpu.py``.
"""

import torch
from torch import Tensor

from sightline_kernels.int8_linear.on_cpu import DIGITS, LEAST, multiply_raised


def multiply(x_RI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return float32 y_RO, ``x @ (codes * scale).T`` with ``x`` as near as ``on_cpu.int8_linear`` takes it."""
    rows, count = x_RI.shape[0], DIGITS[x_RI.dtype]
    units = 127.0 * 256 ** (count - 1)
    wide_RI = x_RI.float()
    largest_R1 = wide_RI.abs().amax(1, keepdim=True).clamp(min=LEAST)
    left_RI = (wide_RI * (units / largest_R1)).round().to(torch.int32)
    raised = []
    for _ in range(count - 1):
        raised.append((left_RI + 128) & 255)
        left_RI = (left_RI + 128) >> 8
    raised_XI = torch.cat([*raised, left_RI + 128]).to(torch.uint8)
    sums_XO = multiply_raised(raised_XI, torch.ops.onednn.qlinear_prepack(codes_OI, None), codes_OI.shape[0])
    y_RO = sums_XO[(count - 1) * rows :]
    for digit in reversed(range(count - 1)):
        y_RO = y_RO * 256 + sums_XO[digit * rows : (digit + 1) * rows]
    scaled_RO: Tensor = y_RO * scale_O * (largest_R1 / units)
    return scaled_RO


def multiply_row(x_1I: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The same of one row [1, I], in float32: a sum that reads each code once."""
    y_O = (codes_OI.float() * x_1I.float()).sum(-1) * scale_O
    return y_O[None]
