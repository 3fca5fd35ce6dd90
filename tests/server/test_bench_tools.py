"""The measuring tools outside the package: what `scripts/gpu_check` counts, and how it fails."""

import contextlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sightline_models.config import read_config
from sightline_models.presets import demo_checkpoint

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import machine
from benchmarks.gpu import gpu_tests, main, pack, step_profile
from benchmarks.gpu.oracle import errors
from benchmarks.gpu.paged import PagedSequences
from benchmarks.gpu.stage import Stage


def call(name: str, ts: float, dur: float, correlation: int, cat: str = "cuda_runtime") -> dict[str, Any]:
    return {"name": name, "cat": cat, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def test_a_trace_gives_each_step_the_work_it_launched() -> None:
    events = [
        {"name": step_profile.STEP, "cat": "user_annotation", "ts": 100, "dur": 50},
        {"name": step_profile.STEP, "cat": "user_annotation", "ts": 300, "dur": 40},
        # The same range as the device saw it is no second step.
        {"name": step_profile.STEP, "cat": "gpu_user_annotation", "ts": 120, "dur": 90},
        {"name": "aten::mm", "cat": "cpu_op", "ts": 101, "dur": 5},
        call("cudaLaunchKernel", 102, 2, 1),
        call("cuLaunchKernelEx", 105, 2, 2, cat="cuda_driver"),
        call("cudaMemcpyAsync", 110, 2, 3),
        call("cudaStreamSynchronize", 112, 30, 4),
        call("matmul", 110, 20, 1, cat="kernel"),
        # Launched in the first step, run long after its host code: still the first step's.
        call("attention", 160, 20, 2, cat="kernel"),
        call("Memcpy DtoH (Device -> Pageable)", 190, 10, 3, cat="gpu_memcpy"),
        call("cudaLaunchKernel", 301, 2, 5),
        call("matmul", 305, 10, 5, cat="kernel"),
        # Launched between the steps: nobody's.
        call("cudaLaunchKernel", 200, 2, 6),
        call("noise", 205, 10, 6, cat="kernel"),
    ]
    told = step_profile.read_trace(events)
    first, second = told["steps"]
    assert (first["kernels"], first["waits"], first["wait_us"], first["operators"]) == (2, 1, 30, 1)
    assert (first["copies_to_host"], first["copies_to_device"]) == (1, 0)
    assert (first["device_busy_us"], first["device_span_us"]) == (50, 90)
    assert first["idle_share"] == pytest.approx(1 - 50 / 90)
    assert (second["kernels"], second["waits"], second["idle_share"]) == (1, 0, 0)
    assert second["idle_share_of_step"] == pytest.approx(1 - 10 / 40)
    assert told["median"]["kernels"] == 1.5


def test_overlapping_spans_count_once() -> None:
    assert step_profile.covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert step_profile.covered([]) == 0


def test_layouts_put_every_token_in_a_slot_of_its_own_and_of_its_block() -> None:
    config = read_config(demo_checkpoint()).decoder
    sequences = PagedSequences(config, num_sequences=3, max_len=40, dtype=torch.float32, device="cpu")
    layout, positions_T = sequences.layout((1, 1, 25), (33, 7, 30))
    assert layout.num_decodes == 2
    assert positions_T.tolist() == [32, 6, *range(5, 30)]
    assert layout.cu_seqlens_B1.tolist() == [0, 1, 2, 27]
    assert len(set(layout.slots_T.tolist())) == 27
    rows = [0, 1] + [2] * 25
    for row, position, slot in zip(rows, positions_T.tolist(), layout.slots_T.tolist(), strict=True):
        assert slot == layout.block_table_BN[row, position // 16] * 16 + position % 16


def test_errors_are_zero_for_equals_and_named_for_a_difference() -> None:
    rows = [torch.randn(3, 7), torch.randn(2, 7)]
    assert errors(rows, rows) == {"relative_l2": 0, "max_abs": 0, "same_greedy": 1, "mean_kl": 0, "rows": 5}
    moved = [rows[0] + 1, rows[1]]
    told = errors(moved, rows)
    assert told["max_abs"] == pytest.approx(1)
    assert (told["same_greedy"], told["mean_kl"]) == (1, pytest.approx(0, abs=1e-6))


def test_a_stage_that_hangs_is_ended_and_one_that_fails_leaves_its_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    late = main.run_stage(main.Plan("late", "environment", 60, ""), tmp_path, ["--device", "cpu"], 0.01)
    assert late["failed"].startswith("ended after its limit")
    broken = main.run_stage(main.Plan("broken", "no_such_stage", 60, ""), tmp_path, [], 60)
    assert broken["failed"] == "ended with code 1"
    assert "no_such_stage" in broken["output_tail"]
    assert json.loads((tmp_path / "broken.json").read_text()) == broken


def test_what_a_late_stage_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server of the load has a session of its own, and would keep the device's memory."""
    stage, started = tmp_path / "python", tmp_path / "pid"
    stage.write_text(f"#!/bin/sh\nsetsid sleep 300 &\necho $! > {started}\nwait\n")
    stage.chmod(0o755)
    monkeypatch.setattr(main.sys, "executable", str(stage))
    late = main.run_stage(main.Plan("late", "environment", 60, ""), tmp_path, [], 1.0)
    assert late["failed"] == "ended after its limit of 1 s"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(started.read_text())).wait(10)


def test_only_files_that_mark_a_test_are_collected_for_a_gpu() -> None:
    files = gpu_tests.marked_files()
    assert "tests/engine/test_devices.py" in files
    assert "tests/server/test_chat.py" not in files


def test_a_result_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("oracle", "cpu", quick=True, out=tmp_path / "oracle.json")
    stage.save(first=1)

    def cut_short(path: Path, text: str) -> None:
        path.write_bytes(text[:5].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        stage.save(second=2)
    assert json.loads((tmp_path / "oracle.json").read_text())["first"] == 1


def test_the_check_goes_on_after_a_failure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stage(plan: main.Plan, _out: Path, _flags: list[str], limit_s: float) -> dict[str, Any]:
        seen.append((plan.name, limit_s))
        return {"failed": "ended with code 1"} if plan.name == "oracle" else {"finished": True}

    monkeypatch.setattr(main, "run_stage", stage)
    assert main.main(["--device", "cpu", "--out", str(tmp_path / "new"), "--limit", "100"]) == 1
    assert [name for name, _ in seen] == [plan.name for plan in main.STAGES]
    assert all(limit <= 100 for _, limit in seen)
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert {name for name, told in summary["stages"].items() if told["verdict"] != "ok"} == {"oracle"}
    seen.clear()
    assert main.main(["--device", "cpu", "--out", str(tmp_path), "--stages", "load, decode"]) == 0
    assert [name for name, _ in seen] == ["decode", "load"]
    assert main.main(["--device", "cpu", "--out", str(tmp_path), "--stages", "decode", "--limit", "0"]) == 1
    assert "used up" in json.loads((tmp_path / "decode.json").read_text())["failed"]
    with pytest.raises(SystemExit):
        main.main(["--stages", "decode,nope"])
    assert "There is no stage nope" in capfd.readouterr().err


def test_the_pack_covers_what_its_packages_need_at_this_environments_versions() -> None:
    assert pack.uncovered() == {}
    command = pack.download_command(Path("there"))
    assert f"fastapi=={importlib.metadata.version('fastapi')}" in command
    assert "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12"


def test_a_checkout_that_is_not_installed_still_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = importlib.metadata.distributions(path=[machine._metadata_folder()])
    assert (told.name, told.version) == ("sightline", importlib.metadata.version("sightline"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", str(machine.ROOT)]))
    paths = machine.child_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[-1] == "/elsewhere"
    assert len(set(paths)) == len(paths) == 5
