"""Keys at a true server: nothing secret in any place where others look, nothing shared between keys, SIGHUP."""

import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, PngImagePlugin
from prometheus_client.parser import text_string_to_metric_families

from sightline_server.auth.keys_file import create_key, revoke_key
from sightline_server.auth.principal import Limits, Scope

CANARY = "canary-0f3a9c"
JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


@dataclass
class KeyedServer:
    server: Any
    file: Path
    ann: str
    bob: str
    admin: str

    def ask(self, key: str, text: str, *urls: str, **fields: Any) -> httpx.Response:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": text})
        body = {"model": "random-tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4} | fields
        return httpx.post(self.server.url + CHAT, json=body, headers=bearer(key), timeout=60)

    def figures(self) -> dict[str, float]:
        text = httpx.get(self.server.url + "/metrics", headers=bearer(self.admin)).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def picture(seed: int) -> str:
    """A picture as a data: URL, with the canary in its file."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", CANARY)
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (seed * 37 % 256, seed * 91 % 256, 50)).save(file, "PNG", pnginfo=notes)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, run_server: Callable[..., Any]) -> Iterator[KeyedServer]:
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "keys"
    ann, bob = (create_key(file, name, (Scope.CHAT,), Limits())[1] for name in ("ann", "bob"))
    admin = create_key(file, "admin", (Scope.ADMIN,), Limits())[1]
    flags = ("--random", "tiny", "--log-format", "json", "--log-level", "debug")
    with run_server(folder, *flags, SIGHTLINE_KEYS_FILE=str(file)) as server:
        server.wait_until_told_ready()
        yield KeyedServer(server, file, ann, bob, admin)


def test_K9_another_keys_cache_is_not_hit(keyed: KeyedServer) -> None:
    prompt = "Tell me about the lighthouse, " * 20

    def look(key: str, seed: int) -> tuple[int, float, float]:
        """What could be told by the clock: prompt tokens not computed, pictures not encoded, files not decoded."""
        before = keyed.figures()
        usage = keyed.ask(key, prompt, picture(seed), max_tokens=1).json()["usage"]
        after = keyed.figures()
        return (
            usage["prompt_tokens_details"]["cached_tokens"],
            after["sightline_encoder_cache_hits_total"] - before["sightline_encoder_cache_hits_total"],
            1 - (after["sightline_images_decoded_total"] - before["sightline_images_decoded_total"]),
        )

    for seed in range(1, 6):
        never_seen = look(keyed.bob, 100 + seed)
        assert look(keyed.ann, seed) == (0, 0, 0)
        own_again = look(keyed.ann, seed)
        assert own_again[0] > 0
        assert own_again[2] == 1
        seen_by_another = look(keyed.bob, seed)
        # bob's own text is cached up to the picture at most, and as much whether ann sent the picture or not.
        assert seen_by_another == never_seen


def test_K10_a_line_stays_a_line(keyed: KeyedServer) -> None:
    before = len(keyed.server.stderr.splitlines())
    nasty = '\x1b[2J\x1b]0;owned\x07" status=200 \u202e\u2028'
    for name in (nasty, "m" * 1_000_000, "a\r\nb", "\x00"):
        answer = keyed.ask(keyed.ann, "Hi", model=name)
        assert answer.status_code in (400, 404)
        assert len(answer.text) < 2000
    with httpx.Client(base_url=keyed.server.url, headers=bearer(keyed.ann)) as client:
        for path in ("/v1/%1b%5b2J%0d%0aforged%e2%80%ae", "/v1/models/" + "x" * 5_000, "/a%20status%3d200"):
            assert client.get(path, headers={"User-Agent": '" status=200 ' + "u" * 10_000}).status_code == 404
    lines = keyed.server.stderr.splitlines()[before:]
    access = [line for line in map(json.loads, lines) if line["logger"] == "sightline_server.access"]
    assert len(access) == 7
    assert {line["status"] for line in access} <= {400, 404}
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 2000


def test_K11_no_secret_stands_where_others_look(keyed: KeyedServer) -> None:
    """Success, refusals and a crash, each with a key, a prompt and a picture that are looked for afterwards."""
    server = keyed.server
    url = picture(3)
    assert keyed.ask(keyed.ann, f"{CANARY} what is this?", url).status_code == 200
    assert keyed.ask(keyed.ann, CANARY, url, stream=True).status_code == 200
    broken = "data:image/png;base64," + base64.b64encode(b"\x89PNG" + CANARY.encode()).decode()
    bodies = [
        keyed.ask(keyed.ann, CANARY, url, colour="blue"),
        keyed.ask(keyed.ann, CANARY, broken),
        keyed.ask(keyed.ann, CANARY * 2000),
        keyed.ask(keyed.ann, CANARY, temperature=CANARY),
        keyed.ask(keyed.bob + CANARY, CANARY, url),
        httpx.post(
            f"{server.url}{CHAT}?key={keyed.ann}&q={CANARY}",
            content=b"{" + CANARY.encode(),
            headers=bearer(keyed.ann) | JSON,
        ),
    ]
    assert [answer.status_code for answer in bodies] == [400, 400, 400, 400, 401, 400]
    late: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: late.append(keyed.ask(keyed.ann, CANARY, url, max_tokens=400, ignore_eos=True))
    )
    asking.start()
    deadline = time.monotonic() + 20
    while keyed.figures()["sightline_requests_running"] == 0 and asking.is_alive():
        assert time.monotonic() < deadline
    os.kill(server.engine_pid, signal.SIGSEGV)
    asking.join()
    bodies += late
    titles = environments = ""
    root = psutil.Process(server.process.pid)
    for process in (root, *root.children(recursive=True)):
        titles += " ".join(process.cmdline())
        if process.pid != root.pid:
            environments += str(process.environ())
    server.wait_for("/ready", 200)
    figures = httpx.get(server.url + "/metrics", headers=bearer(keyed.admin)).text
    places = {
        "standard output": server.stdout,
        "the log": server.stderr,
        "errors": "".join(answer.text for answer in bodies),
        "figures": figures,
        "process titles": titles,
        "environments of the engine and the decoders": environments,
    }
    secrets = (keyed.ann, keyed.bob, keyed.admin, CANARY, url[60:100], base64.b64encode(CANARY.encode()).decode()[:12])
    for place, text in places.items():
        for secret in secrets:
            assert secret not in text, f"{secret} stands in {place}"
    for secret in secrets[:3]:
        assert secret not in keyed.file.read_text()
    assert "Segmentation fault" in server.stderr, "the crash was one"
    lines = [json.loads(line) for line in server.stderr.splitlines() if line.startswith("{")]
    owners = {line["key"] for line in lines if "completion" in line}
    assert owners <= {entry["id"] for entry in map(json.loads, keyed.file.read_text().splitlines())}


def test_K14_sighup_revokes_and_a_broken_file_changes_nothing(keyed: KeyedServer) -> None:
    _, carol = create_key(keyed.file, "carol", (Scope.CHAT,), Limits())
    assert keyed.ask(carol, "Hi").status_code == 401
    keyed.server.process.send_signal(signal.SIGHUP)
    until(lambda: keyed.ask(carol, "Hi").status_code == 200)
    written = keyed.file.read_text()
    keyed.file.write_text(written + "{\n")
    keyed.server.process.send_signal(signal.SIGHUP)
    until(lambda: "The keys stay as they were" in keyed.server.stderr)
    assert keyed.ask(carol, "Hi").status_code == 200
    keyed.file.write_text(written)
    revoke_key(keyed.file, "carol")
    body = {
        "model": "random-tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 1900,
        "ignore_eos": True,
    }
    with httpx.stream("POST", keyed.server.url + CHAT, json=body, headers=bearer(carol), timeout=30) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        keyed.server.process.send_signal(signal.SIGHUP)
        began = time.monotonic()
        rest = [line for line in lines if line]
    assert time.monotonic() - began < 2
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    assert keyed.ask(carol, "Hi").status_code == 401
    assert keyed.ask(keyed.ann, "Hi").status_code == 200


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)
