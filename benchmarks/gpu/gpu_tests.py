"""Stage tests: the tests that need a GPU."""

import importlib.util
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Stage, run
from benchmarks.machine import ROOT, child_environment

NO_TESTS_COLLECTED = 5
WORKERS = 6
"""Processes for the kernels' tests, where pytest-xdist is there."""


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
    return {"counts": counts, "problems": failures}


def outcome(line: str) -> str | None:
    """What a line of pytest's verbose output says of a test; None for any other line."""
    word = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    # As one process says it, and as several do.
    found = re.match(rf"\S+::.+ {word}\b", line) or re.match(rf"\[gw\d+\] \[ *\d+%\] {word} \S+::", line)
    return found[1].lower() if found else None


def groups() -> list[tuple[list[str], int]]:
    """Which files run together, in how many processes: a kernel's tests are mostly the compiler's time."""
    files = marked_files()
    kernels = [name for name in files if name.startswith("tests/kernels/")]
    others = [name for name in files if name not in kernels]
    workers = WORKERS if importlib.util.find_spec("xdist") is not None else 1
    return [(names, count) for names, count in ((kernels, workers), (others, 1)) if names]


def run_group(stage: Stage, files: list[str], workers: int, so_far: Counter[str], folder: Path) -> dict[str, Any]:
    """Run the tests marked gpu in ``files``, counting them as they end. Returns what was wrong, and the exit code."""
    report = folder / f"{len(list(folder.iterdir()))}.xml"
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}"]
    if workers > 1:
        command += ["-n", str(workers)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None, "pytest's output is not piped"
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        # The report comes at the very end, which a stage that is cut short never sees.
        if (word := outcome(line)) is not None:
            so_far[word] += 1
            if word in ("failed", "error"):
                stage.say(line.strip())
            if word != "skipped":
                stage.save(so_far=dict(so_far), last=line.strip())
    code, tail = process.wait(), "".join(said)[-3000:]
    stage.say(tail)
    told = read_report(report) if report.exists() else {}
    return {"files": files, "exit_code": code, **told, "output_tail": tail}


def measure(stage: Stage) -> None:
    told: list[dict[str, Any]] = []
    so_far: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="sightline-gpu-tests-") as folder:
        for files, workers in groups():
            told.append(run_group(stage, files, workers, so_far, Path(folder)))
            stage.save(groups=told, so_far=dict(so_far))
    if all("counts" in each for each in told):
        names = ("tests", "failures", "errors", "skipped")
        stage.save(counts={name: sum(each["counts"][name] for each in told) for name in names})
    codes = [each["exit_code"] for each in told]
    if any(code not in (0, NO_TESTS_COLLECTED) for code in codes):
        raise SystemExit(f"GPU tests failed: pytest ended with codes {codes}.")


if __name__ == "__main__":
    run("tests", measure)
