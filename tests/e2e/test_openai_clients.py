"""The real `openai` package, both majors, against the true server with the demo model.

The majors can't share an environment, so each script of `clients/` runs as a program in its own.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_environments import CLIENTS, client_python

SCRIPTS = ("whole", "streamed", "at_once", "failures", "models")


def run_script(client: str, script: str, url: str, key: str = "none") -> None:
    path = Path(__file__).parent / "clients" / f"{script}.py"
    environment = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}
    done = subprocess.run([client_python(client), path], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{script} with {client}:\n{done.stdout}\n{done.stderr}"
    assert "ok" in done.stdout


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(demo_server: Any, client: str, script: str) -> None:
    run_script(client, script, demo_server.url)


def test_keys(start_server: Callable[..., Any]) -> None:
    server = start_server("--api-key", "first-key,second-key")
    server.wait_for("/ready", 200)
    for client, key in zip(CLIENTS, ("first-key", "second-key"), strict=True):
        run_script(client, "keys", server.url, key)
