"""int8 linears by their codes against float64: every way of multiplying, rows that are hard to write as digits."""

import pytest
import torch
from torch import Tensor

from sightline_kernels.int8_linear import compilable, on_cpu, reference

# Both sides of the largest weight that isn't packed.
SHAPES = {"tiny": (31, 86), "wide": (300, 1001), "dotted": (576, 192), "large": (2304, 1024)}
ROWS = (1, 3, 16, 70, 300)
LARGEST_ERROR = {torch.float32: 2.0**-31, torch.bfloat16: 1 / 64000, torch.float16: 1 / 64000}


@pytest.fixture(autouse=True)
def _needs_vnni() -> None:
    if not on_cpu.can_multiply(torch.zeros(1, 1, dtype=torch.int8)):
        pytest.skip("this CPU has no VNNI")


def codes_of(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    absmax = torch.rand(shape[0], generator=generator) + 0.01
    # bitsandbytes' format of a row of zeros.
    codes[shape[0] // 2], absmax[shape[0] // 2] = 0, 0
    return codes, absmax


def error_and_bound(y: Tensor, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far ``y`` is from the product in float64, and how far the docstring lets it be."""
    wide, weight = x.double(), codes.double() * (absmax.double() / 127)[:, None]
    exact = wide @ weight.T + (0 if bias is None else bias.double())
    # Below 2**-96 the digits' steps get no finer.
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=2.0**-96)
    magnitudes = wide.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    bound = LARGEST_ERROR[x.dtype] * largest * weight.abs().sum(1)
    # Float32 sums, and up to three roundings to the result's own precision.
    bound += magnitudes * 2.0**-20 + 1.5 * torch.finfo(x.dtype).eps * (exact.abs() + magnitudes * (bias is not None))
    return (y.double() - exact).abs(), bound + torch.finfo(x.dtype).tiny


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_as_near_to_float64_as_promised(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, absmax = codes_of(shape)
    packed = on_cpu.pack(codes)
    assert packed.is_mkldnn == (shape == SHAPES["large"])
    assert packed.nbytes == codes.nbytes
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        for bias in (None, torch.randn(shape[0], generator=generator).to(dtype)):
            y = on_cpu.int8_linear(x, packed, absmax, bias)
            assert y.dtype == dtype
            error, bound = error_and_bound(y, x, codes, absmax, bias)
            assert (error <= bound).all(), f"{rows} rows: {(error / bound).max()} of the bound"
    y = on_cpu.int8_linear(x.view(3, 100, -1), packed, absmax, None)
    assert torch.equal(y.view(300, -1), on_cpu.int8_linear(x, packed, absmax, None))


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hard_rows_are_right_and_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, absmax = codes_of(shape)
    packed, limits = on_cpu.pack(codes), torch.finfo(dtype)
    for rows in ROWS[2:]:
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        usual = on_cpu.int8_linear(x, packed, absmax, None)
        x[0] = 0
        x[1, 5] = 1e4
        x[2] *= limits.tiny
        x[3] *= 1e-33
        x[4] = torch.where(x[4] > 0, 1.0, -1.0) * min(limits.max, 1e33) / shape[1]
        # Between two highest digits, and the most that the lower ones can add.
        x[5] = torch.arange(shape[1]) / shape[1] - 0.5
        x[6], x[7], x[8] = float("inf"), 1.0, 2.0
        x[7, 0], x[8, 3] = float("nan"), float("-inf")
        y = on_cpu.int8_linear(x, packed, absmax, None)
        assert torch.equal(y[9:], usual[9:]), "a row was changed by the others"
        assert not y[6:9, : shape[0] // 2].isfinite().any()
        assert not y[0].any()
        error, bound = error_and_bound(y[:6], x[:6], codes, absmax, None)
        assert (error <= bound).all(), f"{rows} rows: {error.amax(1)} within {bound.amin(1)}"


def test_a_row_has_the_same_bytes_in_every_place() -> None:
    for shape in SHAPES.values():
        codes, absmax = codes_of(shape)
        packed = on_cpu.pack(codes)
        for dtype in LARGEST_ERROR:
            row, results = torch.randn(shape[1]).to(dtype), []
            for place in range(16):
                x = torch.randn(16, shape[1]).to(dtype)
                x[place] = row
                results.append(on_cpu.int8_linear(x, packed, absmax, None)[place])
            assert all(torch.equal(result, results[0]) for result in results)


def test_an_outlier_costs_its_row_no_more_than_rounding_does() -> None:
    """The row's scale is the outlier's: digits of eight bits alone would leave nothing of the other numbers."""
    codes, absmax = codes_of((576, 192))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 192, generator=generator)
    x[:, 17] = 300
    # Weights that hardly see the outlier, as after rescaling: what is left is the other numbers' own.
    codes[:, 17] = 0
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        exact = given.double() @ (codes.double() * (absmax.double() / 127)[:, None]).T
        plain = reference.int8_linear(given, codes, absmax, None).double()
        ours = on_cpu._by_digits(given, codes, absmax / 127).double()
        assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


def test_the_largest_sums_fit() -> None:
    x, codes = torch.ones(2, 2**16), torch.full((32, 2**16), 127, dtype=torch.int8)
    x[1] = -1
    for packed in (codes, on_cpu.pack(codes), on_cpu._pack(codes)):
        y = on_cpu._by_digits(x, packed, torch.full((32,), 1 / 127))
        torch.testing.assert_close(y, x[:, :1].expand(2, 32) * 2**16)


def test_codes_elsewhere_or_too_wide_are_left_to_the_reference() -> None:
    assert not on_cpu.can_multiply(torch.zeros(2, 2, dtype=torch.int8, device="meta"))
    assert not on_cpu.can_multiply(torch.zeros(1, 2**16 + 1, dtype=torch.int8))
    x, (codes, absmax) = torch.randn(2, 86).double(), codes_of((31, 86))
    assert torch.equal(on_cpu.int8_linear(x, codes, absmax, None), reference.int8_linear(x, codes, absmax, None))


def test_instructions_that_saturate_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(digits_XI: Tensor, codes_IO: Tensor) -> Tensor:
        pairs = (digits_XI.unsqueeze(2).int() + 128) * codes_IO.unsqueeze(0).int()
        sums = (pairs[:, ::2] + pairs[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return (sums.sum(1) - 128 * codes_IO.sum(0)).int()

    assert on_cpu.can_multiply(torch.zeros(1, 1, dtype=torch.int8))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not on_cpu.can_multiply(torch.zeros(1, 1, dtype=torch.int8))


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_written_for_the_compiler_is_as_near(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, absmax = codes_of(shape)
    assert torch.equal(on_cpu.unpack(on_cpu.pack(codes)), codes)
    scale = absmax / 127
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1, ::7] *= 300
    x[2] = 0
    x[3] *= 1e-4
    for y, rows in ((compilable.multiply(x, codes, scale), x), (compilable.multiply_row(x[:1], codes, scale), x[:1])):
        assert y.dtype == torch.float32
        error, bound = error_and_bound(y, rows, codes, absmax, None)
        assert (error <= bound).all(), f"{(error / bound).max()} of the bound"
    broken = x.clone()
    broken[1, 3], broken[3, 0] = torch.nan, -torch.inf
    y, y_broken = compilable.multiply(x, codes, scale), compilable.multiply(broken, codes, scale)
    assert torch.equal(y_broken[[0, 2, 4]], y[[0, 2, 4]])
    assert not y_broken[[1, 3]].isfinite().any()
