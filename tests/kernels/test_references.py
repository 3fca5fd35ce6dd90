"""The small kernels against their definitions in float64."""

import pytest
import torch

from sightline_kernels.linear.reference import can_pack, linear, pack
from sightline_kernels.rms_norm.reference import add_rms_norm
from sightline_kernels.rotary.reference import apply_rotary
from sightline_kernels.silu_mul.reference import silu_mul
from sightline_kernels.store_kv.reference import store_kv


def test_store_kv_writes_its_slots_and_no_others() -> None:
    k_cache, v_cache = torch.zeros(5, 4, 2, 3), torch.zeros(5, 4, 2, 3)
    k, v = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    store_kv(k, v, k_cache, v_cache, torch.tensor([19, 0, 6]))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[4, 3], rows[0])
        assert torch.equal(cache[0, 0], rows[1])
        assert torch.equal(cache[1, 2], rows[2])
        assert cache.count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm(with_residual: bool) -> None:
    x, weight = torch.randn(5, 32), torch.randn(32)
    residual = torch.randn(5, 32) if with_residual else None
    normed, summed = add_rms_norm(x, residual, weight, 1e-3)
    expected_sum = x if residual is None else x + residual
    wide = expected_sum.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert torch.equal(summed, expected_sum)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)


def test_add_rms_norm_squares_no_half_precision_numbers() -> None:
    # 300 squared overflows float16.
    normed, _ = add_rms_norm(torch.full((1, 8), 300.0).half(), None, torch.ones(8).half(), 1e-5)
    torch.testing.assert_close(normed, torch.ones(1, 8).half())


def test_apply_rotary_turns_pairs_of_half_a_head() -> None:
    q, k = torch.randn(4, 3, 6), torch.randn(4, 2, 6)
    angles = torch.randn(4, 3)
    cos = torch.cat((angles.cos(), angles.cos()), dim=1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    for x, turned in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        expected = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(4, 3), angles)[:, None]
        torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    gate_up = torch.randn(3, 10)
    gate, up = gate_up.double().split(5, dim=1)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (17,), (2, 5)], ids=str)
def test_packed_weights_multiply_like_plain_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(*shape, 24, dtype=dtype),
        torch.randn(40, 24, dtype=dtype),
        torch.randn(40, dtype=dtype),
    )
    if not can_pack(weight):
        pytest.skip("this torch was built without oneDNN")
    packed = pack(weight)
    assert packed.shape == weight.shape
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    for b in (bias, None):
        expected = torch.nn.functional.linear(x, weight, b)
        torch.testing.assert_close(linear(x, packed, b), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(linear(x, weight, b), expected)


def test_weights_elsewhere_or_of_other_types_stay_plain() -> None:
    assert not can_pack(torch.zeros(2, 2, device="meta"))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))


def test_a_packed_row_has_the_same_bytes_beside_any_others() -> None:
    weight = torch.randn(300, 100)
    if not can_pack(weight):
        pytest.skip("this torch was built without oneDNN")
    packed, row = pack(weight), torch.randn(100)
    results = []
    for place in range(16):
        x = torch.randn(16, 100)
        x[place] = row
        results.append(linear(x, packed, None)[place])
    assert all(torch.equal(result, results[0]) for result in results)
