"""Ways that take fewer operations on a CPU, against the references they stand in for: bits where these are promised."""

import pytest
import torch
from torch import Tensor

from sightline_kernels.linear.reference import linear, multiply_row
from sightline_kernels.rms_norm import on_cpu as rms_norm_on_cpu
from sightline_kernels.rms_norm.reference import add_rms_norm
from sightline_kernels.rotary.reference import apply_rotary
from sightline_kernels.sample.noise_ahead import NoiseAhead
from sightline_kernels.sample.reference import gumbel_noise, philox
from sightline_kernels.sample.words_on_cpu import philox_words

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, choices and positions, with all bits in use."""
    rows = torch.arange(count)
    return rows * 2**58 - 3, rows % 3, rows * 1000


def test_words_are_philoxs() -> None:
    seed, choice, position = rows_of(9)
    position[4], choice[5] = 2**32 - 1, 2**32 - 1
    quads = torch.arange(7).expand(9, 7)
    even = torch.stack((quads, choice[:, None].expand_as(quads)))
    odd = torch.stack((position[:, None].expand_as(quads), torch.zeros_like(quads)))
    key = torch.stack((seed, seed >> 32))[:, :, None] & 0xFFFFFFFF
    (word_0, word_2), (word_1, word_3) = philox(even, odd, key)
    expected = torch.stack((word_0, word_1, word_2, word_3), dim=-1).flatten(1)
    assert philox_words(seed, choice, position, 7).tolist() == expected.tolist()


@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_noise_made_ahead_is_the_same_to_the_bit(count: int) -> None:
    ahead = NoiseAhead()
    seed, choice, start = rows_of(count)
    # On and on, again, back, rows leaving, another place, other seeds, and on.
    moves = [*range(70), 69, 69, 40, 41, 42]
    for move in moves:
        position = start + move
        assert torch.equal(ahead(seed, choice, position, 86), gumbel_noise(seed, choice, position, 86)), move
    for kept in (count, max(1, count - 1)):
        rows = seed[:kept], choice[:kept], start[:kept] + 43
        assert torch.equal(ahead(*rows, 86), gumbel_noise(*rows, 86))
        assert torch.equal(ahead(*rows, 150), gumbel_noise(*rows, 150))
        others = rows[0] + 1, rows[1], rows[2] + 1
        assert torch.equal(ahead(*others, 150), gumbel_noise(*others, 150))
    if count > 1:
        # Only some rows went on.
        start[1:] += 44
        assert torch.equal(ahead(seed, choice, start, 86), gumbel_noise(seed, choice, start, 86))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", [5, 64, 192, 1376])
def test_a_norm_is_near_to_float64s(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x, residual, weight = (torch.randn(size, generator=generator) for size in ((9, width), (9, width), (width,)))
    for row, scale in enumerate((1, 1e-3, 100, 30, 1)):
        x[row] *= scale
        residual[row] *= scale
    # A row far from 0 on average, one of zeros, one that isn't finite, and one with a number far above the others.
    residual[4] += 50
    x[5] = residual[5] = 0
    x[6, 0] = torch.nan
    x[7, 3] = 1e4
    x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(dtype)
    finite = [row for row in range(9) if row != 6]
    packed = rms_norm_on_cpu.pack(weight)
    for added in (residual, None):
        normed, summed = rms_norm_on_cpu.add_rms_norm(x, added, packed, 1e-5)
        _, usual_sum = add_rms_norm(x, added, weight, 1e-5)
        assert normed.dtype == dtype
        assert torch.equal(summed[finite], usual_sum[finite])
        assert normed[6].isnan().all()
        exact, _ = add_rms_norm(summed.double(), None, weight.double(), 1e-5)
        bound = 2 * torch.finfo(dtype).eps * exact.abs()
        # The mean of a row and its negation is rounded in float32.
        bound += torch.finfo(torch.float32).eps * exact.abs().amax(1, keepdim=True)
        assert ((normed.double() - exact).abs() <= bound + torch.finfo(dtype).tiny)[finite].all()
        alone, _ = rms_norm_on_cpu.add_rms_norm(summed[1:2], None, packed, 1e-5)
        assert torch.equal(normed[1:2], alone), "a row was changed by the others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_row_is_multiplied_as_others_are(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((1, 200), (300, 200), (300,)))
    turned = weight.t().float().contiguous()
    for added in (None, bias):
        y = multiply_row(x, turned, added)
        assert y.shape == (1, 300)
        assert y.dtype == dtype
        exact = linear(x.double(), weight.double(), None if added is None else added.double())
        magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        assert ((y.double() - exact).abs() <= magnitude * 1e-6 + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_side_by_side_are_turned_to_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    heads, cos, sin = (torch.randn(size, generator=generator).to(dtype) for size in ((5, 4 + 2 + 2, 6), (5, 6), (5, 6)))
    q, k, v = heads.split((4, 2, 2), dim=1)
    before = heads.clone()
    together = apply_rotary(q, k, cos, sin)
    apart = apply_rotary(q.clone(), k.clone(), cos, sin)
    # Heads that don't follow the queries: these must not be taken for keys.
    elsewhere = apply_rotary(q, v, cos, sin)
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert torch.equal(elsewhere[1], apply_rotary(q.clone(), v.clone(), cos, sin)[1])
    assert torch.equal(heads, before)
