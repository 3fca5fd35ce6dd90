"""Every fused twin against its reference in float64: on a GPU compiled, under TRITON_INTERPRET=1 on the CPU.

Triton decides which when it is imported, so in an ordinary run without a GPU nothing here runs but through
`test_interpreted.py`, which starts this file in a process of its own.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import CLIP, Album, make_engine, make_prompt, make_request, picture, run
from torch import Tensor
from twins import make_attention, make_heads, noise, wide_rows

from sightline_kernels.dispatch import REFERENCES, choose
from sightline_kernels.paged_attention import fused as attention
from sightline_kernels.paged_attention.reference import paged_attention
from sightline_kernels.quick_gelu import fused as quick_gelu
from sightline_kernels.quick_gelu.reference import quick_gelu as quick_gelu_reference
from sightline_kernels.rms_norm import fused as rms_norm
from sightline_kernels.rms_norm.reference import add_rms_norm
from sightline_kernels.rotary_store_kv import fused as rotary_store_kv
from sightline_kernels.rotary_store_kv.reference import rotary_store_kv as rotary_store_kv_reference
from sightline_kernels.silu_mul import fused as silu_mul
from sightline_kernels.silu_mul.reference import silu_mul as silu_mul_reference
from sightline_kernels.store_kv import fused as store_kv
from sightline_kernels.store_kv.reference import store_kv as store_kv_reference
from sightline_models.config import read_config
from sightline_models.decoder import kernel_workload
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm
from sightline_server.engine.load import use_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    # Interpreted, a division of masked numbers says so.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def check(ours: Tensor, true: Tensor, slack: float = 0.0) -> None:
    """``ours`` is the float64 ``true`` but for float32 arithmetic, one rounding to its own dtype, and ``slack``."""
    eps, eps32 = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps
    relative = 16 * eps32 if ours.dtype == torch.float32 else 0.51 * eps
    torch.testing.assert_close(ours.double(), true, rtol=relative, atol=16 * eps32 + slack, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 30), (5, 64), (2, 1000), (1, 4096)])
def test_add_rms_norm(rows: int, width: int, with_residual: bool, dtype: torch.dtype, device: str) -> None:
    x = wide_rows(rows, width, dtype=dtype, device=device)
    residual = wide_rows(rows, width, dtype=dtype, device=device, seed=1) if with_residual else None
    weight = noise(width, dtype=dtype, device=device)
    normed, summed = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, x if residual is None else x + residual)
    check(normed, add_rms_norm(summed.double(), None, weight.double(), 1e-5)[0])


def test_add_rms_norm_squares_no_half_precision_numbers(device: str) -> None:
    x, weight = torch.full((1, 8), 300.0).half().to(device), torch.ones(8).half().to(device)
    torch.testing.assert_close(rms_norm.add_rms_norm(x, None, weight, 1e-5)[0], weight[None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 5), (3, 1024), (2, 1100), (1, 2064)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    gate_up = wide_rows(rows, 2 * width, dtype=dtype, device=device)
    check(silu_mul.silu_mul(gate_up), silu_mul_reference(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (2, 4099)])
def test_quick_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = noise(*shape, dtype=dtype, device=device)
    x.view(-1)[0] = -90.0
    check(quick_gelu.quick_gelu(x), quick_gelu_reference(x.double()))
    assert quick_gelu.quick_gelu(x[:0]).shape == x[:0].shape


def test_silu_mul_of_large_numbers_is_no_nan(device: str) -> None:
    gate_up = torch.tensor([[-3e4, 3e4, -100.0, 2.0, 2.0, 2.0]], dtype=torch.float16).to(device)
    check(silu_mul.silu_mul(gate_up), silu_mul_reference(gate_up.double()))


HEADS = [(1, 3, 1, 2), (5, 4, 4, 8), (4, 6, 2, 20), (2, 5, 5, 96), (3, 32, 8, 128), (2, 2, 1, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), HEADS)
def test_rotary_store_kv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    step = make_heads(tokens, heads, kv_heads, head_dim, dtype=dtype, device=device)
    inputs = (step.q_THD, step.k_TGD, step.v_TGD, step.cos_TD, step.sin_TD)
    ours, true = step.fresh_caches(), step.fresh_caches(torch.float64)
    out_THD = rotary_store_kv.rotary_store_kv(*inputs, *ours, step.slots_T)
    expected_THD = rotary_store_kv_reference(*(each.double() for each in inputs), *true, step.slots_T)
    assert out_THD.is_contiguous()
    check(out_THD, expected_THD)
    # Slots nobody wrote still hold their NaN.
    check(ours[0], true[0])
    check(ours[1], true[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [*HEADS, (2, 1, 11, 100)])
def test_store_kv(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    step = make_heads(tokens, heads, kv_heads, head_dim, dtype=dtype, device=device)
    ours, expected = step.fresh_caches(), step.fresh_caches()
    store_kv.store_kv(step.k_TGD, step.v_TGD, *ours, step.slots_T)
    store_kv_reference(step.k_TGD, step.v_TGD, *expected, step.slots_T)
    for cache, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(cache, true, rtol=0, atol=0, equal_nan=True)


STEPS = {
    "one token": [(1, 1)],
    "decodes of many lengths": [(1, 7), (1, 1), (1, 4), (1, 19)],
    "a whole prompt": [(9, 9)],
    "a later chunk": [(5, 14)],
    "everything at once": [(1, 3), (1, 12), (6, 6), (2, 11), (7, 8)],
    "many keys, one tile of them full": [(1, 300), (1, 5), (3, 257), (64, 64)],
    "several tiles": [(70, 70), (3, 3), (130, 140)],
}


def check_attention(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, block_size: int, **rest: Any
) -> None:
    step = make_attention(lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, **rest)
    caches = (step.k_cache_NPGD, step.v_cache_NPGD)
    ours = attention.paged_attention(step.q_THD, *caches, step.layout, step.scale)
    true = paged_attention(step.q_THD.double(), *(cache.double() for cache in caches), step.layout, step.scale)
    # A key's weight is rounded to the values' dtype before it meets them; scores in float32 are off by some roundings.
    largest = float(caches[1].nan_to_num().abs().max())
    check(ours, true, slack=largest * (torch.finfo(ours.dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
def test_paged_attention(lengths: list[tuple[int, int]], heads: int, kv_heads: int, device: str) -> None:
    check_attention(lengths, heads, kv_heads, 8, 4, dtype=torch.float32, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(2, 2, 128, 16), (6, 2, 20, 3), (2, 1, 256, 1)]
)
def test_paged_attention_of_other_shapes(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: str
) -> None:
    lengths = STEPS["everything at once"]
    check_attention(lengths, heads, kv_heads, head_dim, block_size, dtype=dtype, device=device)
    check_attention([(1, 200), (90, 100)], heads, kv_heads, head_dim, block_size, dtype=dtype, device=device)


def test_paged_attention_of_more_rows_than_it_splits(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", 1)
    for kv_heads in (4, 2):
        check_attention([(1, 300), (1, 2)], 4, kv_heads, 16, 4, dtype=torch.float32, device=device)


@pytest.mark.skipif(INTERPRETED, reason="an interpreter has no graphs")
def test_a_step_of_decodes_is_captured_and_replayed_at_other_lengths(device: str) -> None:
    step = make_attention(
        [(1, 70), (1, 300)], heads=4, kv_heads=2, head_dim=64, dtype=torch.float16, device=device, block_size=16
    )
    inputs = (step.q_THD, step.k_cache_NPGD, step.v_cache_NPGD)
    attention.paged_attention(*inputs, step.layout, step.scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = attention.paged_attention(*inputs, step.layout, step.scale)
    for context_lens in ((70, 300), (1, 129)):
        step.layout.context_len_B.copy_(torch.tensor(context_lens))
        graph.replay()
        expected = replace(step.layout, context_lens=context_lens, memo={})
        true = paged_attention(*(each.double() for each in inputs), expected, step.scale)
        check(out_THD, true, slack=5 * torch.finfo(torch.float16).eps)


def test_no_tokens_are_no_launch(device: str) -> None:
    step = make_heads(0, 4, 2, 8, dtype=torch.float32, device=device)
    empty, weight = step.q_THD.flatten(1), torch.ones(32, device=device)
    assert rms_norm.add_rms_norm(empty, empty, weight, 1e-5)[0].shape == (0, 32)
    assert silu_mul.silu_mul(empty).shape == (0, 16)
    caches = step.fresh_caches()
    inputs = (step.q_THD, step.k_TGD, step.v_TGD, step.cos_TD, step.sin_TD)
    assert rotary_store_kv.rotary_store_kv(*inputs, *caches, step.slots_T).shape == (0, 4, 8)
    store_kv.store_kv(step.k_TGD, step.v_TGD, *caches, step.slots_T)


@pytest.mark.skipif(INTERPRETED, reason="needs more memory than a test may take on a CPU")
def test_slots_past_two_thousand_million_numbers(device: str) -> None:
    step = make_heads(1, 8, 8, 128, dtype=torch.bfloat16, device=device)
    block_size, last = 16, 2**31 // (8 * 128) + 40
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    caches = [
        torch.zeros(last // block_size + 1, block_size, 8, 128, dtype=torch.bfloat16, device=device) for _ in "kv"
    ]
    slots_T = torch.tensor([last], device=device)
    inputs = (step.q_THD, step.k_TGD, step.v_TGD, step.cos_TD, step.sin_TD)
    rotary_store_kv.rotary_store_kv(*inputs, *caches, slots_T)
    assert torch.equal(caches[1].view(-1, 8, 128)[last], step.v_TGD[0])
    assert caches[1].view(-1, 8, 128)[: 2**10].count_nonzero() == 0
    store_kv.store_kv(step.v_TGD, step.k_TGD, *caches, slots_T)
    assert torch.equal(caches[1].view(-1, 8, 128)[last], step.k_TGD[0])


def test_a_model_answers_the_same_with_fused_kernels(tmp_path: Path, device: str) -> None:
    write_checkpoint(tmp_path, seed=3)
    config, place = read_config(tmp_path), torch.device(device)
    use_device(place)
    workload = kernel_workload(config.decoder, dtype=torch.float32, device=place)
    answers = []
    for kernels in (REFERENCES, choose("fused", workload)):
        model: Vlm = load_vlm(tmp_path, config, CLIP, dtype=torch.float32, device=place, kernels=kernels)
        album, size = Album(), config.vision.image_size
        parts: list[list[object]] = [[9], [3, picture(size, 1), 6]]
        requests = [
            make_request(f"r{i}", make_prompt(model, album, each, seed=i), max_tokens=3, logprobs=True)
            for i, each in enumerate(parts)
        ]
        answers.append(run(make_engine(model, device=device, max_step_tokens=16), requests, album))
    plain, fused = answers
    assert kernels is not REFERENCES
    for name, answer in plain.items():
        assert fused[name].token_ids == answer.token_ids
        assert fused[name].logprobs == pytest.approx(answer.logprobs, abs=1e-4)
