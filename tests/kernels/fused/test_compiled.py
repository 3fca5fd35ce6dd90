"""Every fused twin compiled, at a 7B model's widths, for the cards it must run on, and its machine code read.

Needs no GPU. Proves what the compiler made, not how fast it is. Planted faults are seen found.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compiled import SHARED_BYTES, compile_for, faults, instructions_a_weight
from twins import make_attention, make_heads, noise

from sightline_kernels.int8_linear import fused as int8
from sightline_kernels.launch import Launch
from sightline_kernels.nf4_linear import fused as nf4
from sightline_kernels.nf4_linear.reference import CompressedScales, Scales, byte_pairs
from sightline_kernels.paged_attention import fused as attention
from sightline_kernels.quick_gelu import fused as quick_gelu
from sightline_kernels.rms_norm import fused as rms_norm
from sightline_kernels.rotary_store_kv import fused as rotary_store_kv
from sightline_kernels.sample import fused as sampling
from sightline_kernels.silu_mul import fused as silu_mul
from sightline_kernels.store_kv import fused as store_kv

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted Triton compiles nothing"),
    pytest.mark.timeout(600),
]


def norm(dtype: torch.dtype, width: int = 4096, with_residual: bool = True) -> Launch:
    x = noise(2, width, dtype=dtype, device="cpu")
    residual = x.clone() if with_residual else None
    return rms_norm.plan(x, residual, x[0].clone(), 1e-5, x.clone(), x.clone())


def gate(dtype: torch.dtype) -> Launch:
    return silu_mul.plan(noise(2, 2 * 11008, dtype=dtype, device="cpu"), noise(2, 11008, dtype=dtype, device="cpu"))


def turn(dtype: torch.dtype, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Launch:
    step = make_heads(2, heads, kv_heads, head_dim, dtype=dtype, device="cpu")
    inputs = (step.q_THD, step.k_TGD, step.v_TGD, step.cos_TD, step.sin_TD, *step.fresh_caches(), step.slots_T)
    return rotary_store_kv.plan(*inputs, torch.zeros(2, heads, head_dim, dtype=dtype))


def store(dtype: torch.dtype) -> Launch:
    step = make_heads(2, 32, 8, 128, dtype=dtype, device="cpu")
    return store_kv.plan(step.k_TGD, step.v_TGD, *step.fresh_caches(), step.slots_T)


def draw(vocab: int) -> Launch:
    whole, real = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    return sampling.plan(torch.zeros(2, vocab), real, whole, real, real, whole, whole, whole, whole.clone())


def attend(which: int, dtype: torch.dtype, kv_heads: int = 8, head_dim: int = 128) -> Launch:
    """Of a step of decodes and slices: its decodes (0), the merging of their parts (1), its slices (2)."""
    lengths = [(1, 640), (1, 3), (70, 80), (2, 2)]
    step = make_attention(
        lengths, heads=32, kv_heads=kv_heads, head_dim=head_dim, block_size=16, dtype=dtype, device="cpu"
    )
    out_THD = torch.zeros_like(step.q_THD)
    return attention.plan(step.q_THD, step.k_cache_NPGD, step.v_cache_NPGD, step.layout, step.scale, out_THD)[which]


def multiply(scheme: str, rows: int, dtype: torch.dtype = torch.bfloat16, *, split: bool = True) -> Launch:
    """A square matrix times ``rows``: into sums of parts, or ``split`` off, with a bias into the result."""
    width = 4096
    x, outputs = torch.zeros(rows, width, dtype=dtype), 64 if scheme == "int8" else 128
    parts = int8.split_count(rows, width, width, outputs, int8.INPUTS if scheme == "int8" else 64)
    part_SRO = torch.zeros(parts, rows, width) if split else torch.zeros(1, rows, width, dtype=dtype)
    bias_O = None if split else torch.zeros(width, dtype=dtype)
    if scheme == "int8":
        return int8.plan(x, torch.zeros(width, width, dtype=torch.int8), torch.zeros(width), bias_O, part_SRO)
    packed, blocks = torch.zeros(width * width // 2, dtype=torch.uint8), width * width // 64
    scales: Scales = torch.zeros(blocks)
    if scheme == "nf4, double":
        groups = torch.zeros(blocks // 256)
        scales = CompressedScales(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(256), groups, groups, 256)
    return nf4.plan(x, packed, scales, byte_pairs(x.device), bias_O, part_SRO)


def add_parts(dtype: torch.dtype) -> Launch:
    y_RO = torch.zeros(2, 4096, dtype=dtype)
    return int8.plan_sum(torch.zeros(4, 2, 4096), y_RO[0].clone(), y_RO)


def make_whole(dtype: torch.dtype, width: int = 11008) -> Launch:
    codes = torch.zeros(8, width, dtype=torch.int8)
    return int8.plan_dequantize(codes, torch.ones(8), torch.empty(8, width, dtype=dtype))


def make_nf4_whole(dtype: torch.dtype, group: int = 0) -> Launch:
    weight_OI = torch.empty(8, 11008, dtype=dtype)
    blocks = weight_OI.numel() // 64
    scales: Scales = torch.ones(blocks)
    if group:
        sizes = torch.ones(-(-blocks // group))
        scales = CompressedScales(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(256), sizes, sizes, group)
    packed = torch.zeros(weight_OI.numel() // 2, dtype=torch.uint8)
    return nf4.plan_dequantize(packed, scales, byte_pairs(packed.device), weight_OI)


LAUNCHES: dict[str, Callable[[torch.dtype], Launch]] = {
    "add_rms_norm": norm,
    "rms_norm": lambda dtype: norm(dtype, with_residual=False),
    "add_rms_norm, 5120 wide": lambda dtype: norm(dtype, 5120),
    "silu_mul": gate,
    "rotary_store_kv": turn,
    "rotary_store_kv, heads of 96": lambda dtype: turn(dtype, 32, 32, 96),
    "store_kv": store,
    "int8 weights made whole": make_whole,
    "quick_gelu": lambda dtype: quick_gelu.plan(torch.zeros(3, 577, 4096, dtype=dtype), torch.zeros(1, dtype=dtype)),
}
NF4_WHOLE: dict[str, Callable[[torch.dtype], Launch]] = {
    "float32 scales": make_nf4_whole,
    "compressed scales": lambda dtype: make_nf4_whole(dtype, 256),
}
ATTENTION: dict[str, Callable[[torch.dtype], Launch]] = {
    "decodes": lambda dtype: attend(0, dtype),
    "decodes of unshared heads": lambda dtype: attend(0, dtype, 32),
    "slices": lambda dtype: attend(2, dtype),
}
OTHER_HEADS: dict[str, Callable[[torch.dtype], Launch]] = {
    "decodes of heads of 64": lambda dtype: attend(0, dtype, 8, 64),
    "slices of heads of 64": lambda dtype: attend(2, dtype, 8, 64),
    "decodes of heads of 256": lambda dtype: attend(0, dtype, 8, 256),
    "slices of heads of 256": lambda dtype: attend(2, dtype, 8, 256),
}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_machine_code_is_free_of_faults(name: str, capability: int) -> None:
    assert faults(compile_for(LAUNCHES[name](torch.bfloat16), capability), capability) == []


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", NF4_WHOLE)
def test_nf4_weights_are_made_whole_in_wide_strides(name: str, capability: int) -> None:
    # Scales and the numbers that bytes stand for are looked up one by one; what is streamed isn't.
    made = compile_for(NF4_WHOLE[name](torch.bfloat16), capability)
    assert faults(made, capability, wide_loads=1) == []
    assert re.search(r"\bSTG\.E\.(\w+\.)*128\b", made.sass)


def loads_of_keys(launch: Launch, dtype: torch.dtype) -> int:
    """128-bit loads that each thread needs for the keys and values of one turn of the loop."""
    tile_bytes = launch.constants["KEYS"] * launch.constants["D_BLOCK"] * dtype.itemsize
    return 2 * tile_bytes // (launch.num_warps * 32 * 16)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_loads_keys_and_values_wide_and_fits(name: str, capability: int) -> None:
    launch = ATTENTION[name](torch.bfloat16)
    made = compile_for(launch, capability)
    assert faults(made, capability, wide_loads=loads_of_keys(launch, torch.bfloat16)) == []


@pytest.mark.parametrize(("vocab", "capability"), [*((32064, each) for each in SHARED_BYTES), (151936, 80), (1408, 90)])
def test_sampling_reads_its_rows_wide(vocab: int, capability: int) -> None:
    launch = draw(vocab)
    # Six passes: the largest logit, its place, the sum of weights, the bounds of top-k and top-p, the draw.
    wide_loads = 6 * -(-min(vocab, sampling.BLOCK) // (launch.num_warps * 32 * 4))
    assert faults(compile_for(launch, capability), capability, wide_loads=wide_loads) == []


@pytest.mark.parametrize(
    ("scheme", "weights", "budget"), [("int8", 64 * 128, 9.0), ("nf4", 128 * 64, 6.6), ("nf4, double", 128 * 64, 6.6)]
)
@pytest.mark.parametrize("rows", [2, 16])
def test_a_weight_takes_few_instructions_on_hopper(scheme: str, weights: int, budget: float, rows: int) -> None:
    """Reading weights at the memory's speed leaves an H200 6.9 thread instructions for one of int8 and 3.9 for one of
    NF4; the budgets are these over the shares of that speed that are aimed for."""
    launch = multiply(scheme, rows)
    assert instructions_a_weight(compile_for(launch, 90), launch, weights) <= budget


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("split", [True, False], ids=["parts", "whole"])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4, double"])
def test_quantized_linears_spill_nothing_and_fit(scheme: str, split: bool, capability: int) -> None:
    for rows in (2, 64) if split else (16,):
        # Packed weights are read in wide loads; scales and tables needn't be.
        made = compile_for(multiply(scheme, rows, split=split), capability)
        assert faults(made, capability, wide_loads=1) == [], f"{rows} rows"


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compressed_scales_round_twice_and_cost_float32_ones_nothing(capability: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made = compile_for(multiply("nf4, double", 16, dtype), capability)
        # Tables are read in narrow loads; packed weights are the wide ones.
        assert faults(made, capability, wide_loads=1) == []
        # Product and sum of a scale; in one instruction they would round once.
        assert re.search(r"\bFADD\b", made.sass)
    plain = compile_for(multiply("nf4", 16), capability)
    assert not re.search(r"\bFADD\b", plain.sass), "scales in float32 are made whole again"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_in_other_precisions_too(name: str, dtype: torch.dtype) -> None:
    launch = ATTENTION[name](dtype)
    assert faults(compile_for(launch, 86), 86, wide_loads=loads_of_keys(launch, dtype)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OTHER_HEADS)
def test_attention_of_other_heads_fits_a_small_card(name: str, dtype: torch.dtype) -> None:
    launch = OTHER_HEADS[name](dtype)
    assert faults(compile_for(launch, 86), 86, wide_loads=loads_of_keys(launch, dtype)) == []


def test_merging_parts_spills_nothing() -> None:
    assert faults(compile_for(attend(1, torch.bfloat16), 80), 80, wide_loads=1) == []


def test_narrow_loads_of_keys_are_found() -> None:
    launch = ATTENTION["decodes of unshared heads"](torch.bfloat16)
    made = compile_for(launch, 90, aligned=False)
    # Some compilers make registers spill besides.
    assert "0 128-bit loads, 16 are wanted" in faults(made, 90, wide_loads=loads_of_keys(launch, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["add_rms_norm", "silu_mul", "rotary_store_kv", "store_kv", "quick_gelu"])
def test_other_precisions_too(name: str, dtype: torch.dtype) -> None:
    assert faults(compile_for(LAUNCHES[name](dtype), 80), 80) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_widest_norm_spills_nothing(dtype: torch.dtype) -> None:
    assert faults(compile_for(norm(dtype, rms_norm.WIDEST), 80), 80) == []


@pytest.mark.parametrize("name", ["add_rms_norm", "silu_mul", "rotary_store_kv", "store_kv"])
def test_pointers_of_unknown_alignment_are_found(name: str) -> None:
    found = faults(compile_for(LAUNCHES[name](torch.bfloat16), 90, aligned=False), 90)
    assert "no 128-bit loads" in found
    assert "numbers loaded or stored one by one" in found


def test_spilled_registers_are_found() -> None:
    wide = replace(norm(torch.float32, rms_norm.WIDEST), num_warps=4)
    assert any("registers spill" in fault for fault in faults(compile_for(wide, 90), 90))


def test_too_much_shared_memory_is_found() -> None:
    made = replace(compile_for(store(torch.bfloat16), 90), shared_bytes=100 * 2**10)
    assert faults(made, 90) == []
    assert faults(made, 86) == ["102400 bytes of shared memory, 101376 are there"]
