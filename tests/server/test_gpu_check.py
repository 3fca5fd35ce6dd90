"""`scripts/gpu_check`: every stage runs here in its smallest shape, and its files become the verdicts they should."""

import contextlib
import importlib.util
import itertools
import json
import sys
import warnings
import zipfile
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
    environment,
    main,
    oracle,
    pack,
    peers,
    pictures,
    step_profile,
    streams,
    verdicts,
)
from benchmarks.gpu.models import decoder_bytes_per_step, not_fused, random_model, random_transformers_decoder
from benchmarks.gpu.stage import Stage, first_line
from benchmarks.gpu.targets import ROWS, Row

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


def test_every_row_has_a_reader_and_a_name_of_its_own() -> None:
    assert [row.id for row in ROWS] == list(verdicts.READERS)
    assert len({row.what for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("better", "value", "verdict"),
    [
        ("more", 0.9, "pass"),
        ("more", 0.8, "pass"),
        ("more", 0.79, "short"),
        ("less", 0.79, "pass"),
        ("less", 0.8, "pass"),
        ("less", 0.81, "short"),
        ("less", None, "not measured"),
    ],
)
def test_a_verdict_knows_which_way_is_better(better: Any, value: float | None, verdict: str) -> None:
    assert Row("a", "b", 0.8, "share", better).verdict(value) == verdict


def test_a_row_without_a_target_is_told() -> None:
    row = Row("a", "b", None, "tokens/s", "more")
    assert (row.verdict(3.0), row.verdict(None)) == ("told", "not measured")


def gpu_results() -> dict[str, Any]:
    """Files of a run that reached everything, as the stages write them."""

    def engine(share: float, rate: float, streams: int, fast: bool = True) -> dict[str, Any]:
        return {
            "streams": streams,
            "fast": fast,
            "tokens_per_s": rate,
            "step_ms": streams / rate * 1000,
            "round_ms": [1.0, 1.1, 1.2],
            "graph_share": 1.0,
            "share_of_floor": share,
        }

    def decoding(rate: float) -> dict[str, Any]:
        table = [engine(0.3, 100, 1, fast=False), engine(0.9, rate, 1), engine(0.8, 20 * rate, 64)]
        return {"engine": table, "copy_bytes_per_s": 4e12, "copy_bytes_per_s_after": 4e12, "not_fused": {}}

    references = [engine(0.2, 80, 1, fast=False), engine(0.1, 800, 64, fast=False)]
    return {
        "tests": {"tests": 70, "failures": 0, "errors": 0, "skipped": 2},
        "kernels": {
            "trials": [
                {
                    "operation": "silu_mul",
                    "dtype": "bfloat16",
                    "fused_error": 1e-3,
                    "reference_error": 1e-3,
                    "passed": True,
                }
            ],
            "finished_trials": True,
        },
        "oracle": {
            "shapes": [
                {
                    "shape": "llava-1.5-7b",
                    "ours_bfloat16": {"relative_l2": 0.009},
                    "transformers_bfloat16": {"relative_l2": 0.01},
                    "ours_float32": {"relative_l2": 1e-6},
                    "over_reference": 0.9,
                }
            ]
        },
        "decode": {**decoding(280.0), "reference_engine": references},
        "decode-int8": decoding(500.0),
        "decode-nf4": decoding(650.0),
        "profile": {
            "batch": 64,
            "median": {"kernels": 300, "waits": 0, "event_waits": 1},
            "window": {"steps": 11, "idle_share": 0.03, "idle_share_in_long_gaps": 0.01},
        },
        "pictures": {
            "encoder": [{"pictures": 8, "share_of_ceiling": 0.6, "pictures_per_s": 1200.0}],
            "second_turn": {"first_ms": 20.0, "second_ms": 6.0, "device_ms": 5.0},
            "turns": [{"cached_tokens": 640, "prompt_tokens": 700}],
            "burst": {
                "p50_ms": 9.0,
                "p99_ms": 18.0,
                "p99_over_p50": 2.0,
                "pictures": 32,
                "streams": 32,
                "burst_ms": 400.0,
            },
        },
        "peer-eager": {
            "generate": [
                {"batch": 1, "tokens_per_s": 40.0},
                {"batch": 64, "tokens_per_s": 1000.0},
                {"batch": 32, "tokens_per_s": 1120.0},
                {"batch": 16, "failed": "OutOfMemoryError: no"},
            ]
        },
        "peer-compiled": {"tokens_per_s": 140.0},
        "peer-int8wo": {"tokens_per_s": 250.0},
        "peer-int4wo": {"tokens_per_s": 325.0},
        "bitsandbytes": {
            "rows": [
                {"quantization": kind, "batch": 1, "in_graph": True}
                | {"ours_ms": 1.0, "theirs_ms": 1.3, "theirs_over_ours": 1.3}
                for kind in ("int8", "nf4")
            ]
        },
        "deterministic": {"prices": {"8": 3.0, "64": 9.0}, "context": 64},
        "load": {
            "kernels": "auto",
            "runs": [
                {
                    "concurrency": many,
                    "throughput": {"output_tokens_per_s": 100.0 * many},
                    "ttft_ms": {"p50": 30.0},
                }
                for many in (1, 8, 32, 64)
            ],
        },
        "serve": {"run": {"throughput": {"output_tokens_per_s": 32.0}}},
    }


def test_files_of_a_run_that_reached_everything_pass_everywhere() -> None:
    figures = verdicts.read_figures(verdicts.Folder(gpu_results()))
    assert list(figures) == [row.id for row in ROWS]
    said = {row.id: row.verdict(figures[row.id].value) for row in ROWS}
    assert {name for name, verdict in said.items() if verdict not in ("pass", "told")} == set()
    values = {name: figure.value for name, figure in figures.items()}
    assert values["over_compiled"] == 2.0
    assert values["over_batch"] == 5.0
    assert values["over_eager"] == 7.0
    assert values["torchao_int4"] == 2.0
    assert values["over_serve"] == 25.0
    assert values["bf16_1"] == 0.9
    assert values["reference_64"] == 0.1


def test_what_is_missing_cut_short_or_not_installed_is_not_measured_and_says_why() -> None:
    results = gpu_results()
    del results["pictures"]
    results["peer-compiled"] = {"skipped": "OutOfMemoryError: no"}
    results["decode-int8"] = {"failed": "ended after its limit of 60 s", "copy_bytes_per_s": 4e12}
    results["decode"]["engine"][1] |= {"failed": "RuntimeError: a fault"}
    results["bitsandbytes"] = {"skipped": "not installed: bitsandbytes"}
    results["load"]["runs"] = results["load"]["runs"][:1]
    results["kernels"].pop("finished_trials")
    figures = verdicts.read_figures(verdicts.Folder(results))
    reasons = {name: figure.note for name, figure in figures.items() if figure.value is None}
    assert reasons["encoder"] == "stage pictures was not run"
    assert reasons["over_compiled"] == "stage decode: RuntimeError: a fault"
    assert reasons["bf16_1"] == "stage decode: RuntimeError: a fault"
    assert "ended after its limit" in reasons["int8_1"]
    # Of three precisions one is unknown: none is not the answer.
    assert "ended after its limit" in reasons["not_fused"]
    assert reasons["bnb_nf4"] == "stage bitsandbytes: not installed: bitsandbytes"
    assert "http_64" in reasons
    assert "http_1" not in reasons
    assert "kernels_off" in reasons
    assert "bf16_64" not in reasons


def test_the_higher_of_two_ceilings_counts() -> None:
    results = gpu_results()
    results["decode"]["copy_bytes_per_s_after"] = 4.5e12
    assert verdicts.read_figures(verdicts.Folder(results))["bf16_1"].value == pytest.approx(0.9 * 4 / 4.5)
    results["decode"]["copy_bytes_per_s_after"] = 3e12
    assert verdicts.read_figures(verdicts.Folder(results))["bf16_1"].value == 0.9


def test_a_cpu_and_a_small_shape_say_nothing_of_a_target() -> None:
    results = gpu_results()
    results["decode"]["device"] = "cpu"
    results["decode-int8"]["quick"] = True
    figures = verdicts.read_figures(verdicts.Folder(results))
    assert figures["bf16_1"].value is None
    assert figures["int8_1"].value is None
    assert figures["nf4_1"].value == 0.9
    assert verdicts.read_figures(verdicts.Folder(results, proofs=True))["int8_1"].value == 0.9


def test_two_commands_into_one_folder_make_one_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results = gpu_results()

    def stage(plan: main.Plan, out: Path, _flags: list[str], _limit_s: float) -> dict[str, Any]:
        told = {**results.get(plan.name, {}), "finished": True}
        (out / f"{plan.name}.json").write_text(json.dumps(told))
        return told

    monkeypatch.setattr(main, "run_stage", stage)
    assert main.main(["--out", str(tmp_path), "--stages", "decode", "--commit", "first"]) == 0
    said = json.loads((tmp_path / "verdicts.json").read_text())
    assert said["rows"]["bf16_1"]["value"] == 0.9
    assert said["rows"]["over_compiled"] == {"value": None, "note": "stage peer-compiled was not run"}
    assert main.main(["--out", str(tmp_path), "--stages", "peer-compiled", "--commit", "second"]) == 0
    said = json.loads((tmp_path / "verdicts.json").read_text())
    assert said["rows"]["over_compiled"]["value"] == 2.0
    assert said["machine"]["other_commits"] == {"decode": "first"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["stages"]) == {"decode", "peer-compiled"}
    assert "pass         over_compiled" in capfd.readouterr().out
    # What a later command has no time for takes nothing away.
    assert main.main(["--out", str(tmp_path), "--stages", "decode", "--limit", "0"]) == 1
    assert json.loads((tmp_path / "verdicts.json").read_text())["rows"]["bf16_1"]["value"] == 0.9


def test_the_plan_is_printed_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--plan", "--out", str(tmp_path / "none"), "--stages", "tests,kernels,oracle"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["tests", "kernels", "oracle"]
    assert not (tmp_path / "none").exists()


def test_every_stage_has_a_module_and_a_variant_that_it_knows() -> None:
    assert len({plan.name for plan in main.STAGES}) == len(main.STAGES)
    for plan in main.STAGES:
        assert importlib.util.find_spec(f"benchmarks.gpu.{plan.module}"), plan.module
    assert main.default_folder("cpu").name.startswith("gpu-cpu-")


def test_a_variant_reaches_its_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = main.run_stage(main.Plan("peer", "peers", 60, "", "none-such"), tmp_path, ["--device", "cpu"], 60)
    assert "There is no variant none-such" in told["output_tail"]


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_decode_steps_and_the_engine_are_measured_beside_their_floor(tmp_path: Path, quantize: str) -> None:
    told = run_on_cpu(decode, tmp_path, "" if quantize == "none" else quantize)
    assert told["quantization"] == quantize
    assert [row["batch"] for row in told["batches"]] == list(decode.QUICK_BATCHES)
    (row,) = told["engine"]
    assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"], rel=0.05, abs=1e-3)
    assert row["tokens_per_s"] == pytest.approx(2000 / row["step_ms"], rel=1e-3)
    # A CPU runs no fused kernel, and that is said operation by operation.
    assert told["fused"] == []
    assert "paged_attention" in told["not_fused"]
    assert ("reference_engine" in told) == (quantize == "none")
    assert told["copy_bytes_per_s_after"] > 0


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


def test_a_field_that_the_engine_does_not_know_is_dropped() -> None:
    bounds = {"num_blocks": 1, "block_size": 16, "max_model_len": 8, "max_step_tokens": 8, "max_running": 1}
    config = streams.engine_config(**bounds, max_queue=1, encoder_cache_bytes=0, no_such_field=True)
    assert config.num_blocks == 1
    assert not hasattr(config, "no_such_field")


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


def test_pictures_are_encoded_asked_about_again_and_sent_in_a_burst(tmp_path: Path) -> None:
    told = run_on_cpu(pictures, tmp_path)
    assert [row["pictures"] for row in told["encoder"]] == [1, 2]
    assert len(told["turns"]) == pictures.TURNS
    # Whole blocks of the picture and the first turn are found again.
    assert all(turn["cached_tokens"] > 64 for turn in told["turns"])
    assert told["burst"]["pictures_unanswered"] == 0
    assert told["burst"]["p99_over_p50"] >= 1


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
    assert "skipped" not in told


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


def test_versions_are_told_of_what_is_there() -> None:
    assert set(environment.installed(("pytest", "no-such-package"))) == {"pytest"}


def test_an_error_is_told_in_a_line() -> None:
    assert first_line(RuntimeError("CUDA error\nand pages of advice")) == "RuntimeError: CUDA error"
    assert first_line(ValueError()) == "ValueError: no words"


def test_of_bitsandbytes_only_the_machines_libraries_are_packed(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1.whl"
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda118", "cuda130", "rocm70")]
    with zipfile.ZipFile(wheel, "w") as whole:
        for name in (*names, "bitsandbytes/__init__.py"):
            whole.writestr(name, name)
    pack.slim(wheel)
    with zipfile.ZipFile(wheel) as part:
        assert part.namelist() == [names[0], names[2], "bitsandbytes/__init__.py"]
        assert part.read(names[2]).decode() == names[2]
    assert list(tmp_path.iterdir()) == [wheel]
