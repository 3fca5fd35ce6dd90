"""Hostile HTTP requests as bytes, the same for the same seed: broken HTTP, false names, strange JSON, absurd fields,
and honest requests with a few bytes, tokens or fields changed.

Knows the API's paths and fields. Knows no server: ``hostile.answers`` sends these and judges what comes back.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhg"
    "GAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True)
class HostileRequest:
    raw: bytes
    """What to send on a connection of its own."""
    kind: str
    """What was done to it, for counting."""
    answered: bool
    """Whether the server must answer once it has all of ``raw``; else it may wait for more and say 408, or nothing."""


def hostile_requests(
    seed: int, count: int, *, model: str = "fake", host: str = "localhost", key: str = ""
) -> Iterator[HostileRequest]:
    """``count`` requests about ``model``, for a server that goes by the name ``host``."""
    # No secrets are drawn here.
    rng = random.Random(seed)
    scene = Scene(rng, model, host, key)
    kinds = list(KINDS.items())
    for _ in range(count):
        kind, (make, answered) = rng.choice(kinds)
        yield HostileRequest(make(scene), kind, answered)


@dataclass(frozen=True)
class Scene:
    rng: random.Random
    model: str
    host: str
    key: str

    def body(self) -> dict[str, Any]:
        """A request that is answered with 200."""
        parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
        content = self.rng.choice(["Hi", parts])
        fields = {
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "n": 1,
            "stop": ["end"],
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "logit_bias": {"5": 1},
            "metadata": {"k": "v"},
            "user": "u",
        }
        kept = {name: value for name, value in fields.items() if name == "max_tokens" or self.rng.random() < 0.3}
        if "stream_options" in kept:
            kept["stream"] = True
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **kept}

    def post(self, body: bytes, *headers: str, line: str = f"POST {CHAT} HTTP/1.1", length: bool = True) -> bytes:
        own = ["Content-Type: application/json"] if not any(h.startswith("Content-Type") for h in headers) else []
        own += [f"Content-Length: {len(body)}"] if length else []
        return self.head(line, *own, *headers) + body

    def head(self, line: str, *headers: str, host: str | None = None) -> bytes:
        key = [f"Authorization: Bearer {self.key}"] if self.key else []
        lines = [line, f"Host: {self.host if host is None else host}", *key, *headers, "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace")

    def honest(self) -> bytes:
        return self.post(json.dumps(self.body()).encode())


def _honest(scene: Scene) -> bytes:
    rng = scene.rng
    return rng.choice(
        [scene.honest(), *(scene.head(f"{rng.choice(['GET', 'HEAD'])} {path} HTTP/1.1") for path in PATHS[:4])]
    )


# Fields

PATHS = [
    "/health",
    "/ready",
    "/v1/models",
    "/metrics",
    "/",
    "/nope",
    "/v1/models/x",
    CHAT,
    "//v1/models",
    "/v1/../metrics",
]
PATHS += [
    "/v1/models/%2e%2e%2f",
    "/%00",
    "/v1/models/%ff%fe",
    "/health/",
    "/openapi.json",
    "/docs",
    "/v1/models?" + "a=1&" * 50,
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PROPFIND", "M-SEARCH", "PURGE"]
NUMBERS = [
    "0",
    "-1",
    "-0",
    "-0.0",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "1e-400",
    "2.5",
    "true",
    "null",
    '"5"',
    "[]",
    "{}",
]
NUMBERS += [
    str(2**31),
    str(2**63),
    str(-(2**63) - 1),
    str(2**64),
    "9" * 400,
    "9" * 5000,
    "1" + "0" * 4299,
    "1E+2",
    "0.1e1",
]
STRINGS = [
    "",
    "\0",
    "\u202e",
    "\ufeff",
    "a\u0301" * 100,
    "👩\u200d🔬",
    "a\r\nb",
    "\x1b[2J",
    "../../etc/passwd",
    "'; DROP TABLE x;--",
]
STRINGS += [
    "http://169.254.169.254/",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "<image>",
    "</s>",
    "<|im_start|>system",
    "x" * 20_000,
]
RAW_STRINGS = ['"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x41"', '"a\nb"', '"\x00"', "'a'", '"']
FIELDS = ["model", "messages", "stream", "stream_options", "n", "max_completion_tokens", "max_tokens", "min_tokens"]
FIELDS += ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
FIELDS += ["logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "response_format"]
FIELDS += [
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "user",
    "metadata",
    "store",
    "service_tier",
    "modalities",
]
FIELDS += [
    "audio",
    "prediction",
    "reasoning",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    "best_of",
    "guided_json",
]
FIELDS += [
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "prompt_embeds",
    "cache_salt",
]
FIELDS += ["logits_processors", "__proto__", "__class__", "", "a" * 5000, "\u202e", "model\0"]


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice(STRINGS)
    if kind == 1:
        return rng.choice([0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308])
    if kind < 6:
        return rng.choice([None, True, False, "", "auto", 1])
    if kind == 6:
        return [_value(rng, depth + 1)] * rng.choice([0, 1, 2, 5] if depth else [0, 1, 2, 100])
    return {
        rng.choice([*FIELDS, "type", "role", "content", "url", "text"]): _value(rng, depth + 1) for _ in range(kind - 6)
    }


def _field(scene: Scene) -> bytes:
    body = scene.body()
    for _ in range(scene.rng.randint(1, 3)):
        body[scene.rng.choice(FIELDS)] = _value(scene.rng)
    return scene.post(json.dumps(body).encode())


def _number(scene: Scene) -> bytes:
    text = json.dumps(scene.body() | {scene.rng.choice(FIELDS[4:24]): "@"})
    return scene.post(text.replace('"@"', scene.rng.choice(NUMBERS)).encode())


def _message(scene: Scene) -> bytes:
    rng = scene.rng
    content = rng.choice([_value(rng), [_part(rng) for _ in range(rng.choice([0, 1, 3, 40]))], rng.choice(STRINGS)])
    role = rng.choice(["user", "system", "assistant", "developer", "tool", "function", "wizard", "", None])
    message = {"role": role, "content": content, rng.choice(["name", "tool_calls", "refusal", "x"]): _value(rng)}
    return scene.post(
        json.dumps(
            scene.body() | {"messages": [message] * (rng.choice([1, 2, 700]) if len(str(message)) < 1000 else 1)}
        ).encode()
    )


def _part(rng: random.Random) -> dict[str, Any]:
    url = rng.choice(
        [
            PICTURE,
            PICTURE[: rng.randrange(len(PICTURE))],
            "data:,",
            "data:;base64," + "=" * 500,
            "DATA:image/png;base64,AAAA",
            "http://127.0.0.1/x.png",
            "file:///etc/passwd",
            "//x",
            "data:image/svg+xml,<svg/>",
            "",
            "data:image/png;base64,!!!!",
        ]
    )
    return rng.choice(
        [
            {"type": "image_url", "image_url": {"url": url, "detail": rng.choice(["auto", "high", "most", None])}},
            {"type": "image_url", "image_url": url},
            {"type": "text", "text": rng.choice(STRINGS)},
            {"type": rng.choice(["file", "input_audio", "refusal", "video_url", ""]), "file": {"file_id": "x"}},
        ]
    )


# JSON


def _json(scene: Scene) -> bytes:
    rng = scene.rng
    text = json.dumps(scene.body())
    at = text.index(",") + 1
    raw = rng.choice(
        [
            *(text[:at] + f' "user": {string}, ' + text[at:] for string in RAW_STRINGS),
            text[:-1] + ', "user": "a", "user": "b"}',
            text[:-1] + ', "metadata": {"k": "1", "k": "2"}}',
            text[:-1] + ",}",
            text + text,
            text + "\0",
            "[" + text + "]",
            "/* */" + text,
            "",
            "null",
            '"' + "a" * 1000,
            text[: rng.randrange(len(text))],
            *(
                '{"audio":' + opening * depth + closing * depth + "}"
                for depth in (65, 2000)
                for opening, closing in DEEP
            ),
            '{"audio":' + "[" * 100_000,
            '{"a":[' + ",".join(["[]"] * 100_001) + "]}",
            "{" + ",".join(f'"k{index}":0' for index in range(5000)) + "}",
        ]
    )
    encoding = rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
    return scene.post(raw.encode(encoding, "replace"))


DEEP = [("[", "]"), ('{"a":', "}")]


# HTTP


def _target(scene: Scene) -> bytes:
    line = f"{scene.rng.choice(METHODS)} {scene.rng.choice(PATHS)} HTTP/1.1"
    return scene.head(
        line, f"{scene.rng.choice(['Range', 'Accept', 'Expect', 'TE'])}: {scene.rng.choice(['x', 'bytes=0-', '*/*'])}"
    )


def _host(scene: Scene) -> bytes:
    host = scene.rng.choice(
        [
            "evil.example",
            "",
            "a/?x=",
            "a#",
            "[",
            "localhost:99999",
            "localhost@evil.example",
            "\xff",
            "127.0.0.1.nip.io",
            "a b",
        ]
    )
    line = f"GET {scene.rng.choice(PATHS)} HTTP/1.1"
    if scene.rng.random() < 0.5:
        return scene.head(line, host=host)
    origin = scene.rng.choice(["null", "http://evil.example", f"http://{host}", "file://"])
    return scene.head(line, f"Origin: {origin}", "X-Forwarded-Host: localhost", "Forwarded: host=localhost")


def _broken_http(scene: Scene) -> bytes:
    rng = scene.rng
    body = json.dumps(scene.body()).encode()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    chunked = "Transfer-Encoding: chunked"
    return rng.choice(
        [
            scene.post(body, chunked),
            scene.post(body, f"Content-Length: {len(body) + 1}"),
            scene.post(chunks, chunked, chunked, length=False),
            scene.post(chunks, "Transfer-Encoding: gzip, chunked", length=False),
            scene.post(chunks.replace(b"\r\n", b"\n", 1), chunked, length=False),
            scene.post(b"-1\r\n\r\n", chunked, length=False),
            scene.post(b"1;" + b"a" * 300_000 + b"\r\nx\r\n0\r\n\r\n", chunked, length=False),
            scene.post(chunks, chunked, length=False, line=f"POST {CHAT} HTTP/1.0"),
            scene.head("GET /health HTTP/1.1", "X: a\r\n b"),
            scene.head("GET /health HTTP/1.1", "X : a"),
            scene.head("GET /health HTTP/1.1", "X: a\0"),
            scene.head("GET /health HTTP/3.0"),
            scene.head("GET http://evil.example/ HTTP/1.1"),
            scene.head("CONNECT evil.example:443 HTTP/1.1"),
            scene.head("GET  /health  HTTP/1.1"),
            scene.head("GET /health HTTP/1.1").replace(b"\r\n", b"\n"),
            scene.head(
                "GET /v1/models HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
            ),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),
            b"GET /health\r\n\r\n",
        ]
    )


def _large_head(scene: Scene) -> bytes:
    return scene.rng.choice(
        [
            scene.head("GET /health HTTP/1.1", "X: " + "a" * 200_000),
            scene.head("GET /health HTTP/1.1", *["X: a"] * 5000),
            scene.head(f"GET /{'a' * 65536} HTTP/1.1"),
            scene.head("GET /?" + "a=1&" * 10_000 + " HTTP/1.1"),
            scene.head("GET /health HTTP/1.1", *["X: a"] * 100),
        ]
    )


def _headers(scene: Scene) -> bytes:
    rng = scene.rng
    body = json.dumps(scene.body()).encode()
    kind = rng.choice(
        ["text/plain", "", "multipart/form-data", "application/json; charset=utf-16", "application/json;" * 50]
    )
    extra = [f"Content-Type: {kind}"] if rng.random() < 0.5 else []
    extra += [f"Content-Encoding: {rng.choice(['gzip', 'br', 'identity', ''])}"] if rng.random() < 0.5 else []
    extra += (
        [f"Authorization: {rng.choice(['', 'Bearer', 'Bearer ' + 'x' * 5000, 'Basic eDp5'])}"]
        if rng.random() < 0.3
        else []
    )
    extra += [f"X-Request-Id: {rng.choice(['a' * 500, 'x;y', '', 'good-1'])}"] if rng.random() < 0.5 else []
    return scene.post(body, *extra)


def _half(scene: Scene) -> bytes:
    whole = scene.honest()
    return whole[: scene.rng.randrange(1, len(whole))]


# Bytes


def _bytes(scene: Scene) -> bytes:
    rng = scene.rng
    raw = bytearray(scene.honest())
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(raw))
        match rng.randrange(4):
            case 0:
                raw[at] = rng.randrange(256)
            case 1:
                del raw[at : at + rng.randint(1, 8)]
            case 2:
                raw[at:at] = rng.choice(
                    [b"\0", b"\r\n", b"\n", b'"', b"{", b"}", b",", b"\xff", b"\xed\xa0\x80", b": "]
                )
            case 3:
                raw[at:at] = raw[rng.randrange(len(raw)) :][: rng.randint(1, 60)]
        if not raw:
            break
    return bytes(raw)


def _body_bytes(scene: Scene) -> bytes:
    """The same, with a length that fits: it reaches the JSON."""
    whole = _bytes(scene)
    body = whole.partition(b"\r\n\r\n")[2] or b"{}"
    return scene.post(body)


def _noise(scene: Scene) -> bytes:
    return scene.rng.randbytes(scene.rng.choice([1, 20, 500, 5000]))


KINDS: dict[str, tuple[Callable[[Scene], bytes], bool]] = {
    "honest": (_honest, True),
    "field": (_field, True),
    "number": (_number, True),
    "message": (_message, True),
    "json": (_json, True),
    "target": (_target, True),
    "host": (_host, True),
    "broken http": (_broken_http, True),
    "large head": (_large_head, True),
    "headers": (_headers, True),
    "body bytes": (_body_bytes, True),
    "half": (_half, False),
    "bytes": (_bytes, False),
    "noise": (_noise, False),
}
