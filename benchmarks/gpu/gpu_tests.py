"""Stage tests: the tests that need a GPU."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Stage, run
from benchmarks.machine import ROOT, child_environment

NO_TESTS_COLLECTED = 5


def marked_files() -> list[str]:
    """The test files that say ``mark.gpu``; others import what a bare machine may lack, and would fail on that."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def read_report(report: Path) -> dict[str, Any]:
    """Counts, and each failure with the end of what it said."""
    suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))
    failures = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                name = f"{case.get('classname')}::{case.get('name')}"
                failures.append({"test": name, "kind": kind, "says": (problem.text or "")[-3000:]})
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "problems": failures}


def measure(stage: Stage) -> None:
    with tempfile.TemporaryDirectory(prefix="sightline-gpu-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *marked_files(),
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        ]
        done = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stage.say(done.stdout[-4000:])
        told = read_report(report) if report.exists() else {}
        stage.save(exit_code=done.returncode, **told, output_tail=done.stdout[-4000:])
    if done.returncode not in (0, NO_TESTS_COLLECTED):
        raise SystemExit(f"GPU tests failed: pytest ended with code {done.returncode}.")


if __name__ == "__main__":
    run("gpu_tests", measure)
