"""`scripts/train_demo` and `scripts/eval_demo` as a person runs them: three minutes are enough to see colours."""

import json
import subprocess
from pathlib import Path

import pytest

MINUTES = 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_minutes_teach_colors(repository: Path, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report.json"
    train = ["scripts/train_demo", "--minutes", str(MINUTES), "--folder", str(run), "--device", "cpu"]
    subprocess.run(train, cwd=repository, check=True, timeout=1200)
    judge = [
        "scripts/eval_demo",
        str(run / "checkpoint"),
        "--exams",
        "plain",
        "--tasks",
        "color",
        "--json",
        str(report),
    ]
    subprocess.run(judge, cwd=repository, check=True, timeout=300)
    color = json.loads(report.read_text())["exams"]["plain"]["scores"]["color"]
    assert color["n"] == 100
    assert color["score"] >= color["grey"] + 0.2, color
    assert (run / "curves.png").stat().st_size > 10_000
