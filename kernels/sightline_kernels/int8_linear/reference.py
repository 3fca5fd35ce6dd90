"""Linear layers whose weight is int8 with one float32 scale a row, in plain torch.

The arithmetic is bitsandbytes' for the weights of LLM.int8() (Dettmers et al., arXiv 2208.07339): absolute-maximum
scaling, row by row. Activations are not quantized. Knows no checkpoint.
Suffixes: I input width, O output width, R rows of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers made or read at a time: what a large weight needs beside its result stays small, and in a CPU's cache. A GPU
# wants few launches instead.
_CHUNK, _CHUNK_OF_GPU = 2**18, 2**24


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(codes_OI, absmax_O)``, int8 and float32: a row's largest magnitude becomes 127.

    ``weight_OI`` is float32, float16 or bfloat16; the arithmetic is float32's. A row of zeros has absmax 0.
    """
    rows = _rows_at_once(weight_OI)
    chunks = [_quantize_chunk(chunk_RI) for chunk_RI in torch.split(weight_OI, rows)]
    return torch.cat([codes_RI for codes_RI, _ in chunks]), torch.cat([absmax_R for _, absmax_R in chunks])


def _quantize_chunk(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    absmax_R = weight_RI.abs().amax(dim=1).float()
    codes_RI = (weight_RI * (127.0 / absmax_R)[:, None]).round_()
    # A row of zeros was divided by its own maximum.
    return codes_RI.nan_to_num_(0.0).to(torch.int8), absmax_R


def dequantize(codes_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weight_OI in ``dtype``: ``codes * absmax / 127``, computed in float32 and rounded once."""
    weight_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    scale_O1 = (absmax_O / 127.0)[:, None]
    rows = _rows_at_once(codes_OI)
    for chunk_RI, codes_RI, scale_R1 in zip(
        torch.split(weight_OI, rows), torch.split(codes_OI, rows), torch.split(scale_O1, rows), strict=True
    ):
        chunk_RI.copy_(codes_RI.float().mul_(scale_R1))
    return weight_OI


def _rows_at_once(numbers_OI: Tensor) -> int:
    return max(1, (_CHUNK if numbers_OI.is_cpu else _CHUNK_OF_GPU) // numbers_OI.shape[1])


def int8_linear(x_I: Tensor, codes_OI: Tensor, absmax_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` over the last axis of ``x``, the weight dequantized to the dtype of ``x``."""
    return F.linear(x_I, dequantize(codes_OI, absmax_O, x_I.dtype), bias_O)
