"""The server as its operator meets it: starting, dying, being stopped. True processes, the true demo model."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

StartServer = Callable[..., Any]

DESCRIPTION = "2 objects on a white background: red circle, blue square"


def chat_body(
    text: str, *, picture: bytes | None = None, model: str = "sightline-demo", **fields: Any
) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0} | fields


def endless(**fields: Any) -> dict[str, Any]:
    """A request that keeps the engine busy for many seconds."""
    return chat_body("Describe the picture.", max_tokens=1500, ignore_eos=True) | fields


def ask(server: Any, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120)


def describe(server: Any, picture: bytes) -> str:
    answer = ask(server, chat_body("Describe the picture.", picture=picture, max_tokens=40))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text.strip()


class Stream(threading.Thread):
    """Reads one streamed answer to its end, as lines of data."""

    def __init__(self, server: Any, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url = server.url + "/v1/chat/completions"
        self._body = body | {"stream": True}
        self.began = threading.Event()
        self.data: list[str] = []
        self.start()

    def run(self) -> None:
        # A test that ends the server at once sees the connection break; what is missing then is missing in ``data``.
        with (
            contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
            httpx.stream("POST", self._url, json=self._body, timeout=120) as response,
        ):
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.data.append(line.removeprefix("data: "))
                    if len(self.data) > 3:
                        self.began.set()

    def wait_begun(self) -> "Stream":
        assert self.began.wait(60), "the stream never began"
        return self

    def wait_ended(self) -> list[str]:
        self.join(100)
        assert not self.is_alive(), "the stream never ended"
        return self.data


def gone(processes: list[psutil.Process], timeout_s: float = 15.0) -> bool:
    """Whether all of ``processes`` end in time. An orphan may be left as a zombie where nobody reaps."""
    deadline = time.monotonic() + timeout_s
    left = processes
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return not left


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text("utf-8")


def test_the_port_opens_at_once_and_ready_says_when_the_engine_is(start_server: StartServer) -> None:
    began = time.monotonic()
    server = start_server()
    server.wait_for("/health", 200, timeout_s=30)
    opened_s = time.monotonic() - began
    assert server.status("/ready") == 503
    refusal = ask(server, chat_body("Hello."))
    assert refusal.status_code == 503
    assert refusal.json()["error"]["code"] == "engine_starting"
    assert int(refusal.headers["Retry-After"]) >= 1
    server.wait_for("/ready", 200)
    # The bound is loose because test machines are shared; torch alone takes longer than this.
    assert opened_s < 10


def test_only_the_engine_process_loads_torch(demo_server: Any, two_objects_png: bytes) -> None:
    assert describe(demo_server, two_objects_png) == DESCRIPTION
    decoders = demo_server.children("decode_worker")
    assert decoders
    for pid in (demo_server.process.pid, *(decoder.pid for decoder in decoders)):
        assert "libtorch" not in maps(pid), psutil.Process(pid).cmdline()
    assert "libtorch" in maps(demo_server.engine_pid)


def test_no_process_shows_secrets_to_other_users(start_server: StartServer) -> None:
    server = start_server("--random", "tiny", SIGHTLINE_API_KEY="canary-key-1")
    server.wait_for("/ready", 200)
    assert ask(server, chat_body("Hello.")).status_code == 401
    for child in psutil.Process(server.process.pid).children(recursive=True):
        assert "canary-key-1" not in " ".join(child.cmdline())
        assert "canary-key-1" not in " ".join(child.environ().values())
    server.wait_until_told_ready()
    assert "canary-key-1" not in server.stdout + server.stderr
    assert "API key    needed" in server.stdout
    assert "$SIGHTLINE_API_KEY" in server.stdout
    assert 'os.environ["SIGHTLINE_API_KEY"]' in server.stdout


def example(block: str, after: str) -> str:
    """The lines that follow ``after`` in the start-up block, up to the next blank line that ends them."""
    text = block.partition(after + "\n\n")[2]
    return re.split(r"\n\n(?=or with|Ctrl-C)", text)[0]


def test_the_start_up_block_says_what_runs(demo_server: Any) -> None:
    block = demo_server.stdout
    for fact in (
        r"model +sightline-demo \(LlavaForConditionalGeneration, \d.* million parameters, .* MiB\)",
        r"device +\w+",
        r"precision +float32 \(auto",
        r"cache +[\d,]+ tokens",
        r"context +2,048 tokens .* 144 of them",
        rf"address +{re.escape(demo_server.url)}/v1",
        r"API key +not needed",
    ):
        assert re.search(fact, block), f"{fact}\n{block}"


def test_its_curl_example_works_as_it_is(demo_server: Any, two_objects_png: bytes, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "picture.png").write_bytes(two_objects_png)
    command = example(demo_server.stdout, "Ask about a picture with curl:")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert DESCRIPTION in done.stdout, done.stdout + done.stderr


def test_its_python_example_works_as_it_is(
    demo_server: Any, two_objects_png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With a stand-in for the ``openai`` package that sends what the example gives it (test_openai_clients has the
    real one)."""
    (tmp_path / "picture.png").write_bytes(two_objects_png)
    monkeypatch.chdir(tmp_path)

    def create(**body: Any) -> list[SimpleNamespace]:
        stream = Stream(SimpleNamespace(url=made["base_url"].removesuffix("/v1")), body)
        chunks = [json.loads(data) for data in stream.wait_ended() if data != "[DONE]"]
        deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        return [SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))]) for text in deltas]

    made: dict[str, str] = {}

    def client(**options: str) -> SimpleNamespace:
        made.update(options)
        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    stand_in = ModuleType("openai")
    stand_in.OpenAI = client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openai", stand_in)
    code = example(demo_server.stdout, "or with Python (pip install openai):")
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.strip() == DESCRIPTION
    assert made == {"base_url": demo_server.url + "/v1", "api_key": "none"}


def test_E4_the_engine_killed_under_load_comes_back_and_answers_right(
    start_server: StartServer, two_objects_png: bytes
) -> None:
    server = start_server()
    server.wait_for("/ready", 200)
    assert describe(server, two_objects_png) == DESCRIPTION
    first = server.engine_pid

    with ThreadPoolExecutor(4) as pool:
        streams = [Stream(server, endless()) for _ in range(4)]
        plain = [pool.submit(ask, server, endless()) for _ in range(4)]
        for stream in streams:
            stream.wait_begun()
        os.kill(first, signal.SIGKILL)
        server.wait_for("/ready", 503, timeout_s=10)
        assert server.status("/health") == 200
        refusal = ask(server, chat_body("Hello."))
        for stream in streams:
            data = stream.wait_ended()
            assert json.loads(data[-1])["error"]["code"] == "engine_restarting"
            assert sum("error" in json.loads(item) for item in data) == 1
        for answer in (refusal, *(future.result(120) for future in plain)):
            if answer is not refusal and answer.status_code == 200:
                # It hadn't begun, and was carried over to the next process.
                assert answer.json()["choices"][0]["finish_reason"] == "length"
                continue
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_restarting"
            assert int(answer.headers["Retry-After"]) >= 1

    server.wait_for("/ready", 200)
    assert server.engine_pid != first
    assert describe(server, two_objects_png) == DESCRIPTION


def test_E5_nothing_outlives_a_killed_server(start_server: StartServer, two_objects_png: bytes) -> None:
    server = start_server()
    server.wait_for("/ready", 200)
    assert describe(server, two_objects_png) == DESCRIPTION
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert gone(children)


def test_E10_sigterm_lets_running_requests_finish(start_server: StartServer) -> None:
    server = start_server("--drain-timeout-s", "90")
    server.wait_for("/ready", 200)
    children = psutil.Process(server.process.pid).children(recursive=True)
    stream = Stream(server, endless(max_tokens=300)).wait_begun()
    # Every process gets it, as from a service manager.
    os.killpg(server.process.pid, signal.SIGTERM)
    server.wait_for("/ready", 503, timeout_s=10)
    refusal = ask(server, chat_body("Hello."))
    assert refusal.status_code == 503
    assert int(refusal.headers["Retry-After"]) >= 1
    data = stream.wait_ended()
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0
    assert gone(children)
    assert "Traceback" not in server.stderr


def test_E10_O12_a_request_that_takes_too_long_to_drain_gets_an_error(start_server: StartServer) -> None:
    server = start_server("--drain-timeout-s", "0.2")
    server.wait_for("/ready", 200)
    # One answer alone, of a model as small as this one, may be done sooner than that.
    stream = Stream(server, endless(n=8)).wait_begun()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    data = stream.wait_ended()
    assert json.loads(data[-1])["error"]["code"] == "server_shutting_down"
    assert "[DONE]" not in data
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 15
    assert "Traceback" not in server.stderr


def test_ctrl_c_ends_an_idle_server_quietly(start_server: StartServer) -> None:
    server = start_server("--random", "tiny")
    server.wait_until_told_ready()
    children = psutil.Process(server.process.pid).children(recursive=True)
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(20) == 0
    assert gone(children)
    assert "Traceback" not in server.stderr
    assert "KeyboardInterrupt" not in server.stderr
    # What bindings print of objects that the collector was not let near.
    assert "leaked" not in server.stderr


def test_a_signal_while_loading_ends_the_server(start_server: StartServer) -> None:
    server = start_server()
    server.wait_for("/health", 200)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert gone(children)
    assert "Traceback" not in server.stderr


def test_E10_a_second_signal_ends_the_server_at_once(start_server: StartServer) -> None:
    server = start_server()
    server.wait_for("/ready", 200)
    children = psutil.Process(server.process.pid).children(recursive=True)
    # Eight answers at once take seconds, also of a model as small as this one.
    stream = Stream(server, endless(n=8)).wait_begun()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("/ready", 503, timeout_s=10)
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 128 + signal.SIGINT
    assert time.monotonic() - began < 5
    assert gone(children)
    assert "[DONE]" not in stream.wait_ended()


def test_nothing_is_left_in_the_temporary_folder(start_server: StartServer, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    server = start_server("--random", "tiny", TMPDIR=str(scratch))
    server.wait_until_told_ready()
    deadline = time.monotonic() + 10
    while len(folders := list(scratch.glob("sightline-*"))) > 1:
        assert time.monotonic() < deadline, folders
        time.sleep(0.05)
    (folder,) = folders
    assert folder.name.startswith("sightline-random-")
    assert folder.stat().st_mode & 0o777 == 0o700
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    # Torch keeps an empty cache folder of its own there.
    assert [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")] == []


def failing(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit status and standard error of a server that can't start."""
    command = [sys.executable, "-m", "sightline_server.cli.main", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, told = failing("--port", str(port), cwd=tmp_path)
    assert status == 1
    assert (
        told
        == f"error: Port {port} on 127.0.0.1 is in use by another program. Stop that one, or give another --port.\n"
    )


def test_an_engine_that_cannot_load_ends_the_server_with_its_sentence(
    tmp_path: Path, demo_checkpoint_folder: Path
) -> None:
    folder = shutil.copytree(demo_checkpoint_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, told = failing("--port", "0", str(folder), cwd=tmp_path)
    assert status == 1
    assert "Traceback" not in told
    assert "model.safetensors" in told.splitlines()[-1]
