"""The real `openai` package, both majors, against the true server with the demo model.

The majors can't share an environment, so each script of `clients/` runs as a program in its own.
"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = ("whole", "streamed", "at_once", "failures", "models")
CLIENTS = ("openai-2", "openai-3")


def client_python(repository: Path, name: str) -> Path:
    python = repository / ".venvs" / name / "bin" / "python"
    if not python.exists():
        missing = f"{python} is missing: run scripts/install clients"
        if os.environ.get("REQUIRE_CLIENTS") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return python


def run_script(python: Path, script: Path, url: str, key: str = "none") -> None:
    environment = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}
    done = subprocess.run([python, script], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{script.name}:\n{done.stdout}\n{done.stderr}"
    assert "ok" in done.stdout


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(repository: Path, demo_server: "object", client: str, script: str) -> None:
    python = client_python(repository, client)
    run_script(python, Path(__file__).parent / "clients" / f"{script}.py", demo_server.url)
