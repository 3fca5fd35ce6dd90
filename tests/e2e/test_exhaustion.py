"""A server that runs out of open files, or of room in its temporary folders: it says so by name, and goes on when it
has some again."""

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hostile.chats import chat_body, noise_url

StartServer = Callable[..., Any]

MODEL = "random-tiny"
CHATS = "/v1/chat/completions"


def wait_for_log(server: Any, text: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in server.stderr:
        assert time.monotonic() < deadline, f"{text!r} is not in the log\n{server.stderr}"
        time.sleep(0.05)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def limit_files(server: Any, spare: int) -> None:
    limits = (psutil.Process(server.process.pid).num_fds() + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of a running process")
@pytest.mark.parametrize("spare", [0, 4])
def test_E4_without_a_file_to_open_the_server_says_so_and_comes_back(start_server: StartServer, spare: int) -> None:
    # With four left, ZeroMQ on its own would end the process: it takes for granted that its first files can be opened.
    server = start_server("--random", "tiny")
    server.wait_until_told_ready()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.post(CHATS, json=chat_body(MODEL, "Hi", noise_url(1), max_tokens=1)).status_code == 200
        limit_files(server, spare)
        # The connection that stands goes on.
        (decoder, *others) = server.children("decode_worker")
        assert http.get("/health").status_code == 200
        if not others and spare == 0:
            decoder.kill()
            refusal = http.post(CHATS, json=chat_body(MODEL, "Hi", noise_url(2), max_tokens=1))
            assert code_of(refusal) == (503, "server_is_overloaded")
            assert int(refusal.headers["Retry-After"]) >= 1
            assert "An image decoder could not be started: Too many open files." in server.stderr
        limit_files(server, spare)
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for_log(server, "The engine process could not be started (Too many open files). Allow this server more")
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        assert code_of(http.post(CHATS, json=chat_body(MODEL, "Hi", max_tokens=1))) == (503, "engine_restarting")
        limit_files(server, 1000)
        server.wait_for("/ready", 200)
        assert http.post(CHATS, json=chat_body(MODEL, "Hi", noise_url(3), max_tokens=1)).status_code == 200
    assert "Traceback" not in server.stderr


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for _ in range(100):
            (folder / f"full-{time.monotonic_ns()}").touch()
        raise AssertionError("there was room for a hundred files")


def can_mount() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0
    return False


@pytest.mark.skipif(not can_mount(), reason="mounting in a namespace of one's own isn't allowed here")
def test_E4_with_full_temporary_folders_an_engine_that_died_is_back(
    start_server: StartServer, tmp_path: Path, demo_checkpoint_folder: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = (
        'mount -t tmpfs -o size=64k,nr_inodes=12 none "$0" && mount -t tmpfs -o size=4k none /dev/shm && '
        '! head -c 8192 /dev/zero 2>/dev/null >/dev/shm/full && exec "$@"'
    )
    launcher = ("unshare", "-rm", "sh", "-c", script, str(scratch))
    server = start_server(str(demo_checkpoint_folder), launcher=launcher, TMPDIR=str(scratch))
    # With /dev/shm full from the beginning: nothing here needs it.
    server.wait_for("/ready", 200)
    inside = Path(f"/proc/{server.process.pid}/root{scratch}")
    fill(inside)
    # An engine that dies leaves the room that the next one takes.
    os.kill(server.engine_pid, signal.SIGKILL)
    server.wait_for("/ready", 503, timeout_s=10)
    server.wait_for("/ready", 200)
    assert httpx.get(server.url + "/health").status_code == 200
    assert "Traceback" not in server.stderr
