"""Stage kernels: every fused twin beside its reference, at a 7B model's widths: the largest error of both.

The truth is the reference in float64. A twin may be no farther from it than its reference is, or than one rounding.
Knows no time but sampling's, beside a sort's: what the other twins gain shows in the decode and profile stages.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.stage import Stage, first_line, run, times_ms
from sightline_kernels.dispatch import (
    OPERATIONS,
    REFERENCES,
    Kernels,
    Workload,
    can_build_launchers,
    capability_of,
    explain,
)
from sightline_kernels.dispatch import choose as choose_kernels
from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.layout import PagedLayout
from sightline_kernels.nf4_linear import reference as nf4

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 11008, 32, 128, 16
VOCAB = 32064
KV_HEADS = (32, 8)
ROWS = (1, 64, 2048)
SAMPLED = (1, 8, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Trial:
    """One operation on given inputs: ``call`` runs it with some kernels in some dtype and returns all it wrote."""

    operation: str
    call: Callable[[Kernels, torch.dtype], tuple[Tensor, ...]]


def trials(rows: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[Trial]:
    """Every operation that has a twin, on seeded inputs that ``dtype`` holds exactly."""
    generator = torch.Generator(device=device).manual_seed(rows)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x_TD, residual_TD, weight_D, gate_up_T2F = (
        noise(rows, HIDDEN),
        noise(rows, HIDDEN),
        noise(HIDDEN),
        noise(rows, 2 * INTERMEDIATE),
    )
    heads_TXD = noise(rows, HEADS + 2 * kv_heads, HEAD_DIM)
    angles_TR = torch.randn(rows, HEAD_DIM // 2, generator=generator, device=device)
    cos_TD = angles_TR.cos().repeat(1, 2).to(dtype)
    sin_TD = torch.cat((-angles_TR.sin(), angles_TR.sin()), dim=1).to(dtype)
    slots_T = torch.randperm(rows + 16, generator=generator, device=device)[:rows]

    def split(kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_TGD, v_TGD = heads_TXD.to(kind).split((HEADS, kv_heads, kv_heads), dim=1)
        return q_THD, k_TGD, v_TGD

    def caches(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        made = torch.zeros(2, (rows + 16 + 15) // 16, 16, kv_heads, HEAD_DIM, dtype=kind, device=device)
        return made[0], made[1]

    def add_rms_norm(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        # The sum is taken beforehand: its rounding is no error of the norm.
        return kernels.add_rms_norm((x_TD + residual_TD).to(kind), None, weight_D.to(kind), 1e-5)[:1]

    def silu_mul(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        return (kernels.silu_mul(gate_up_T2F.to(kind)),)

    def quick_gelu(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        return (kernels.quick_gelu(gate_up_T2F.to(kind)),)

    def store_kv(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        (_, k_TGD, v_TGD), filled = split(kind), caches(kind)
        kernels.store_kv(k_TGD, v_TGD, *filled, slots_T)
        return filled

    def rotary_store_kv(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        filled = caches(kind)
        out_THD = kernels.rotary_store_kv(*split(kind), cos_TD.to(kind), sin_TD.to(kind), *filled, slots_T)
        return (out_THD, *filled)

    layout, num_blocks = attention_layout(rows, device)
    k_cache_NPGD = noise(num_blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)
    v_cache_NPGD = noise(num_blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)
    q_THD = noise(sum(layout.query_lens), HEADS, HEAD_DIM)

    def paged_attention(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        filled = (k_cache_NPGD.to(kind), v_cache_NPGD.to(kind))
        # What the reference derives from the geometry for one dtype doesn't fit another.
        own = replace(layout, memo={})
        return (kernels.paged_attention(q_THD.to(kind), *filled, own, HEAD_DIM**-0.5),)

    weight_OI = noise(HIDDEN, HIDDEN) / HIDDEN**0.5
    codes_OI, absmax_O = int8.quantize(weight_OI)
    packed_Q, absmax_K = nf4.quantize(weight_OI)
    pairs = nf4.byte_pairs(weight_OI.device)

    def int8_linear(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        return (kernels.int8_linear(x_TD.to(kind), codes_OI, absmax_O, None),)

    def nf4_linear(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        return (kernels.nf4_linear(x_TD.to(kind), packed_Q, absmax_K, pairs, None, HIDDEN),)

    sampled = sampling_inputs(min(rows, 64), device)

    def sample(kernels: Kernels, kind: torch.dtype) -> tuple[Tensor, ...]:
        # Logits are float32 whatever the model computes in.
        logits_BV = sampled[0].double() if kind == torch.float64 else sampled[0]
        return (kernels.sample(logits_BV, *sampled[1:]),)

    operations = (
        add_rms_norm,
        silu_mul,
        store_kv,
        rotary_store_kv,
        paged_attention,
        int8_linear,
        nf4_linear,
        sample,
        quick_gelu,
    )
    calls = {call.__name__: call for call in operations}
    assert set(calls) == set(OPERATIONS), f"trials of {sorted(calls)}, twins of {OPERATIONS}"
    return [Trial(name, call) for name, call in calls.items()]


def sampling_inputs(rows: int, device: str) -> tuple[Tensor, ...]:
    """What ``sample`` takes: rows that are plain, greedy or filtered in turn."""
    generator = torch.Generator().manual_seed(rows)
    logits_BV = torch.randn(rows, VOCAB, generator=generator) * 3
    index_B = torch.arange(rows)

    def in_turn(*numbers: float) -> Tensor:
        return torch.tensor(numbers)[index_B % len(numbers)]

    filters = (in_turn(0, 50), in_turn(0.9, 0.5, 1.0), in_turn(0.0, 0.0, 0.0, 0.05))
    inputs = (logits_BV, in_turn(0.7, 1.0, 0.0, 0.3), *filters, index_B, index_B % 2, index_B * 100)
    return tuple(each.to(device) for each in inputs)


def sampling_times(rows: int, fused: Kernels, device: str) -> dict[str, float]:
    """Microseconds for rows that all have top-p: the twin, the reference, and its sort alone."""
    logits_BV, _, _, _, _, *noise = sampling_inputs(rows, device)
    wishes = [torch.full((rows,), number, device=device) for number in (0.7, 0, 0.9, 0.0)]
    calls: dict[str, Callable[[], Tensor]] = {
        "fused_us": lambda: fused.sample(logits_BV, *wishes, *noise),
        "reference_us": lambda: REFERENCES.sample(logits_BV, *wishes, *noise),
        "sort_us": lambda: logits_BV.sort(dim=-1).values,
    }
    return {
        name: round(1000 * statistics.median(times_ms(call, device, warmup=3, repeats=20)), 1)
        for name, call in calls.items()
    }


def attention_layout(rows: int, device: str) -> tuple[PagedLayout, int]:
    """About ``rows`` tokens: up to 64 decodes of contexts up to 700, two slices of the rest; and its block count."""
    num_decodes = min(rows, 64)
    slices = [(rows - num_decodes) // 2] * 2 if rows > num_decodes else []
    lengths = [(1, 1 + index * 37 % 700) for index in range(num_decodes - 1)] + [(1, 700)]
    lengths += [(length, length + 33) for length in slices]
    query_lens, context_lens = zip(*lengths, strict=True)
    width = -(-max(context_lens) // BLOCK_SIZE)
    num_blocks = len(lengths) * width
    dealt = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(rows)).int().view(-1, width)
    layout = PagedLayout(
        block_table_BN=dealt.to(device),
        cu_seqlens_B1=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        context_len_B=torch.tensor(context_lens, dtype=torch.int32).to(device),
        # Nothing is stored here: the cache is full beforehand.
        slots_T=torch.zeros(sum(query_lens), dtype=torch.int64, device=device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=num_decodes,
        block_size=BLOCK_SIZE,
    )
    return layout, num_blocks


def workload(kv_heads: int, dtype: torch.dtype, device: str) -> Workload:
    place = torch.device(device)
    return Workload(
        device=place,
        capability=capability_of(place),
        dtype=dtype,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        row_invariant=False,
        can_build=can_build_launchers(),
    )


def worst(made: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> float:
    """The largest error, as a share of the true number or, of one below 1, of 1."""
    shares = [
        (ours.double() - theirs).abs() / theirs.abs().clamp_min(1.0) for ours, theirs in zip(made, true, strict=True)
    ]
    return max(float(share.max()) for share in shares)


def measure(stage: Stage) -> None:
    rows_of_stage = ROWS if stage.on_gpu and not stage.quick else ROWS[:1]
    told: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for kv_heads in KV_HEADS:
            fused = choose_kernels("auto", workload(kv_heads, dtype, stage.device))
            for rows in rows_of_stage:
                for trial in trials(rows, kv_heads, dtype, stage.device):
                    told.append(_measure_trial(stage, trial, fused, dtype) | {"rows": rows, "kv_heads": kv_heads})
                stage.save(trials=told)
    stage.save(finished_trials=True)
    fused = choose_kernels("auto", workload(KV_HEADS[0], torch.bfloat16, stage.device))
    try:
        some = SAMPLED if stage.on_gpu else SAMPLED[:1]
        sampling = {str(rows): sampling_times(rows, fused, stage.device) for rows in some}
        stage.save(sampling=sampling)
        stage.say(f"sampling with top-p, by rows: {sampling}")
    except Exception as error:
        # What doesn't run was told by its trials.
        stage.say(f"sampling could not be timed: {first_line(error)}")
    choices = explain("auto", workload(KV_HEADS[0], DTYPES[0], stage.device))
    stage.save(choices={each.operation: f"{'fused' if each.fused else 'reference'}: {each.reason}" for each in choices})
    wrong = [f"{each['operation']} in {each['dtype']}, {each['rows']} rows" for each in told if not each["passed"]]
    if wrong:
        raise SystemExit(f"Fused kernels are farther from the truth than allowed: {'; '.join(wrong)}.")


def _measure_trial(stage: Stage, trial: Trial, fused: Kernels, dtype: torch.dtype) -> dict[str, Any]:
    true = trial.call(REFERENCES, torch.float64)
    row: dict[str, Any] = {"operation": trial.operation, "dtype": str(dtype).removeprefix("torch.")}
    row["reference_error"] = worst(trial.call(REFERENCES, dtype), true)
    try:
        row["fused_error"] = worst(trial.call(fused, dtype), true)
    except Exception as error:
        # It doesn't compile, or doesn't run: the others are still worth trying.
        stage.say(f"{trial.operation} in {row['dtype']} failed: {first_line(error)}")
        return {**row, "failed": first_line(error), "passed": False}
    # NF4's twin rounds levels where the reference rounds weights: errors of one size, not the same ones.
    allowed = row["reference_error"] * (1.5 if trial.operation == "nf4_linear" else 1.0)
    row["passed"] = row["fused_error"] <= max(allowed, torch.finfo(dtype).eps, 1e-5)
    stage.say(
        f"{trial.operation} in {row['dtype']}: error {row['fused_error']:.1e}, reference {row['reference_error']:.1e}"
    )
    return row


if __name__ == "__main__":
    run("kernels", measure)
