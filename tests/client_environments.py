"""The environments that hold one major version of the `openai` package each; scripts/install clients makes them."""

import os
from pathlib import Path

import pytest

CLIENTS = ("openai-2", "openai-3")


def client_python(name: str) -> Path:
    """The interpreter of one of CLIENTS. Without it a test is skipped, or fails under scripts/test."""
    python = Path(__file__).resolve().parents[1] / ".venvs" / name / "bin" / "python"
    if not python.exists():
        missing = f"{python} is missing: run scripts/install clients"
        if os.environ.get("REQUIRE_CLIENTS") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return python
