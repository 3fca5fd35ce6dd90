"""`sightline serve --compile`: it answers, leaves no file, and says what it lacks where nothing can be compiled."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile.chats import chat_body, noise_url

StartServer = Callable[..., Any]


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_it_answers_as_the_plain_server_does(start_server: StartServer, random_server: Any, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    server = start_server("--random", "tiny", "--compile", TMPDIR=str(scratch))
    server.wait_for("/ready", 200, timeout_s=500)
    body = chat_body("random-tiny", "What is this?", noise_url(5), temperature=0, max_tokens=30, ignore_eos=True)
    texts = {
        httpx.post(each.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
        for each in (server, random_server)
    }
    assert len(texts) == 1
    assert "the decode step was compiled in" in server.stderr
    assert "Warning" not in server.stderr
    assert not [path for path in scratch.iterdir() if not path.name.startswith(("sightline-random", "sightline-sock"))]


def test_without_a_compiler_the_start_says_so(start_server: StartServer) -> None:
    server = start_server("--random", "tiny", "--compile", CXX="/nowhere/g++")
    assert server.process.wait(150) != 0
    assert "--compile: the decode step could not be compiled" in server.stderr
    assert "leave --compile out" in server.stderr
    assert "Traceback" not in server.stderr
