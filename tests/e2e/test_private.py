"""What leaves the server and what it leaves behind: nothing, on the wire or on disk, of what users sent."""

import base64
import io
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from fakes import fake_app
from fastapi import FastAPI
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
StartServer = Callable[..., Any]

# What a user sends, each in words that stand nowhere else.
PROMPT = "zanzibar-canary-of-a-prompt"
SYSTEM = "quixotic-canary-of-a-system-message"
STOP = "halcyon-canary-of-a-stop"
USER = "meridian-canary-of-a-user"


def test_P1_P2_a_server_without_a_network_or_a_home_answers_and_calls_nobody(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/no_egress")]
    if (probe := subprocess.run([*script, "--", "true"], capture_output=True, text=True)).returncode:
        pytest.skip(probe.stderr.strip())
    chat = [sys.executable, str(ROOT / "tests/e2e/private_chat.py"), str(tmp_path)]
    ended = subprocess.run([*script, "--", *chat], capture_output=True, text=True, timeout=170)
    assert ended.returncode == 0, ended.stderr
    answer, verdict = ended.stdout.splitlines()
    assert json.loads(answer)["usage"]["completion_tokens"] == 5
    calls = re.fullmatch(r"None of (\d+) traced calls meant to leave this machine; .* status is 0\.", verdict)
    # The chat itself is among them.
    assert calls is not None, verdict
    assert int(calls[1]) >= 5
    # No library left a cache, a token or an identifier in the home.
    assert list((tmp_path / "home").rglob("*")) == []


def test_P3_what_serves_imports_no_library_that_calls_home() -> None:
    code = (
        "import sys\n"
        "import sightline_server.cli.serve, sightline_server.cli.doctor, sightline_server.app\n"
        "assert 'torch' not in sys.modules\n"
        "import sightline_server.engine.load, sightline_server.engine.worker\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    modules = run.stdout.split()
    loaded = {name.partition(".")[0] for name in modules}
    assert "torch" in loaded
    # FastAPI imports the names of OpenTelemetry where they are installed; what would send anything is not among them.
    assert not [name for name in modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
    callers = {"transformers", "huggingface_hub", "open_clip", "timm", "accelerate", "bitsandbytes", "datasets"}
    callers |= {"wandb", "sentry_sdk", "posthog", "requests", "httpx"}
    assert loaded.isdisjoint(callers)


def test_P3_nothing_but_training_reaches_for_a_hub() -> None:
    imports = re.compile(r"^\s*(?:import|from) (transformers|huggingface_hub|open_clip|timm)\b", re.MULTILINE)
    found = {
        str(file.relative_to(ROOT))
        for root in ("server", "models", "kernels")
        for file in (ROOT / root).rglob("*.py")
        if imports.search(file.read_text("utf-8"))
    }
    # They make the demo's CLIP, and scripts/train_clip starts them offline.
    assert found == {"models/sightline_models/demo/clip.py", "models/sightline_models/demo/clip_evaluate.py"}
    starter = (ROOT / "scripts/train_clip").read_text("utf-8")
    assert "export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1" in starter
    # No variable has to be set for the server to be silent, so it names none.
    quiet = re.compile(r"\b(?:DO_NOT_TRACK|\w+_(?:DISABLE_TELEMETRY|NO_USAGE_STATS|ANALYTICS)|OTEL_\w+=)")
    for root in ("server", "models", "kernels"):
        for file in (ROOT / root).rglob("*.py"):
            assert not quiet.search(file.read_text("utf-8")), file


async def test_P3_the_frameworks_own_telemetry_is_off_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastapi.telemetry")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.1:4318")

    async def start(app: FastAPI) -> None:
        messages = iter(({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}))

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            assert not str(message["type"]).endswith("failed"), message

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    # What a plain application does: without an exporter installed it complains, with one it would send.
    await start(FastAPI())
    assert "telemetry" in caplog.text
    caplog.clear()
    await start(fake_app())
    assert caplog.text == ""


def canary_picture() -> Image.Image:
    """Noise without alpha that no other file holds."""
    pixels = np.random.default_rng(20_261).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def canaries(picture: Image.Image, encoded: bytes) -> dict[str, bytes]:
    """Stretches of what was sent, as it might come to lie on a disk."""
    pixels = np.asarray(picture)
    return {
        "prompt": PROMPT.encode(),
        "prompt, UTF-16": PROMPT.encode("utf-16-le"),
        "prompt, base64": base64.b64encode(PROMPT.encode())[3:-4],
        "system message": SYSTEM.encode(),
        "stop string": STOP.encode(),
        "user": USER.encode(),
        "file": encoded[len(encoded) // 2 :][:24],
        "file, base64": base64.b64encode(encoded)[2000:2032],
        "pixels": pixels[32].tobytes()[:24],
        "pixels, by channel": np.ascontiguousarray(pixels[:, :, 1])[32].tobytes()[:24],
    }


def files_held(process: psutil.Process) -> Iterator[Path]:
    """What the process has open besides the files of its folders, by a name that works after they are unlinked."""
    for entry in os.scandir(f"/proc/{process.pid}/fd"):
        try:
            if stat.S_ISREG(os.stat(entry.path).st_mode):
                yield Path(entry.path)
        except FileNotFoundError:
            continue


def is_torchs(path: Path) -> bool:
    """A folder that torch makes when it is imported, and leaves empty."""
    return path.name.startswith("torchinductor_") and not any(path.iterdir())


def found_in(paths: list[Path], wanted: dict[str, bytes]) -> list[tuple[str, str]]:
    found = []
    for path in paths:
        content = path.read_bytes()
        # A file's name tells, too.
        content += str(path).encode()
        found += [(str(path), name) for name, canary in wanted.items() if canary in content]
    return found


def files_under(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_P4_nothing_that_users_sent_lies_on_a_disk(start_server: StartServer, tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    shared_before = set(files_under(Path("/dev/shm")))
    server = start_server("--random", "tiny", "--log-level", "debug", HOME=str(home), TMPDIR=str(temporary))
    server.wait_for("/ready", 200)
    picture = canary_picture()
    file = io.BytesIO()
    picture.save(file, "PNG")
    wanted = canaries(picture, file.getvalue())
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = {
        "model": "random-tiny",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}],
            },
        ],
        "stop": [STOP],
        "user": USER,
        "max_tokens": 5,
    }
    post = {"url": server.url + "/v1/chat/completions", "timeout": 60}
    assert httpx.post(**post, json=body).status_code == 200
    assert "[DONE]" in httpx.post(**post, json=body | {"stream": True}).text
    # What is refused is written down no more than what is answered.
    spoiled = "data:image/png;base64," + base64.b64encode(file.getvalue()[:3000]).decode()
    text = json.dumps(body).replace(url, spoiled)
    assert httpx.post(**post, content=text, headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(**post, json=body | {PROMPT: 1}).status_code == 400
    assert httpx.post(**post, content="{" + PROMPT, headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(**post, json=body | {"model": USER}).status_code == 404
    # A path is written to the log as it came, so it isn't a place for secrets: only what stands behind "?" is.
    assert httpx.get(f"{server.url}/v1/models?note={PROMPT}").status_code == 200

    watched = (home, temporary, server.folder)
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(processes) >= 4, "API, engine, decoder, template"
    held = [path for process in processes for path in files_held(process)]
    shared = set(files_under(Path("/dev/shm"))) - shared_before
    assert found_in([*files_under(*watched), *held, *shared], wanted) == []
    # Others on this machine can't look into what is there while it runs, and no crash writes memory down.
    made = [path for path in temporary.iterdir() if not is_torchs(path)]
    assert made
    for path in made:
        assert path.stat().st_mode & 0o077 == 0, path
    for process in processes:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 ", limits), process.cmdline()
    # The scan sees what lies there: the log names these requests without saying what they held.
    assert "chat" in server.stderr
    (temporary / "proof").write_bytes(b"x" * 5000 + wanted["pixels"] + b"x")
    assert found_in(files_under(*watched), wanted) == [(str(temporary / "proof"), "pixels")]
    (temporary / "proof").unlink()

    server.end()
    assert found_in([*files_under(*watched), *(set(files_under(Path("/dev/shm"))) - shared_before)], wanted) == []
    assert list(home.rglob("*")) == []
    assert [path for path in temporary.iterdir() if not is_torchs(path)] == []
