"""True servers in processes of their own, on free ports, ended whatever the tests did to them."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, ImageDraw

START_S = 120.0


@dataclass
class RunningServer:
    """One `sightline serve`, its two output files and its process tree."""

    url: str
    """Such as http://127.0.0.1:43210, without /v1."""
    process: "subprocess.Popen[bytes]"
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text("utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text("utf-8")

    def children(self, module: str) -> list[psutil.Process]:
        """Its child processes that run ``module``, such as "engine.worker"."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(part.endswith(module) for part in child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    @property
    def engine_pid(self) -> int:
        (engine,) = self.children("engine.worker")
        return engine.pid

    def status(self, path: str) -> int:
        """The HTTP status of ``path``; 0 when nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=10).status_code
        except httpx.TransportError:
            return 0

    def wait_for(self, path: str, status: int, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while (seen := self.status(path)) != status:
            assert self.process.poll() is None, f"the server ended: {self.process.returncode}\n{self.stderr}"
            assert time.monotonic() < deadline, f"{path} says {seen}, not {status}\n{self.stderr}"
            time.sleep(0.05)

    def wait_until_told_ready(self) -> None:
        self.wait_for("/ready", 200)
        deadline = time.monotonic() + 10
        while "Ctrl-C" not in self.stdout:
            assert time.monotonic() < deadline, self.stdout
            time.sleep(0.02)

    def end(self) -> None:
        """Ends the server and whatever of its children is left."""
        tree = []
        if self.process.poll() is None:
            tree = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for child in alive:
            child.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(**more: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIGHTLINE_")}
    return environment | {"PYTHONUNBUFFERED": "1"} | more


@contextmanager
def running_server(
    folder: Path, *arguments: str, launcher: Sequence[str] = (), **environment: str
) -> Iterator[RunningServer]:
    """A server that has been started and not waited for, in a process group of its own as a terminal gives it.

    ``launcher`` is a command that becomes the one that follows it.
    """
    port = free_port()
    command = [*launcher, sys.executable, "-m", "sightline_server.cli.main", "serve", "--port", str(port), *arguments]
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=clean_environment(**environment),
            cwd=folder,
            start_new_session=True,
        )
    server = RunningServer(f"http://127.0.0.1:{port}", process, folder)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts a server of the test's own with the arguments given; returns before it is ready."""
    with ExitStack() as stack:
        count = 0

        def start(*arguments: str, launcher: Sequence[str] = (), **environment: str) -> RunningServer:
            nonlocal count
            count += 1
            folder = tmp_path / f"server-{count}"
            folder.mkdir()
            return stack.enter_context(running_server(folder, *arguments, launcher=launcher, **environment))

        yield start


@pytest.fixture(scope="session")
def run_server() -> Callable[..., Any]:
    """``running_server``, for fixtures that keep one server for several tests."""
    return running_server


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo model, ready. Shared by the whole run: leave it as it was."""
    with running_server(tmp_path_factory.mktemp("demo-server")) as server:
        server.wait_until_told_ready()
        yield server


@pytest.fixture(scope="session")
def random_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Random weights of the smallest shape, ready. Shared by the whole run: leave it as it was."""
    with running_server(tmp_path_factory.mktemp("random-server"), "--random", "tiny") as server:
        server.wait_until_told_ready()
        yield server


@pytest.fixture(scope="session")
def two_objects_png() -> bytes:
    """A red circle to the left of a blue square, on white."""
    picture = Image.new("RGB", (384, 384), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 140, 150, 230), fill="red")
    draw.rectangle((230, 150, 310, 230), fill="blue")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
