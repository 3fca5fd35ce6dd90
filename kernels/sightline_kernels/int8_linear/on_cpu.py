"""Linear layers over int8 weights on a CPU, multiplied as the codes they are instead of made whole at every call.

A row of input is written as digits to the base 256, counted from the row's own largest magnitude: two for inputs of
half precision; four for float32, where three would lose small numbers that stand beside one 300 times as large and
meet weights 300 times as large. Digits and codes are both int8, so their products are exact sums of integers, on
instructions that multiply four times as many numbers as float32's do. The digits of all rows are rows of one product,
so weights are read once; a row's result doesn't depend on others. Where little is at stake, shorter ways are faster.
Knows nothing of layers or files. Suffixes: I input width, O output width, R rows of input, X = digits * R.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.int8_linear import reference

# Up to here oneDNN puts the codes in order at each call, which costs less than setting out a product of packed ones.
_MOST_UNPACKED = 2**21
# Rows of digits multiplied at once: what stands between them and the result stays small.
_MOST_DIGITS = 512
# For more rows than this, of a small weight and of any, a weight made whole in bfloat16 costs less than digits.
_SMALL, _MANY_ROWS_OF_SMALL, _MANY_ROWS = 2**18, 24, 64
# bfloat16 dot products have no set-up but go over all weights again every few rows.
_DOT_ROWS, _DOT_PRODUCTS = 6, 3 * 2**19
# Torch's dot products have no ends: on an input width that is no multiple of this they read past the weights.
_DOT_WIDTH = 32
# This little is computed from a weight made whole in float32 before digits are made.
_SMALL_PRODUCTS = 2**21
# Rows that are smaller throughout have the digits of this: its reciprocal is finite in the digits' units.
LEAST = 2.0**-96
# On wider inputs a sum of the largest products might not fit in 32 bits.
_WIDEST = 2**16
DIGITS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def can_multiply(codes_OI: Tensor) -> bool:
    """Whether this machine multiplies these codes exactly: on an x86 CPU with VNNI, and by trial.

    Older instructions add pairs of products in 16 bits and saturate there.
    """
    if not codes_OI.is_cpu or codes_OI.shape[1] > _WIDEST:
        return False
    if not (torch._C._has_mkldnn and torch.cpu._is_vnni_supported()):
        return False
    width = 4 * _DOT_WIDTH
    extreme_XI = torch.full((3, width), -128, dtype=torch.int8)
    extreme_XI[1] = 127
    largest_OI = torch.full((width, width), 127, dtype=torch.int8)
    largest_OI[::2] = -127
    sums_XO = extreme_XI.double() @ largest_OI.double().t()
    return all(
        torch.equal(_multiply(extreme_XI, weight).double(), sums_XO) for weight in (largest_OI, _pack(largest_OI))
    )


def pack(codes_OI: Tensor) -> Tensor:
    """Return codes in oneDNN's order, good for ``int8_linear`` alone, or as they are if they are few."""
    return codes_OI if codes_OI.numel() <= _MOST_UNPACKED else _pack(codes_OI)


@dataclass(frozen=True)
class Scales:
    """What codes are multiplied by, one number a row."""

    float32_O: Tensor
    bfloat16_O: Tensor


def scales_of(absmax_O: Tensor) -> Scales:
    scale_O = absmax_O / 127.0
    return Scales(scale_O, scale_O.to(torch.bfloat16))


def int8_linear(
    x_I: Tensor, codes_OI: Tensor, absmax_O: Tensor, bias_O: Tensor | None, scales: Scales | None = None
) -> Tensor:
    """What ``reference.int8_linear`` computes, for codes that are packed or not.

    With ``largest`` the largest magnitude of a row of input, each number of the row is taken for one no further off
    than ``largest / 64000`` in half precision, and in float32 than ``largest / 2**31`` beside its own last bit. Sums
    are as exact as float32's.
    A row that holds a NaN or an infinity gives one without finite numbers, and other rows don't know of it.
    ``scales`` are those of ``absmax_O``, where they were made before.
    """
    if x_I.dtype not in DIGITS:
        assert not codes_OI.is_mkldnn, f"packed codes are multiplied in {list(DIGITS)}, not in {x_I.dtype}"
        return reference.int8_linear(x_I, codes_OI, absmax_O, bias_O)
    x_RI = x_I.reshape(-1, x_I.shape[-1])
    scales = scales or scales_of(absmax_O)
    scale_O = scales.float32_O
    if _is_better_dotted(x_RI, codes_OI):
        # No weight is further off for its rounded scale than it would be if it were rounded itself.
        y_RO = torch._weight_int8pack_mm(x_RI.contiguous(), codes_OI, scales.bfloat16_O)
    elif _is_better_whole(x_RI, codes_OI):
        y_RO = F.linear(x_RI, codes_OI.to(x_I.dtype)).mul_(scale_O)
    else:
        rows = _MOST_DIGITS // DIGITS[x_I.dtype]
        pieces = [_by_digits(piece_RI, codes_OI, scale_O) for piece_RI in torch.split(x_RI, rows)]
        y_RO = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if bias_O is not None:
        y_RO.add_(bias_O)
    return y_RO.view(*x_I.shape[:-1], -1)


def _is_better_dotted(x_RI: Tensor, codes_OI: Tensor) -> bool:
    rows, width = x_RI.shape
    if codes_OI.is_mkldnn or x_RI.dtype != torch.bfloat16 or width % _DOT_WIDTH:
        return False
    return rows <= _DOT_ROWS + _DOT_PRODUCTS // codes_OI.numel()


def _is_better_whole(x_RI: Tensor, codes_OI: Tensor) -> bool:
    if codes_OI.is_mkldnn or x_RI.dtype == torch.float16:
        # float16 has no room for a sum that is yet to be multiplied by its scale.
        return False
    if x_RI.dtype == torch.bfloat16 and x_RI.shape[1] % _DOT_WIDTH:
        # Tiles of AMX go on into the next row, and an infinity there times the zero that stands beside is no number.
        return False
    rows, weights = x_RI.shape[0], codes_OI.numel()
    if x_RI.dtype == torch.float32:
        return weights * (rows + 3) <= _SMALL_PRODUCTS
    return rows > (_MANY_ROWS_OF_SMALL if weights <= _SMALL else _MANY_ROWS)


def _by_digits(x_RI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    rows, count = x_RI.shape[0], DIGITS[x_RI.dtype]
    # The highest digit is at most 127 even after those below it are rounded into it.
    units = 127.0 * 256 ** (count - 1)
    largest_R1 = x_RI.abs().amax(1, keepdim=True).float().clamp_(min=LEAST)
    # Rows with a NaN or an infinity have any digits here, and are multiplied by it in the end.
    left_RI = (x_RI * (units / largest_R1)).round_().to(torch.int32)
    digits_XI = torch.empty(count * rows, x_RI.shape[1], dtype=torch.int8)
    *lower, highest_RI = torch.split(digits_XI, rows)
    for digit_RI in lower:
        # Written as int8, a number keeps its last eight bits: a digit from -128 to 127.
        digit_RI.copy_(left_RI)
        left_RI.add_(128).bitwise_right_shift_(8)
    highest_RI.copy_(left_RI)
    *lower_sums, y_RO = torch.split(_multiply(digits_XI, codes_OI), rows)
    for sum_RO in reversed(lower_sums):
        y_RO = torch.add(sum_RO, y_RO, alpha=256)
    return y_RO.mul_(scale_O).mul_(largest_R1.mul_(1 / units)).to(x_RI.dtype)


def _multiply(digits_XI: Tensor, codes_OI: Tensor) -> Tensor:
    """Return ``digits @ codes.T``, summed exactly and rounded to float32."""
    if not codes_OI.is_mkldnn:
        return torch._int_mm(digits_XI, codes_OI.t()).float()
    # Packed for unsigned numbers, 128 of which stand for 0; signed ones would take torch's slowest way.
    raised_XI = digits_XI.view(torch.uint8).bitwise_xor_(128)
    return multiply_raised(raised_XI, codes_OI, codes_OI.shape[1])


def multiply_raised(raised_XI: Tensor, packed_IO: Tensor, outputs: int) -> Tensor:
    """Return ``(raised - 128) @ packed`` for uint8 digits, summed exactly and rounded to float32."""
    ones_O, zeros_O = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    sums_XO: Tensor = torch.ops.onednn.qlinear_pointwise(
        raised_XI, 1.0, 128, packed_IO, ones_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums_XO


def unpack(codes_OI: Tensor) -> Tensor:
    """What ``pack`` was given."""
    return codes_OI.to_dense().t().contiguous() if codes_OI.is_mkldnn else codes_OI


def _pack(codes_OI: Tensor) -> Tensor:
    packed_IO: Tensor = torch.ops.onednn.qlinear_prepack(codes_OI, None)
    return packed_IO
