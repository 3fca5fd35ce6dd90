"""The stages of `scripts/gpu_check`, each run on a CPU in its smallest shape: the code a GPU will be given."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import (
    bnb,
    decode,
    deterministic,
    kernels,
    oracle,
    peers,
    pictures,
    step_profile,
    streams,
    verdicts,
)
from benchmarks.gpu.models import decoder_bytes_per_step, not_fused, random_model, random_transformers_decoder
from benchmarks.gpu.stage import Stage

from sightline_kernels.dispatch import REFERENCES
from sightline_models.parameter_count import count_parameters
from sightline_server.engine.types import FinishEvent, FinishReason, TokenEvent, Usage


@contextlib.contextmanager
def others_may_warn() -> Iterator[None]:
    """Peers warn about their own affairs, which fails none of our tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_on_cpu(module: ModuleType, out: Path, variant: str = "") -> dict[str, Any]:
    stage = Stage("proof", "cpu", quick=True, out=out / "proof.json", variant=variant)
    with others_may_warn():
        module.measure(stage)
    written: dict[str, Any] = json.loads((out / "proof.json").read_text())
    return written


@pytest.mark.parametrize("variant", ["", "int8", "nf4"])
def test_decode_steps_and_the_engine_are_measured_beside_their_floor(tmp_path: Path, variant: str) -> None:
    told = run_on_cpu(decode, tmp_path, variant)
    assert (told["quantization"], told["kernels"]) == (variant or "none", "auto")
    assert [row["batch"] for row in told["batches"]] == list(decode.QUICK_BATCHES)
    assert [row["fast"] for row in told["engine"]] == [False, True]
    for row in told["engine"]:
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"], rel=0.05, abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(2000 / row["step_ms"], rel=1e-3)
    # A CPU runs no fused kernel, and that is said operation by operation.
    assert told["fused"] == []
    assert "paged_attention" in told["not_fused"]
    assert told["copy_bytes_per_s_after"] > 0


def test_the_reference_kernels_are_measured_in_the_engine(tmp_path: Path) -> None:
    told = run_on_cpu(decode, tmp_path, "reference")
    assert (told["quantization"], told["kernels"], told["fused"]) == ("none", "reference", [])
    assert [row["fast"] for row in told["engine"]] == [False]
    with pytest.raises(ValueError, match="There is no variant fp2"):
        run_on_cpu(decode, tmp_path, "fp2")


def test_an_engine_that_fails_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilationError(Exception):
        """Triton's errors are no RuntimeErrors."""

    def fail(*_: object, **__: object) -> None:
        raise CompilationError("at 3:4: a fault")

    monkeypatch.setattr(decode, "rate_of", fail)
    told = run_on_cpu(decode, tmp_path)
    assert [row["failed"] for row in told["engine"]] == ["CompilationError: at 3:4: a fault"] * 2
    assert "median_ms" in told["batches"][0]


def test_a_kernel_that_does_not_compile_is_a_case_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_gate_up_T2F: torch.Tensor) -> torch.Tensor:
        raise TypeError("cannot compile")

    broken = dataclasses.replace(REFERENCES, silu_mul=fail)
    monkeypatch.setattr(kernels, "choose_kernels", lambda _mode, _workload: broken)
    monkeypatch.setattr(kernels, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(kernels, "KV_HEADS", (8,))
    with pytest.raises(SystemExit, match="silu_mul in bfloat16"):
        run_on_cpu(kernels, tmp_path)
    told = json.loads((tmp_path / "proof.json").read_text())
    wrong = [trial for trial in told["trials"] if not trial["passed"]]
    assert {trial["operation"] for trial in wrong} == {"silu_mul"}
    assert wrong[0]["failed"] == "TypeError: cannot compile"
    assert told["finished_trials"]


def test_a_decode_step_reads_less_of_quantized_weights() -> None:
    model = random_model("tiny", dtype=torch.bfloat16, device="cpu")
    linears = count_parameters(model.config).decoder_linears
    whole = decoder_bytes_per_step(model, torch.bfloat16)
    assert whole - decoder_bytes_per_step(model, torch.bfloat16, "int8") == linears
    assert whole - decoder_bytes_per_step(model, torch.bfloat16, "nf4") == linears * (16 - 4.5) / 8
    assert "a CPU" in not_fused(model, torch.bfloat16, "cpu", "none")["silu_mul"]


def test_streams_are_in_lockstep_and_a_failed_request_ends_the_measurement() -> None:
    model = random_model("tiny", dtype=torch.float32, device="cpu")
    engine = streams.make_engine(model, device="cpu", dtype=torch.float32, streams=3, max_len=64)
    names = streams.start_streams(engine, model, streams=3, prompt_len=8, answer_len=40)
    rate = streams.measure_rate(engine, streams=3, warmup=1, rounds=2, tokens=4)
    assert engine.stats().running == 3
    assert rate.tokens_per_s == pytest.approx(3000 / rate.step_ms, rel=1e-3)
    assert len(rate.round_ms) == 2
    token = TokenEvent(names[0], 5)
    assert streams.tokens_of([token, FinishEvent(names[1], FinishReason.LENGTH, Usage())]) == [token]
    with pytest.raises(RuntimeError, match="out of memory"):
        streams.tokens_of([FinishEvent(names[1], FinishReason.ERROR, Usage(), "engine_oom", "out of memory")])


def test_the_profile_has_the_steps_and_no_device(tmp_path: Path) -> None:
    told = run_on_cpu(step_profile, tmp_path)
    assert len(told["steps"]) == step_profile.PROFILED_STEPS
    assert told["median"]["kernels"] == 0
    assert told["window"] == {}
    with pytest.raises(verdicts.NotMeasured, match="no device"):
        verdicts.READERS["idle_64"](verdicts.Folder({"profile": told}, proofs=True))


def test_idle_time_is_what_no_work_covers_between_the_second_step_and_the_last() -> None:
    ranges = [(0.0, 100.0), (100.0, 200.0), (200.0, 300.0)]
    work = [
        # Before the window, half of it inside; two that overlap; one with a long gap before it; one past the end.
        {"ts": 90.0, "dur": 20.0},
        {"ts": 112.0, "dur": 40.0},
        {"ts": 120.0, "dur": 72.0},
        {"ts": 222.0, "dur": 60.0},
        {"ts": 284.0, "dur": 60.0},
    ]
    told = step_profile.read_window(ranges, work)
    assert told["steps"] == 2
    assert told["step_us"] == 100
    # 110-112, 192-222 and 282-284 of 200.
    assert told["idle_share"] == pytest.approx(34 / 200)
    assert told["idle_share_in_long_gaps"] == pytest.approx(30 / 200)
    assert step_profile.read_window(ranges[:1], work) == {}


def test_the_device_is_busy_where_its_work_covers_time() -> None:
    work = [{"cat": cat, "ts": ts, "dur": 1000.0} for cat, ts in (("kernel", 0), ("gpu_memcpy", 500), ("cpu_op", 9e3))]
    assert step_profile.busy_ms(work) == 1.5


def test_pictures_are_encoded_asked_about_again_and_sent_in_a_burst(tmp_path: Path) -> None:
    told = run_on_cpu(pictures, tmp_path)
    assert [row["pictures"] for row in told["encoder"]] == [1, 2]
    assert len(told["turns"]) == pictures.TURNS
    # Whole blocks of the picture and the first turn are found again.
    assert all(turn["cached_tokens"] > 64 for turn in told["turns"])
    assert told["second_turn_busy_ms"] == 0
    for name in ("burst_cold", "burst", "burst_whole_steps"):
        assert told[name]["pictures_unanswered"] == 0
        assert told[name]["p99_over_p50"] >= 1


def test_encoder_operations_are_those_of_the_shape() -> None:
    config = random_model("tiny", dtype=torch.float32, device="cpu").config
    tower, projector = config.vision, config.projector
    # Two of three layers run, over 17 tokens of width 32 with a feed-forward of 64; 16 patches of 192 numbers.
    assert (tower.hidden_size, tower.intermediate_size, max(config.feature_depths)) == (32, 64, 2)
    linears = 2 * (2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 17 * 17 * 32)
    projected = 2 * 16 * (projector.in_size * 64 + 64 * 64)
    assert pictures.encoder_flops(config) == linears + 2 * 16 * 192 * 32 + projected


def test_gaps_are_taken_within_streams() -> None:
    quiet = [0.01 * number for number in range(101)]
    late = [0.5 + 0.01 * number for number in range(100)] + [1.59]
    told = pictures.summarize_gaps([quiet, late], burst_at=1.45, answered_at=1.6)
    assert told["p50_ms"] == pytest.approx(10)
    assert told["max_ms"] == pytest.approx(100)
    assert told["burst_ms"] == pytest.approx(150)
    every = [10.0] * 199 + [100.0]
    assert told["p99_ms"] == pytest.approx(float(np.percentile(every, 99)))


def test_transformers_generates_as_many_tokens_as_it_is_timed_for(tmp_path: Path) -> None:
    told = run_on_cpu(peers, tmp_path, "eager")
    assert [row["batch"] for row in told["generate"]] == [1, 2]
    assert all(row["step_ms"] > 0 for row in told["generate"])


def test_transformers_static_cache_is_timed(tmp_path: Path) -> None:
    told = run_on_cpu(peers, tmp_path, "compiled")
    assert told["tokens_per_s"] > 0
    assert not {"skipped", "whole_graph_failed"} & set(told)


def test_a_model_that_does_not_compile_whole_is_compiled_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def fail_on_whole_graphs(call: Any, *, fullgraph: bool, **how: Any) -> Any:
        if fullgraph:
            raise RuntimeError("a graph break")
        return compile_(call, fullgraph=False, **how)

    monkeypatch.setattr(torch, "compile", fail_on_whole_graphs)
    told = run_on_cpu(peers, tmp_path, "compiled")
    assert told["whole_graph_failed"] == "RuntimeError: a graph break"
    assert told["tokens_per_s"] > 0


def test_what_is_timed_of_the_static_cache_says_what_generate_says() -> None:
    with others_may_warn(), torch.no_grad():
        model = random_transformers_decoder("tiny", device="cpu").float()
        ids_1T = torch.randint(3, 512, (1, 24), generator=torch.Generator().manual_seed(1))
        steps = peers.decode_steps(model, "cpu", model.forward, ids_1T)
        made = [int(token_11) for token_11 in itertools.islice(steps, 10)]
        whole_1T = model.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=10, do_sample=False
        )
    assert made == whole_1T[0, 24:].tolist()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is there")
def test_a_peer_that_is_not_installed_is_no_failure(tmp_path: Path) -> None:
    assert run_on_cpu(peers, tmp_path, "int4wo")["skipped"].startswith("not installed: torchao")


@pytest.mark.parametrize(("quantize", "allowed"), [("nf4", 0.01), ("int8", 0.02)])
def test_layers_of_bitsandbytes_stand_for_ours_with_the_same_weights(quantize: Any, allowed: float) -> None:
    ours = random_model("tiny", dtype=torch.bfloat16, device="cpu", quantize=quantize)
    theirs = random_model("tiny", dtype=torch.bfloat16, device="cpu")
    x_TW = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with others_may_warn(), torch.inference_mode():
        bnb.replace_linears(theirs, bnb.LAYERS[quantize])
        for name in ("qkv", "o"):
            layer, peer = (getattr(model.decoder.layers[1].attention, name) for model in (ours, theirs))
            assert type(peer).__module__.startswith("bitsandbytes")
            right, made = layer(x_TW).float(), peer(x_TW).float()
            assert (made - right).norm() / right.norm() < allowed


def test_bitsandbytes_and_ours_are_timed_in_turn(tmp_path: Path) -> None:
    told = run_on_cpu(bnb, tmp_path)
    assert [row["quantization"] for row in told["rows"]] == ["nf4", "int8"]
    assert all(row["least"] <= row["theirs_over_ours"] <= row["most"] for row in told["rows"])


def test_the_price_of_determinism_is_a_ratio_of_rates(tmp_path: Path) -> None:
    told = run_on_cpu(deterministic, tmp_path)
    (plain,), (priced,) = told["plain"], told["deterministic"]
    assert told["prices"]["2"] == pytest.approx(plain["tokens_per_s"] / priced["tokens_per_s"], rel=1e-3)


def test_the_oracle_gives_the_rows_that_are_judged(tmp_path: Path) -> None:
    told = run_on_cpu(oracle, tmp_path)
    folder = verdicts.Folder({"oracle": told}, proofs=True)
    error = verdicts.READERS["float32_error"](folder)
    assert error.value is not None
    assert error.value < 1e-5
    assert verdicts.READERS["bf16_error"](folder).note.startswith("tiny: ")
