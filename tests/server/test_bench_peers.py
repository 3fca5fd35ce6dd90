"""The peers of the comparison: the folder that `transformers serve` gets, and a stub in place of `llama-server`."""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sightline_models.presets import demo_checkpoint

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import llama_server, systems, transformers_serve
from benchmarks.figures import figures_of
from benchmarks.llama_server import Llama, LlamaServerError, make_command, read_flags
from benchmarks.servers import ServerError, bench

STUB = '''#!{python}
"""Answers as llama-server does: /health is 503 while it loads, then chat completions stream with usage."""
import http.server, json, os, sys

arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("version: 1234 (abcdef0)\\nbuilt with a compiler", file=sys.stderr)
    sys.exit()
told = {{"arguments": arguments, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}}
open({log!r}, "w").write(json.dumps(told))
if "broken.gguf" in " ".join(arguments):
    sys.exit("error: failed to load model")
asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        asked.append(self.path)
        loading = self.path == "/health" and asked.count("/health") == 1
        self.answer(503 if loading else 200, json.dumps({{"data": [{{"id": "gguf"}}]}}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["ignore_eos"] and body["stream"], body
        with open({log!r} + ".bodies", "a") as file:
            file.write(json.dumps([part["type"] for part in body["messages"][0]["content"]]) + "\\n")
        words = len(body["messages"][0]["content"][-1]["text"].split())
        chunk = {{"choices": [{{"index": 0, "delta": {{"content": "x"}}, "finish_reason": None}}]}}
        usage = {{"prompt_tokens": words, "completion_tokens": body["max_tokens"]}}
        last = {{"choices": [{{"index": 0, "delta": {{}}, "finish_reason": "length"}}], "usage": usage}}
        events = [chunk] * body["max_tokens"] + [last]
        sent = "".join("data: " + json.dumps(event) + "\\n\\n" for event in events) + "data: [DONE]\\n\\n"
        self.answer(200, sent.encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


port = int(arguments[arguments.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def llama(tmp_path: Path) -> Llama:
    """A stub of the program, two weight files and a projector; it writes down how it was started."""
    program = tmp_path / "llama-server"
    program.write_text(STUB.format(python=sys.executable, log=str(tmp_path / "log.json")))
    program.chmod(0o755)
    files = [tmp_path / name for name in ("model-BF16.gguf", "model-Q8_0.gguf", "mmproj.gguf")]
    for path in files:
        path.touch()
    return Llama(program, (files[0], files[1]), files[2])


def test_the_command_names_weights_projector_slots_and_threads(llama: Llama) -> None:
    gguf = llama.ggufs[0]
    command = make_command(llama, gguf, port=5, threads="2", slots=32)
    assert command[0] == str(llama.program)
    pairs = dict(itertools.pairwise(command))
    assert (pairs["-m"], pairs["--port"], pairs["--host"]) == (str(gguf), "5", "127.0.0.1")
    assert (pairs["-np"], pairs["-c"], pairs["-t"], pairs["-ngl"]) == ("32", str(32 * 1024), "2", "0")
    assert pairs["--mmproj"] == str(llama.mmproj)
    assert "--jinja" in command
    plain = make_command(Llama(llama.program, llama.ggufs), gguf, port=5, threads="default", slots=8)
    assert not {"--mmproj", "-t"} & set(plain)


def test_it_is_started_awaited_loaded_and_ended(llama: Llama, tmp_path: Path) -> None:
    (first, second) = systems.llamas(llama)
    assert [system.key for system in (first, second)] == ["llama-model-BF16", "llama-model-Q8_0"]
    assert not first.gated
    assert first.threads[:2] == ("default", "1")
    with second.start(second.settings[0], "1") as server:
        told = json.loads((tmp_path / "log.json").read_text())
        assert dict(itertools.pairwise(told["arguments"]))["-m"] == str(llama.ggufs[1])
        assert told["gpus"] == ""
        summary = bench(
            server, num_prompts=3, max_concurrency=2, input_len=8, output_len=5, images="own", warmup=0, ignore_eos=True
        )
    assert (summary["counts"]["ok"], summary["counts"]["short"], summary["tokens"]["output"]) == (3, 0, 15)
    assert figures_of(summary, summary["server_cpu_s"])["tokens_per_s"] > 0
    bodies = (tmp_path / "log.json.bodies").read_text().splitlines()
    assert bodies.count('["image_url", "text"]') == 3
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_one_that_cant_load_says_so(llama: Llama, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    with pytest.raises(ServerError, match="failed to load model"), llama_server.serving(llama, broken, "1", slots=2):
        pass


def test_its_version_is_told(llama: Llama, tmp_path: Path) -> None:
    assert llama.version() == "1234 (abcdef0)"
    assert Llama(tmp_path / "nothing", ()).version() == "unknown"


def test_flags_that_compare_nothing_are_refused_with_the_fix(llama: Llama) -> None:
    program, mmproj, names = llama.program, llama.mmproj, ",".join(map(str, llama.ggufs))
    known: dict[str, Any] = {"images": "own", "models": ["demo"]}
    assert read_flags(None, None, None, **known) is None
    assert read_flags(program, names, mmproj, **known) == llama
    assert read_flags(program, names, None, images="none", models=["demo"]) == Llama(program, llama.ggufs)
    with pytest.raises(LlamaServerError, match="--llama-server PATH --gguf FILE"):
        read_flags(program, None, mmproj, **known)
    with pytest.raises(LlamaServerError, match="There is no file /nowhere"):
        read_flags(Path("/nowhere"), names, mmproj, **known)
    with pytest.raises(LlamaServerError, match="--images none"):
        read_flags(program, names, None, **known)
    with pytest.raises(LlamaServerError, match="names 2: name the one"):
        read_flags(program, names, mmproj, images="own", models=["demo", "llava-45m"])


def test_the_folder_of_transformers_has_the_same_weights_and_no_end_token(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    transformers_serve.link_checkpoint(demo_checkpoint(), folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in demo_checkpoint().iterdir()}
    assert os.path.samefile(folder / "model.safetensors", demo_checkpoint() / "model.safetensors")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is True
    assert "eos_token_id" not in generation
    config = json.loads((folder / "config.json").read_text())
    assert config.get("eos_token_id") is None
    assert config["text_config"].get("eos_token_id") is None
