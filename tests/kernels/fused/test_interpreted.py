"""Runs the twins' tests under Triton's interpreter, which must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "fewest"), [("test_twins.py", 50), ("test_quantized_twins.py", 50), ("test_sample_twin.py", 25)]
)
def test_twins_equal_their_references(repository: Path, file: str, fewest: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/kernels/fused/{file}", "-q", "-p", "no:cacheprovider"],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    assert int(passed[1]) > fewest, f"hardly anything ran: {done.stdout[-500:]}"
