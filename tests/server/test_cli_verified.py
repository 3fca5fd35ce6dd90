"""The doctor's check of quantized weights, made by an engine in a process of its own."""

import dataclasses
import io
import json
import subprocess
import sys

from planned_machines import NO_GPU, examined, machine
from rich.console import Console

from sightline_server.cli import doctor, verified
from sightline_server.engine.types import Pace, Verification
from sightline_server.settings import Settings


def test_the_check_of_quantized_weights():
    """The real thing: an engine in a process of its own loads the demo model twice, and the report has the figures."""
    code = (
        "import argparse, sys\n"
        "from sightline_server.cli import doctor\n"
        "parser = argparse.ArgumentParser()\n"
        "doctor.add_parser(parser.add_subparsers())\n"
        "words = ['doctor', '--json', '--device', 'cpu', '--quantize', 'nf4', '--verify']\n"
        "status = doctor.run(parser.parse_args(words))\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert (found["outcome"], found["quantization"]) == ("compared", "nf4")
    assert 0 < found["mean_kl"] < found["worst_kl"]
    assert found["served"]["weight_bytes"] < found["unquantized"]["weight_bytes"]
    assert "loading the unquantized weights" in done.stderr


def test_a_check_is_shown_with_the_report(monkeypatch):
    shown = io.StringIO()
    report = examined(monkeypatch, machine(), NO_GPU)
    pace = Pace(weight_bytes=1, prompt_tokens_per_s=2.0, decode_tokens_per_s=3.0)
    found = Verification(outcome="failed", message="Planted.", quantization="nf4", served=pace)
    dataclasses.replace(report, verification=found).show(Console(file=shown, width=120))
    told = " ".join(shown.getvalue().split())
    assert "Check checked Planted. 1 bytes, 2 prompt and 3 answer tokens/s alone in the engine What fits" in told
    assert report.as_json()["verification"] is None


def test_an_engine_that_cannot_be_asked_is_an_answer(tmp_path, monkeypatch):
    told = []
    missing = verified.ask_engine(tmp_path, Settings(device="cpu"), lambda stage, share: told.append(stage))
    assert missing.outcome == "failed"
    assert "config.json" in missing.message
    assert told[0] == "starting the engine"
    monkeypatch.setattr(verified, "_PROGRAM", "tests_have_no_such_module")
    crashed = verified.ask_engine(tmp_path, Settings(device="cpu"), lambda stage, share: None)
    assert crashed.outcome == "failed"
    assert "No module named tests_have_no_such_module" in crashed.message


def test_no_model_is_loaded_where_it_cannot_be_served(monkeypatch, tmp_path):
    def ask(*_arguments):
        raise AssertionError("asked")

    monkeypatch.setattr(doctor, "ask_engine", ask)
    report = examined(monkeypatch, machine(), NO_GPU, model=tmp_path / "none", environ={"SIGHTLINE_VERIFY": "1"})
    assert report.verification is None
