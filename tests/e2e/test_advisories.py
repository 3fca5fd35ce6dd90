"""Public advisories of other servers, replayed: each case does to a true server what was done there, by its name.

After each the server has the same processes, is ready, and gives its canary byte for byte. docs/security.md tells what
happened there and what happens here; tests/docs/test_security_page.py compares its table with these names.
"""

import base64
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hostile import advisories
from hostile.advisories import DRAWN, Checkpoint, Field
from hostile.bombs import bombs, png
from hostile.chats import chat_body, noise_url
from hostile.target import CHAT, MODEL, Target, image_of, image_tokens, png_url, text_of, url_of
from PIL import Image

from sightline_server.auth.keys_file import create_key
from sightline_server.auth.principal import Limits, Scope

SEEN = "2 objects on a white background: red circle, blue square"
ENDLESS = {"max_tokens": 1200, "ignore_eos": True, "n": 8}
"""Seconds of work for the engine."""
CANCELLED = "sightline_requests_total{'endpoint': 'chat', 'outcome': 'cancelled'}"


@pytest.fixture(scope="module")
def attacked(
    tmp_path_factory: pytest.TempPathFactory, run_server: Callable[..., Any], two_objects_png: bytes
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("attacked")
    file = folder / "keys"
    keys = {name: create_key(file, name, (Scope.CHAT,), Limits())[1] for name in ("alice", "mallory")}
    keys["admin"] = create_key(file, "admin", (Scope.ADMIN,), Limits())[1]
    flags = ("--deterministic", "--refusal-delay-s", "0", "--header-timeout-s", "1", "--body-timeout-s", "3")
    with run_server(folder, *flags, "--log-level", "debug", SIGHTLINE_KEYS_FILE=str(file)) as server:
        server.wait_until_told_ready()
        yield Target(server, png_url(two_objects_png), keys)
        assert "Traceback" not in server.stderr
        assert not any(key in server.stderr + server.stdout for key in keys.values())


@pytest.fixture
def target(attacked: Target) -> Iterator[Target]:
    """The server, which an attack must leave as it was."""
    before, attacked.canaries = attacked.processes(), attacked.canaries or {attacked.canary()}
    yield attacked
    assert attacked.server.status("/ready") == 200
    attacked.canaries.add(attacked.canary())
    assert len(attacked.canaries) == 1
    assert SEEN in next(iter(attacked.canaries)).replace('"', "")
    assert attacked.processes() == before


@pytest.mark.parametrize("attack", advisories.FIELDS.values(), ids=advisories.FIELDS.keys())
def test_fields_that_reached_inside(target: Target, attack: tuple[Field, ...]) -> None:
    for each in attack:
        body = chat_body(MODEL, "Hi", target.picture) | each.fields
        assert target.refused(body) == (400, each.code, each.param)


@pytest.mark.parametrize(("parts", "place", "code"), advisories.PARTS.values(), ids=advisories.PARTS.keys())
def test_parts_that_were_no_pictures(target: Target, parts: list[dict[str, Any]], place: str, code: str) -> None:
    body = chat_body(MODEL, "") | {"messages": [{"role": "user", "content": parts}]}
    assert target.refused(body) == (400, code, f"messages[0].content{place}")


@pytest.mark.parametrize("requests", advisories.RAW.values(), ids=advisories.RAW.keys())
def test_requests_that_came_through(target: Target, requests: Any) -> None:
    for make, status in requests:
        began = time.monotonic()
        answer = target.send(make(target))
        assert (answer.status, b"choices" in answer.body) == (status, False)
        assert time.monotonic() - began < 5


# The library's error for a broken picture was sent on, and in it stood the address of a buffer.
@pytest.mark.parametrize("stream", [pytest.param(False, id="CVE-2026-22778")])
def test_broken_pictures(target: Target, stream: bool) -> None:
    for data in advisories.NO_PICTURES:
        status, code, place = target.refused(chat_body(MODEL, "Hi", png_url(data), stream=stream))
        assert (status, place) == (400, "messages[0].content[0].image_url")
        assert code in ("image_parse_error", "unsupported_image_media_type")


# The cure for that was left out of a second API and of streams.
@pytest.mark.parametrize("path", [pytest.param("/v1/messages", id="CVE-2026-54236")])
def test_broken_pictures_by_another_way(target: Target, path: str) -> None:
    for data in advisories.NO_PICTURES:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
        message = {"role": "user", "content": [{"type": "image", "source": source}]}
        assert target.ask({"model": MODEL, "max_tokens": 1, "messages": [message]}, path=path).status == 404
        assert target.ask(chat_body(MODEL, "Hi", png_url(data), stream=True)).status == 400


# A picture of one pixel was counted wrong and ended the engine.
@pytest.mark.parametrize("size", [pytest.param((1, 1), id="CVE-2026-22773")])
def test_one_pixel(target: Target, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        answer = target.chat("Describe the picture.", url_of(Image.new(mode, size)), max_tokens=4)
        assert image_tokens(answer) == 144


# The model saw sideways what a viewer shows upright, and colours that a viewer hides.
@pytest.mark.parametrize("sideways", [pytest.param(6, id="CVE-2026-12491")])
def test_what_a_viewer_shows(target: Target, sideways: int) -> None:
    def told(image: Image.Image, **how: Any) -> list[str]:
        questions = ("Describe the picture.", "Give the bounding box of the red circle.")
        return [text_of(target.chat(question, url_of(image, **how))) for question in questions]

    upright = image_of(target.picture)
    shown = told(upright)
    exif = Image.Exif()
    exif[0x0112] = sideways
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    # The ground is red, unless what is transparent shows the white behind it.
    indices = upright.quantize(8)
    ground = np.asarray(indices)[0, 0]
    palette = np.array(indices.getpalette()).reshape(-1, 3)
    palette[ground] = (255, 0, 0)
    indices.putpalette(palette.ravel().tolist())
    alpha = indices.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.where(np.asarray(indices) == ground, 0, 255).astype(np.uint8)))
    for image, how in ((turned, {"exif": exif}), (indices, {"transparency": int(ground)}), (alpha, {})):
        assert told(image, **how) == shown
        assert told(image.convert("RGB")) != shown


# Two pictures of the same bytes in another shape had one name in the cache: the answer was about the other one.
@pytest.mark.parametrize("shape", [pytest.param((30, 100), id="CVE-2025-46722")])
def test_equal_bytes_in_another_shape(target: Target, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(46722).integers(0, 256, (*shape, 3), np.uint8)
    asked: dict[str, Any] = {"max_tokens": 8, "logprobs": True, "top_logprobs": 5}
    for made in (pixels, pixels.reshape(shape[1], shape[0], 3)):
        for least, most in ((0, 16), (140, 160)):
            answer = target.chat("Describe the picture.", url_of(Image.fromarray(made)), **asked)
            assert least <= answer["usage"]["prompt_tokens_details"]["cached_tokens"] < most


# The client said under which name a picture is cached, and so could give another's picture its own meaning.
@pytest.mark.parametrize("name", [pytest.param("0" * 64, id="CVE-2026-105754")])
def test_a_name_for_the_cache(target: Target, name: str) -> None:
    other = url_of(Image.new("RGB", (384, 384), "black"))
    texts = []
    for url in (other, target.picture):
        part = {"type": "image_url", "image_url": {"url": url}, "uuid": name}
        message = {"role": "user", "content": [part, {"type": "text", "text": "Describe the picture."}]}
        answer = target.ask(chat_body(MODEL, "", temperature=0) | {"messages": [message]})
        texts.append(text_of(json.loads(answer.body)))
    assert texts[1] == SEEN != texts[0]
    assert target.refused(chat_body(MODEL, "Hi", mm_hashes=[name])) == (400, "unsupported_parameter", "mm_hashes")


# One kind of model switched the library's guard against bombs off, for all.
@pytest.mark.parametrize("seconds", [pytest.param(2, id="CVE-2026-109229")])
def test_bombs(target: Target, seconds: float) -> None:
    for name, data in bombs().items():
        began = time.monotonic()
        assert target.refused_undecoded(png_url(data)) == "image_too_large", name
        assert time.monotonic() - began < seconds, name


# Every picture of a request was fetched and decoded before the first limit was looked at.
@pytest.mark.parametrize("side", [pytest.param(7000, id="CVE-2026-130686")])
def test_pictures_that_are_too_many_together(target: Target, side: int) -> None:
    large = png_url(png(side, side, depth=1, colour=0))
    assert target.refused_undecoded(*[large] * 3) == "image_too_large"


# Limits on bytes and on the number of pictures came after all of it had been read and decoded.
@pytest.mark.parametrize("count", [pytest.param(500, id="CVE-2026-100650")])
def test_limits_before_work(target: Target, count: int) -> None:
    assert target.refused_undecoded(*[target.picture] * count) == "too_many_images"
    announced = target.head(f"POST {CHAT}", "Content-Length: 70000000", "Expect: 100-continue", key="mallory")
    began = time.monotonic()
    assert target.send(announced).status == 413
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("text", "count"), advisories.PLACEHOLDERS.values(), ids=advisories.PLACEHOLDERS.keys())
def test_placeholders_are_text(target: Target, text: str, count: int) -> None:
    assert image_tokens(target.chat(text, *[target.picture] * count, max_tokens=8)) == 144 * count


# The same words before a picture: each picture moved to the place of the one before.
@pytest.mark.parametrize("word", [pytest.param("<image>", id="vllm-57740")])
def test_placeholders_beside_pictures(target: Target, word: str) -> None:
    other = url_of(Image.new("RGB", (384, 384), "white"))

    def which(*parts: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": part}} if part[:5] == "data:" else {"type": "text", "text": part}
            for part in (*parts, "Which image has a red circle?")
        ]
        body = chat_body(MODEL, "", temperature=0) | {"messages": [{"role": "user", "content": content}]}
        answer: dict[str, Any] = json.loads(target.ask(body).body)
        return answer

    for parts, place in (((target.picture, other), "the first"), ((other, target.picture), "the second")):
        plain, forged = which(*parts), which(word, *parts)
        assert text_of(plain) == text_of(forged) == place
        assert image_tokens(plain) == image_tokens(forged) == 288
        assert forged["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 1


# With one way of guessing ahead, a single request with a penalty ended the engine.
@pytest.mark.parametrize("strength", [pytest.param(1.1, id="PYSEC-2026-145")])
def test_one_penalty(target: Target, strength: float) -> None:
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        penalty: dict[str, Any] = {name: strength}
        assert text_of(target.chat("How many objects are there?", target.picture, max_tokens=20, **penalty))


# Counting the tokens that penalties ask about failed for some prompts, and with it the service.
@pytest.mark.parametrize("strength", [pytest.param(10, id="CVE-2026-105922")])
def test_all_penalties_at_their_ends(target: Target, strength: float) -> None:
    ends: dict[str, Any] = {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": strength}
    ends |= {"ignore_eos": True, "n": 4, "logit_bias": {str(advisories.VOCABULARY - 1): 100}}
    answer = target.chat("Hi", *[target.picture] * 3, max_tokens=64, **ends)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4


# How much of a guessed key was right could be told by the clock.
@pytest.mark.parametrize("filler", [pytest.param("x", id="CVE-2025-59425")])
def test_keys_guessed_from_the_left(target: Target, filler: str) -> None:
    key = target.keys["alice"]
    told = set()
    for right in (0, 1, len(key) // 2, len(key) - 1):
        answer = target.ask(chat_body(MODEL, "Hi"), key=key[:right] + filler * (len(key) - right))
        told.add((answer.status, answer.body))
    assert len(told) == 1
    assert next(iter(told))[0] == 401
    assert target.ask(chat_body(MODEL, "Hi", max_tokens=1), key=key).status == 200


# How soon an answer began told whether somebody else had sent the same beginning before.
@pytest.mark.parametrize("word", [pytest.param("lighthouse", id="CVE-2025-46570")])
def test_caches_are_each_keys_own(target: Target, word: str) -> None:
    def cached(text: str, key: str) -> int:
        usage = target.chat(text, key=key, max_tokens=1)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    secret, never_sent = (f"{first} {word} keeper says: " * 12 for first in ("The", "A"))
    assert cached(secret, "alice") < 16 < cached(secret, "alice")
    assert cached(secret, "mallory") == cached(never_sent, "mallory") < 16


@pytest.mark.parametrize("name", advisories.PATHS.values(), ids=advisories.PATHS.keys())
def test_names_that_are_paths(target: Target, name: str) -> None:
    assert target.refused(chat_body(name, "Hi")) == (404, "model_not_found", "model")
    for spelled in (name, name.replace("/", "%2f"), name.replace(".", "%2e")):
        assert target.send(target.head(f"GET /v1/models/{spelled}", key="mallory")).status == 404
    assert target.ask({"name": name, "insecure": True}, path="/api/pull").status == 404


# A request that came a byte now and then held its connection for minutes.
@pytest.mark.parametrize("every_s", [pytest.param(0.2, id="xinference-5213")])
def test_requests_that_never_arrive(target: Target, every_s: float) -> None:
    for raw in (b"GET /health HTTP/1.1\r\nX: ", target.post(b" " * 1000)[:-1000]):
        with closing(socket.create_connection(target.address, timeout=every_s)) as connection:
            connection.sendall(raw)
            began, received = time.monotonic(), b""
            while not received and time.monotonic() - began < 8:
                connection.sendall(b" ")
                try:
                    received = connection.recv(4096)
                except TimeoutError:
                    continue
            assert received.startswith(b"HTTP/1.1 408 ")


# Whatever stood for a method became a label of the metrics, for ever.
@pytest.mark.parametrize("count", [pytest.param(60, id="PYSEC-2026-4325")])
def test_methods_and_paths_are_no_labels(target: Target, count: int) -> None:
    def strange(number: int) -> None:
        for line in (f"M{number} /health", "PROPFIND /health", f"GET /{number}", f"PUT /v1/models/{number}"):
            target.send(target.head(line, key="mallory"))

    strange(0)
    series = target.figures().keys()
    for number in range(1, count):
        strange(number)
    assert target.figures().keys() == series


# The engine's own socket listened to every network, and unpickled what came.
@pytest.mark.parametrize("kind", [pytest.param("inet", id="CVE-2026-7301")])
def test_nothing_else_listens(target: Target, kind: str) -> None:
    found = [
        tuple(each.laddr)
        for pid in target.processes()
        for each in psutil.Process(pid).net_connections(kind)
        if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    ]
    assert found == [target.address]


# A picture's address in plain text, written as Markdown does, was fetched, whatever its size.
@pytest.mark.parametrize("form", [pytest.param("![picture]({url})", id="CVE-2026-0599")])
def test_addresses_in_a_text(target: Target, form: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/huge.png"
        answer = target.chat(f'{form.format(url=url)} <img src="{url}"> {url} What is it?', max_tokens=8)
        assert image_tokens(answer) == 0
        with pytest.raises(TimeoutError):
            listener.accept()


# Lists within lists, thousands deep, overran the stack of the parser, or of what came after it.
@pytest.mark.parametrize("depth", [pytest.param(3000, id="llama.cpp-27434")])
def test_nested_tools(target: Target, depth: int) -> None:
    text = json.dumps(chat_body(MODEL, "Hi", tools="@"))
    answer = target.send(target.post(text.replace('"@"', "[" * depth + "]" * depth).encode()))
    assert answer.status == 400


# Four prompts in a row that were too long for the context tripped a switch that ends the server.
@pytest.mark.parametrize("times", [pytest.param(5, id="llama.cpp-20513")])
def test_prompts_that_do_not_fit(target: Target, times: int) -> None:
    for _ in range(times):
        assert target.refused(chat_body(MODEL, "word " * 3000))[:2] == (400, "context_length_exceeded")
    # And one that fills it to the last token.
    usage = target.chat("x " * 990, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == 2048


@pytest.mark.parametrize(("stream", "until"), advisories.LEAVING.values(), ids=advisories.LEAVING.keys())
def test_clients_that_leave(target: Target, stream: bool, until: str) -> None:
    pictures = [noise_url(1000 * stream + 10 * len(until) + number, 384) for number in range(4)]
    body = json.dumps(chat_body(MODEL, "Tell me.", *pictures, stream=stream, **ENDLESS)).encode()
    before = target.figures()
    with closing(socket.create_connection(target.address, timeout=30)) as connection:
        connection.sendall(target.post(body))
        while target.figures()[until] == before[until]:
            time.sleep(0.01)
        connection.setblocking(False)
        with suppress(BlockingIOError):
            assert (stream and until == DRAWN) or b'"content":"' not in connection.recv(10_000)
    deadline = time.monotonic() + 3
    while (seen := target.figures()).get(CANCELLED, 0) != before.get(CANCELLED, 0) + 1 or target.is_busy(seen):
        assert time.monotonic() < deadline, "the engine still works for a client that has left"
        time.sleep(0.02)
    assert seen[DRAWN] - before[DRAWN] < ENDLESS["max_tokens"] * ENDLESS["n"] / 2


# The client named its request, and a name that another's began with ended that one, too.
@pytest.mark.parametrize("name", [pytest.param("a", id="CVE-2026-112266")])
def test_names_that_begin_alike(target: Target, name: str) -> None:
    assert target.refused(chat_body(MODEL, "Hi", rid=name)) == (400, "unsupported_parameter", "rid")
    body = chat_body(MODEL, "Tell me.", stream=True, max_tokens=900, ignore_eos=True)
    headers = {"Authorization": f"Bearer {target.keys['alice']}", "X-Request-Id": name + "bcdef012"}
    with httpx.stream("POST", target.server.url + CHAT, json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for other in (name, headers["X-Request-Id"]):
            with closing(socket.create_connection(target.address)) as connection:
                connection.sendall(target.post(json.dumps(body).encode(), f"X-Request-Id: {other}"))
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        data = [line for line in lines if line]
    assert '"finish_reason":"length"' in data[-2]
    assert data[-1] == "data: [DONE]"


@pytest.mark.parametrize("made", advisories.CHECKPOINTS.values(), ids=advisories.CHECKPOINTS.keys())
def test_checkpoints(
    tmp_path: Path, demo_checkpoint_folder: Path, start_server: Callable[..., Any], made: Checkpoint
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(demo_checkpoint_folder, folder)
    made.spoil(folder, canary)
    server = start_server(str(folder), **made.environment)
    if made.told is None:
        server.wait_for("/ready", 200)
        answer = httpx.post(server.url + CHAT, json=chat_body("model", "Hi", max_tokens=4), timeout=30)
        assert answer.status_code == 200
    else:
        assert server.process.wait(30) == 1
        assert made.told in server.stderr.splitlines()[-1]
    assert "Traceback" not in server.stderr
    assert not canary.exists()
