"""Starts servers as child processes, waits until they answer, loads them with ``sightline bench``, stops them.

Knows processes, ports and the bench command's JSON. Knows nothing of what is being compared.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import ROOT, child_environment

STOP_TIMEOUT_S = 20


class ServerError(Exception):
    """A server did not start or a load could not be driven; the sentence ends with what the process said."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    name: str
    url: str
    """Root of its API, with ``/v1``."""
    model: str | None
    """The name requests must carry; nothing means the first it lists."""
    ready_s: float
    """From starting the process to its first answer."""
    log: Path
    pid: int

    def cpu_seconds(self) -> float:
        """Processor time it has used so far, its child processes' included."""
        spent = 0.0
        parent = psutil.Process(self.pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    *,
    port: int,
    ready_path: str,
    model: str | None = None,
    timeout_s: float = 300,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``command`` until the block ends. Raises ServerError when ``ready_path`` isn't answered in time."""
    with tempfile.TemporaryDirectory(prefix="sightline-bench-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as sink:
            # A session of its own, so that stopping reaches the engine and decode workers too.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**child_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ready_s = _wait(process, f"http://127.0.0.1:{port}{ready_path}", log, name, timeout_s)
            yield Server(name, f"http://127.0.0.1:{port}/v1", model, ready_s, log, process.pid)
        finally:
            stop(process)


def sightline_command(port: int, *flags: str) -> list[str]:
    """Our server on ``port``; run it with ``ready_path="/ready"``."""
    return [sys.executable, "-m", "sightline_server.cli.main", "serve", "--port", str(port), *flags]


def bench(server: Server, **flags: Any) -> dict[str, Any]:
    """One load; ``flags`` are those of ``sightline bench`` with underscores. Returns its summary,
    with ``server_cpu_s``, the processor seconds the server spent on it.

    Raises ServerError when there is none, or when a request failed: a rate over fewer requests compares nothing.
    """
    command = [sys.executable, "-m", "sightline_server.cli.main", "bench", "--url", server.url]
    if server.model is not None:
        command += ["--model", server.model]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        command += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    cpu_before = server.cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    cpu_spent = server.cpu_seconds() - cpu_before
    lines = done.stdout.rstrip("\n").splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise ServerError(f"The load on {server.name} failed.\n{done.stdout}{done.stderr}\n{tail(server.log)}")
    summary: dict[str, Any] = json.loads(lines[-1])
    # The two short requests that measure the tokenizer are in it, and warm-ups where there are any.
    summary["server_cpu_s"] = round(cpu_spent, 3)
    return summary


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask politely, then kill the whole session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path, name: str, timeout_s: float) -> float:
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if process.poll() is not None:
            raise ServerError(f"{name} ended with code {process.returncode} before it answered.\n{tail(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic() - began
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise ServerError(f"{name} did not answer within {timeout_s:g} s.\n{tail(log)}")
