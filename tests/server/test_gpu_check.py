"""`scripts/gpu_check`: what its stages leave behind becomes the verdicts it should, whatever failed or is missing."""

import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import (
    environment,
    gpu_tests,
    main,
    pack,
    verdicts,
)
from benchmarks.gpu.stage import first_line
from benchmarks.gpu.targets import ROWS, Row


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

    references = {
        "engine": [engine(0.2, 80, 1, fast=False), engine(0.1, 800, 64, fast=False)],
        "copy_bytes_per_s": 4e12,
    }
    return {
        "tests": {"counts": {"tests": 70, "failures": 0, "errors": 0, "skipped": 2}},
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
        "decode": {
            **decoding(280.0),
            "batches": [{"batch": 64, "in_graph": {"median_ms": 10.8, "share_of_floor": 0.83}}],
        },
        "decode-reference": references,
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
            "second_turn_busy_ms": 3.5,
            "turns": [{"cached_tokens": 640, "prompt_tokens": 700}],
            "burst": {
                "p50_ms": 9.0,
                "p99_ms": 18.0,
                "p99_over_p50": 2.0,
                "burst_ms": 400.0,
            },
            "burst_whole_steps": {"mixed_step_tokens": 2048, "p99_over_p50": 6.0, "burst_ms": 300.0},
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
    assert "without a trace, at most 5.5%" in figures["idle_64"].note
    assert "the bare step from a graph 83.0%" in figures["bf16_64"].note
    assert figures["burst"].note.endswith("with --mixed-step-tokens 2048 6.00x and 300 ms")


def test_what_is_missing_cut_short_or_not_installed_is_not_measured_and_says_why() -> None:
    results = gpu_results()
    del results["pictures"]
    results["peer-compiled"] = {"skipped": "OutOfMemoryError: no"}
    results["decode-int8"] = {"failed": "ended after its limit of 60 s", "copy_bytes_per_s": 4e12}
    results["decode"]["engine"][1] |= {"failed": "RuntimeError: a fault"}
    results["bitsandbytes"] = {"skipped": "not installed: bitsandbytes"}
    results["load"]["runs"] = results["load"]["runs"][:1]
    results["kernels"] = {**results["kernels"], "failed": "ended with code 1"}
    del results["kernels"]["finished_trials"]
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
    assert reasons["kernels_off"] == "stage kernels: ended with code 1"
    assert "bf16_64" not in reasons


def test_a_kernel_that_failed_counts_though_the_stage_went_no_further() -> None:
    trial = {"operation": "silu_mul", "dtype": "float16", "failed": "CompilationError: no", "passed": False}
    figure = verdicts.READERS["kernels_off"](verdicts.Folder({"kernels": {"trials": [trial], "failed": "a fault"}}))
    assert figure == verdicts.Figure(1, "of 1 cases: silu_mul in float16")


def test_tests_that_were_cut_short_tell_what_they_had() -> None:
    assert [gpu_tests.outcome(f"tests/a.py::test_b[c d] {word} [ 5%]") for word in ("PASSED", "FAILED")] == [
        "passed",
        "failed",
    ]
    assert gpu_tests.outcome("[gw0] [  3%] ERROR tests/a.py::test_b[c d] ") == "error"
    assert gpu_tests.outcome("FAILED tests/a.py::test_b - why") is None
    assert {name for files, _ in gpu_tests.groups() for name in files} == set(gpu_tests.marked_files())
    read = verdicts.READERS["gpu_tests_failed"]
    late = {"failed": "ended after its limit of 150 s"}
    with pytest.raises(verdicts.NotMeasured, match="limit of 150 s; 7 tests had passed, none failed"):
        read(verdicts.Folder({"tests": {**late, "so_far": {"passed": 7}}}))
    assert read(verdicts.Folder({"tests": {**late, "so_far": {"passed": 7, "failed": 1}}})).value == 1
    nothing = {"counts": {"tests": 3, "failures": 0, "errors": 0, "skipped": 3}}
    with pytest.raises(verdicts.NotMeasured, match="of 3 tests none ran"):
        read(verdicts.Folder({"tests": nothing}))


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


def test_what_has_no_whole_result_yet_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, told in (("decode", {}), ("profile", {"failed": "ended with code 1"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"finished": True, **told}))
    (tmp_path / "load.json").write_text(json.dumps({"runs": []}))
    wanted = ["--missing", "--plan", "--out", str(tmp_path), "--stages", "decode,profile,pictures,load"]
    assert main.main(wanted) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]] == ["profile", "pictures", "load"]


def test_every_stage_has_a_module_and_a_variant_that_it_knows() -> None:
    assert len({plan.name for plan in main.STAGES}) == len(main.STAGES)
    for plan in main.STAGES:
        assert importlib.util.find_spec(f"benchmarks.gpu.{plan.module}"), plan.module


def test_only_a_whole_run_on_a_gpu_lies_among_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "nvidia_smi", lambda: {"name": "NVIDIA H200"})
    whole = main.default_folder("cuda", quick=False)
    assert whole.parent == main.ROOT / "benchmarks/results"
    assert re.fullmatch(r"gpu-nvidia-h200-\d{4}-\d\d-\d\d", whole.name)
    for proof in (main.default_folder("cpu", quick=False), main.default_folder("cuda", quick=True)):
        assert not proof.is_relative_to(main.ROOT)


def test_a_variant_reaches_its_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = main.run_stage(main.Plan("peer", "peers", 60, "", "none-such"), tmp_path, ["--device", "cpu"], 60)
    assert "There is no variant none-such" in told["output_tail"]


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
