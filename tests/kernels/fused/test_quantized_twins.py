"""The quantized linears' twins against dequantized weights in float64: compiled on a GPU, else interpreted.

As `test_twins.py`: without a GPU it runs through `test_interpreted.py`.
"""

import os

import pytest
import torch
from compressed_scales import compress_scales
from torch import Tensor
from twins import noise

from sightline_kernels.int8_linear import fused as int8
from sightline_kernels.int8_linear import reference as int8_reference
from sightline_kernels.nf4_linear import fused as nf4
from sightline_kernels.nf4_linear import reference as nf4_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 5, 64), (3, 130, 192), (17, 128, 320), (64, 200, 1088), (2, 1, 4096), (65, 70, 64), (150, 5, 1088)]
"""(rows, outputs, inputs)"""

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]


def check(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, slack: float) -> None:
    """``ours`` is the product in float64 but for float32 sums, one rounding, and ``slack`` of each term's size."""
    x, weight = x.double(), weight.double()
    true = x @ weight.T + (0 if bias is None else bias.double())
    terms = x.abs() @ weight.abs().T
    eps, eps32 = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps
    allowed = (slack + 64 * eps32) * terms + 0.51 * eps * true.abs() + 16 * eps32
    assert ours.shape == true.shape
    assert not ours.isnan().any()
    assert ((ours.double() - true).abs() <= allowed).all(), float(((ours.double() - true).abs() / allowed).max())


def inputs(rows: int, outputs: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = noise(rows, width, dtype=dtype, device=device)
    weight = noise(outputs, width, dtype=dtype, device=device, seed=1) / 8
    weight[0] = 0
    weight[-1, 3] = 50
    return x, weight, noise(outputs, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "outputs", "width"), SHAPES)
def test_int8_linear(rows: int, outputs: int, width: int, biased: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(rows, outputs, width, dtype, device)
    codes, absmax = int8_reference.quantize(weight)
    ours = int8.int8_linear(x, codes, absmax, bias if biased else None)
    # Whole numbers up to 127 are exact in every dtype here, so only sums round.
    check(ours, x, codes.double() * (absmax.double() / 127)[:, None], bias if biased else None, 0.0)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "outputs", "width"), SHAPES)
def test_nf4_linear(rows: int, outputs: int, width: int, biased: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(rows, outputs, width, dtype, device)
    packed, absmax = nf4_reference.quantize(weight)
    pairs = nf4_reference.byte_pairs(weight.device)
    ours = nf4.nf4_linear(x, packed, absmax, pairs, bias if biased else None, outputs)
    true = nf4_reference.dequantize(packed, absmax, pairs, (outputs, width), torch.float32)
    # A level is rounded to the dtype of x before it meets x.
    check(ours, x, true, bias if biased else None, torch.finfo(dtype).eps / 2)


def compressed(absmax: Tensor, group: int) -> nf4_reference.CompressedScales:
    """Scales near ``absmax``, of short groups with an offset each, so that a small matrix has several."""
    made = compress_scales(absmax)
    codes = torch.arange(absmax.numel(), device=absmax.device).mul_(37).add_(11).to(torch.uint8)
    groups = -(-absmax.numel() // group)
    sizes = torch.arange(1, groups + 1, device=absmax.device) / 7
    return nf4_reference.CompressedScales(codes, made.map_P, sizes, sizes / 3 + 0.9, group)


@pytest.mark.parametrize("group", [256, 5])
@pytest.mark.parametrize(("rows", "outputs", "width"), SHAPES)
def test_nf4_linear_of_compressed_scales(
    rows: int, outputs: int, width: int, group: int, dtype: torch.dtype, device: str
) -> None:
    x, weight, bias = inputs(rows, outputs, width, dtype, device)
    packed, absmax = nf4_reference.quantize(weight)
    scales, pairs = compressed(absmax, group), nf4_reference.byte_pairs(weight.device)
    ours = nf4.nf4_linear(x, packed, scales, pairs, bias, outputs)
    true = nf4_reference.dequantize(packed, scales, pairs, (outputs, width), torch.float32)
    check(ours, x, true, bias, torch.finfo(dtype).eps / 2)


def test_scales_are_made_whole_to_the_last_bit(dtype: torch.dtype, device: str) -> None:
    width, rows = 4096, 64
    weight = noise(130, width, dtype=torch.float32, device=device)
    packed, absmax = nf4_reference.quantize(weight)
    # Of a level of 1 the product is its scale.
    packed.fill_(0xFF)
    pairs = nf4_reference.byte_pairs(weight.device)
    # A row of the identity from each block shows the weights themselves.
    x = torch.zeros(rows, width, dtype=torch.float32, device=device)
    x[torch.arange(rows), torch.arange(0, width, 64)] = 1
    scales = compress_scales(absmax)
    part_SRO = torch.empty(int8.split_count(rows, 130, width, nf4.OUTPUTS, 64), rows, 130, device=device)
    nf4.plan(x.to(dtype), packed, scales, pairs, None, part_SRO).run()
    assert torch.equal(part_SRO.sum(0).T, nf4_reference.expand_scales(scales).view(130, 64))
    assert not torch.equal(part_SRO.sum(0).T, absmax.view(130, 64)), "compression lost nothing"


def test_leading_axes_and_no_rows(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(6, 9, 128, dtype, device)
    codes, absmax = int8_reference.quantize(weight)
    packed, scales = nf4_reference.quantize(weight)
    pairs = nf4_reference.byte_pairs(weight.device)
    for run in (
        lambda x: int8.int8_linear(x, codes, absmax, bias),
        lambda x: nf4.nf4_linear(x, packed, scales, pairs, bias, 9),
    ):
        flat = run(x)
        assert torch.equal(run(x.view(2, 3, 128)), flat.view(2, 3, 9))
        # Rows that stand apart in memory.
        assert torch.equal(run(torch.cat((x, x), dim=1)[:, :128]), flat)
        assert run(x[:0]).shape == (0, 9)


@pytest.mark.parametrize("width", [64, 4160])
def test_many_rows_take_the_dequantized_product(width: int, dtype: torch.dtype, device: str) -> None:
    x, weight, _ = inputs(int8.MOST_ROWS + 1, 4, width, dtype, device)
    codes, absmax = int8_reference.quantize(weight)
    assert torch.equal(int8.int8_linear(x, codes, absmax, None), int8_reference.int8_linear(x, codes, absmax, None))
    packed, scales = nf4_reference.quantize(weight)
    pairs = nf4_reference.byte_pairs(weight.device)
    for each in (scales, compressed(scales, 5), compress_scales(scales)):
        ours, right = (make.nf4_linear(x, packed, each, pairs, None, 4) for make in (nf4, nf4_reference))
        assert torch.equal(ours, right)
