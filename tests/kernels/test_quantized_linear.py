"""int8 and NF4 against bitsandbytes' own functions on a CPU: the same bytes, the same scales, the same weights back."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from compressed_scales import compress_scales
from torch import Tensor

from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.nf4_linear import reference as nf4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bitsandbytes import functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute


@pytest.fixture(autouse=True)
def _without_a_compiler() -> Iterator[None]:
    """bitsandbytes compiles what it does with odd shapes, for every shape anew."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (1, 1), (3, 7), (5, 129), (33, 65), (7, 192), (300, 1001), (640, 1024)]
CPU = torch.device("cpu")


def weight_of(shape: tuple[int, int], dtype: torch.dtype, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    if kind == "zero rows":
        weight[:: max(2, shape[0] // 3)] = 0
        weight[-1] = 0
    if kind == "outlier rows":
        weight[:: max(2, shape[0] // 3)] *= 300
        weight[0, 0] = 40.0
    if kind == "tiny":
        weight *= 1e-6
    if kind == "ties":
        # Halfway between two codes: rounding to even and up differ here.
        weight = torch.randint(-254, 255, shape, generator=generator) / 2.0
        weight[:, 0] = 127.0
    return weight.to(dtype)


KINDS = ("normal", "zero rows", "outlier rows", "tiny", "ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    weight = weight_of(shape, dtype, kind)
    codes, absmax = int8.quantize(weight)
    their_codes, their_absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, their_codes)
    assert absmax.dtype == torch.float32
    assert torch.equal(absmax, their_absmax)
    theirs = bnb.int8_vectorwise_dequant(their_codes, their_absmax)
    for out in DTYPES:
        ours = int8.dequantize(codes, absmax, out)
        assert ours.dtype == out
        # Two roundings against one, in float32, and then the dtype's own.
        torch.testing.assert_close(ours, theirs.to(out), rtol=max(3e-7, torch.finfo(out).eps), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    weight = weight_of(shape, dtype, kind)
    for block_size in (64, 32, 256):
        packed, absmax = nf4.quantize(weight, block_size)
        their_packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        assert packed.dtype == torch.uint8
        assert torch.equal(packed, their_packed.view(-1))
        assert torch.equal(absmax, state.absmax)
        for out in DTYPES:
            # Their portable code: their CPU kernel reads a wrong scale where blocks run over rows' ends.
            theirs = _dequantize_4bit_compute(their_packed.view(-1), state.absmax, state.code, block_size, shape, out)
            ours = nf4.dequantize(packed, absmax, nf4.byte_pairs(CPU), shape, out, block_size)
            assert ours.dtype == out
            assert ours.shape == shape
            assert torch.equal(ours, theirs)
            if shape[1] % block_size == 0:
                state.dtype = out
                assert torch.equal(ours, bnb.dequantize_4bit(their_packed, state))


@pytest.mark.parametrize("shape", [(64, 64), (5, 129), (300, 1001), (640, 1024)], ids=str)
def test_compressed_scales_are_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = weight_of(shape, torch.float32, "outlier rows")
    packed, absmax = nf4.quantize(weight)
    scales = compress_scales(absmax)
    their_packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, their_packed.view(-1))
    assert torch.equal(scales.codes_K, state.absmax)
    assert torch.equal(scales.absmax_C, state.state2.absmax)
    assert (scales.offset_C == state.offset).all()
    assert torch.equal(scales.map_P, state.state2.code)
    assert scales.group == state.state2.blocksize
    their_absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4.expand_scales(scales), their_absmax)
    for out in DTYPES:
        theirs = _dequantize_4bit_compute(their_packed.view(-1), their_absmax, state.code, 64, shape, out)
        assert torch.equal(nf4.dequantize(packed, scales, nf4.byte_pairs(CPU), shape, out), theirs)
        if shape[1] % 64 == 0:
            state.dtype = out
            assert torch.equal(theirs, bnb.dequantize_4bit(their_packed, state))


def test_equal_scales_compress_to_their_mean() -> None:
    absmax = torch.full((300,), 0.25)
    assert torch.equal(nf4.expand_scales(compress_scales(absmax)), absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(1,), (9,), (2, 3)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linears_are_those_of_the_dequantized_weight(
    dtype: torch.dtype, leading: tuple[int, ...], biased: bool
) -> None:
    shape = (31, 86)
    weight, x = weight_of(shape, torch.float32), torch.randn(*leading, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if biased else None
    codes, absmax = int8.quantize(weight)
    expected = F.linear(x, int8.dequantize(codes, absmax, dtype), bias)
    assert torch.equal(int8.int8_linear(x, codes, absmax, bias), expected)
    packed, absmax = nf4.quantize(weight)
    pairs = nf4.byte_pairs(CPU)
    expected = F.linear(x, nf4.dequantize(packed, absmax, pairs, shape, dtype), bias)
    assert torch.equal(nf4.nf4_linear(x, packed, absmax, pairs, bias, shape[0]), expected)


def test_errors_are_as_large_as_the_formats_allow() -> None:
    weight = weight_of((256, 512), torch.float32)
    codes, absmax = int8.quantize(weight)
    off = (int8.dequantize(codes, absmax, torch.float32) - weight).abs()
    assert (off <= absmax[:, None] / 254 * 1.00001).all()
    packed, scales = nf4.quantize(weight)
    off = (nf4.dequantize(packed, scales, nf4.byte_pairs(CPU), (256, 512), torch.float32) - weight).abs()
    widest = nf4.levels(CPU).diff().max() / 2
    assert (off.view(-1, 64) <= scales[:, None] * widest * 1.00001).all()
