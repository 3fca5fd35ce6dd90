"""What strangers did to other servers of this kind, by the advisory's name: fields, parts, raw requests, checkpoints.

Knows the API's fields, HTTP and a checkpoint's files. Judges nothing: tests/e2e/test_advisories.py sends these, and has
those attacks that take more than one value.
"""

import base64
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile.chats import chat_body
from hostile.target import CHAT, MODEL, Target

# Goes round far longer than anybody waits, and fills memory on the way.
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}"
VOCABULARY = 1408
"""The demo model's, so this is the first id that is none."""
_PICKLE = base64.b64encode(pickle.dumps({"callable": print, "args": ()})).decode()


@dataclass(frozen=True)
class Field:
    """Fields of a chat request, and how they are refused."""

    fields: dict[str, Any]
    param: str
    code: str = "unsupported_parameter"


def inside(**fields: Any) -> Field:
    """A field that reaches into the server."""
    return Field(fields, next(iter(fields)))


def out_of_range(param: str, **fields: Any) -> Field:
    return Field(fields, param, "invalid_value")


FIELDS: dict[str, tuple[Field, ...]] = {
    # A template that came with a request was rendered, for as long as it liked.
    "CVE-2025-61620": (inside(chat_template=ENDLESS),),
    # Arguments for the template were used before they were checked: the right ones held up the API process.
    "CVE-2025-62426": (inside(chat_template_kwargs={"tokenize": True, "return_tensors": "pt", "padding": 10**9}),),
    # Rendering had no bound on time, turns or output, and one thread for everybody.
    "CVE-2026-115911": (inside(chat_template="{{ 'x' * 999999999 }}"), inside(chat_template=ENDLESS, stream=True)),
    # A template inside the template's arguments got round the switch that forbids templates of requests.
    "CVE-2026-115918": (inside(chat_template_kwargs={"chat_template": ENDLESS}),),
    # A tensor of the client's was loaded: sparse, with indices outside of it, which wrote past the end.
    "CVE-2025-62164": (inside(prompt_embeds=[_PICKLE]),),
    # Embeddings instead of a prompt broke an assertion in the engine, which took the server down.
    "PYSEC-2026-2303": (inside(prompt_embeds=_PICKLE, messages=[{"role": "user", "content": ""}]),),
    # The number of frames to decode was the client's to choose.
    "CVE-2026-105758": (inside(media_io_kwargs={"video": {"max_frames": 10**9, "fps": 10**6}}),),
    # The client chose the decoder, and how long a list of frames that made before decoding.
    "CVE-2026-105760": (inside(media_io_kwargs={"video": {"video_backend": "glmga", "fps": 10**12}}),),
    # -1 frames meant all of them, past the limit.
    "CVE-2026-116179": (inside(media_io_kwargs={"video": {"num_frames": -1}}),),
    # A salt with a character that a cache behind the engine did not take killed the engine.
    "CVE-2026-105756": (inside(cache_salt="a/../b\0"), inside(cache_salt="s" * 100_000)),
    # The client chose from which revision the processor's code was imported.
    "CVE-2026-114053": (inside(mm_processor_kwargs={"code_revision": "evil", "trust_remote_code": True}),),
    # A logit processor came as a pickle and was unpickled.
    "CVE-2026-7304": (inside(custom_logit_processor=_PICKLE), inside(logits_processors=[_PICKLE])),
    # Parameters of a transfer between machines, incomplete, ended the engine.
    "CVE-2026-94622": (inside(kv_transfer_params={"do_remote_prefill": True}),),
    # The same with a size that nobody checked: memory for so many ranks.
    "CVE-2026-94626": (inside(kv_transfer_params={"do_remote_prefill": True, "tp_size": 10**9}),),
    # Ids above the output layer's width went through and overwrote other requests' logits.
    "CVE-2026-93840": (
        inside(allowed_token_ids=[VOCABULARY, 10**6]),
        Field({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "invalid_value"),
    ),
    # The same by words that must not come.
    "CVE-2026-93989": (inside(bad_words=["\U0010ffff", "a" * 100_000]),),
    # Stop tokens outside the vocabulary crashed the engine, or wrote outside the logits.
    "CVE-2026-116181": (
        out_of_range("stop_token_ids[0]", stop_token_ids=[VOCABULARY], min_tokens=1),
        out_of_range("stop_token_ids[1]", stop_token_ids=[5, 2**31 - 1], min_tokens=1),
        out_of_range("stop_token_ids[0]", stop_token_ids=[-1], min_tokens=1),
    ),
    # With no max_tokens nobody compared min_tokens with anything; the engine's input thread died, /health said 200.
    "CVE-2026-114051": (
        out_of_range("min_tokens", min_tokens=2**31, max_tokens=None),
        out_of_range("min_tokens", min_tokens=9, max_tokens=8),
    ),
    # More than 128 tokens to tell the probability of ended the engine.
    "PYSEC-2026-4350": (inside(logprob_token_ids=list(range(129))),),
    # So did as many likeliest tokens as a number wraps round at.
    "CVE-2026-116172": tuple(
        out_of_range("top_logprobs", logprobs=True, top_logprobs=many) for many in (129, 2**31, 2**32 + 5, 2**64, -1)
    ),
    # One request was copied n times before anybody asked how often.
    "CVE-2026-34756": tuple(out_of_range("n", n=many) for many in (17, 10**6, 10**9, 2**63)),
    # A negative number of tokens to throw away became an address outside the cache.
    "CVE-2026-21869": (inside(n_discard=-1), inside(n_discard=-(2**31))),
    # A parser of the client's for the answer could be made to free memory twice.
    "CVE-2026-107183": (inside(chat_parser='{"type": "tool-close"}'),),
}


def _text(text: str = "What is this?") -> dict[str, Any]:
    return {"type": "text", "text": text}


NO_PICTURES = (b"\x89PNG\r\n\x1a\n" + bytes(60), b"no picture at all", b"GIF89a" + b"\xff" * 40, b"\xff\xd8\xff\xe0")
"""What makes an image library tell in its error which object it could not read."""

PARTS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    # An embedding of a picture with negative indices wrote where it liked. The fix before had only hidden the feature.
    "CVE-2026-56340": ([_text(), {"type": "image_embeds", "image_embeds": _PICKLE}], "[1].type", "invalid_value"),
    # A data: URL of thousands of JPEG files, apart by commas, was decoded whole.
    "CVE-2026-5497": (
        [{"type": "image_url", "image_url": {"url": "data:video/jpeg;base64," + ",".join(["/9j/4AAQ"] * 5000)}}],
        "[0].image_url",
        "invalid_base64_image",
    ),
}
"""Parts of a message, the place that the refusal names, and its code."""

PLACEHOLDERS = {
    # Words that stand for a picture, in a message without one: the engine looked for the picture and died.
    "CVE-2026-44222": ("<|vision_start|><|image_pad|><|vision_end|><image><|image|>[IMG]", 0),
    # A question about such a word, with one picture, could not be asked at all.
    "transformers-47217": ("What is an <image> tag? <image>", 1),
}

PATHS = {
    # The digest of a layer to load was a path, and led out of the folder of layers: a file could be written anywhere.
    "CVE-2026-103663": "sha256:../../../../etc/passwd",
    # The same two years before.
    "CVE-2024-37032": "sha256-../../etc/ld.so.preload",
}

DRAWN = "sightline_generated_tokens_total"
LEAVING: dict[str, tuple[bool, str]] = {
    # Nobody asked whether the client was still there: its place was taken until the context was full.
    "llama.cpp-24496": (True, DRAWN),
    # The same for an answer that is sent whole.
    "xinference-5548": (False, DRAWN),
    # The same between a router and its engine, when the client left before the first token.
    "sglang-39461": (True, "sightline_images_decoded_total"),
}
"""Whether the client streams, and which figure has grown when it leaves."""

HI = json.dumps(chat_body(MODEL, "Hi")).encode()
_JSON = "Content-Type: application/json"


def _without_key(method_and_path: str, *hosts: str) -> tuple[tuple[Callable[[Target], bytes], int], ...]:
    """The same for each host, and once more with an honest one: no key, no answer."""
    length = f"Content-Length: {len(HI)}"
    sent = [(lambda target, host=host: target.head(method_and_path, _JSON, length, host=host) + HI) for host in hosts]
    honest = (lambda target: target.head(method_and_path, _JSON, length) + HI, 401)
    return (*((make, 400) for make in sent), honest)


RAW: dict[str, tuple[tuple[Callable[[Target], bytes], int], ...]] = {
    # The path that a key was asked for was put together with the Host; the path that was served was not.
    "CVE-2026-48746": _without_key(f"POST {CHAT}", "localhost/?", "localhost/?x=", "localhost?"),
    # So a gateway asked nobody for its administrator's key.
    "CVE-2026-49468": _without_key("GET /metrics", "localhost/health?", "localhost/health?x="),
    # The framework under both believed any Host.
    "CVE-2026-48710": _without_key("GET /v1/models", "localhost#", "localhost/health#", "a@localhost/"),
    # A page in a browser made its own name lead to the machine, and used the server as if it were its own.
    "CVE-2024-28224": (
        (lambda target: target.post(HI, host=f"rebound.example:{target.address[1]}"), 403),
        (lambda target: target.post(HI, f"Origin: http://rebound.example:{target.address[1]}"), 403),
        (lambda target: target.head("DELETE /v1/models/x", key="mallory", host="rebound.example"), 403),
    ),
    # One header of any length, or any number of them, was kept in memory.
    "CVE-2025-48956": (
        (lambda target: target.head("GET /health", "X: " + "a" * 200_000), 431),
        (lambda target: target.head("GET /health", *(f"X-{number}: a" for number in range(5000))), 431),
    ),
    # Each chunk of a body took room on the stack: three megabytes of the smallest chunks overran it.
    "CVE-2025-23310": (
        (
            lambda target: (
                target.head(f"POST {CHAT}", _JSON, "Transfer-Encoding: chunked", key="mallory")
                + b"".join(b"1\r\n%c\r\n" % byte for byte in HI.ljust(500_000))
                + b"0\r\n\r\n"
            ),
            400,
        ),
    ),
    # A payload of a size that nobody had thought of ended the server.
    "CVE-2025-33201": (
        (lambda target: target.head(f"POST {CHAT}", _JSON, f"Content-Length: {2**40}", key="mallory") + HI, 413),
        (lambda target: target.post(HI.ljust(70_000_000)), 413),
    ),
    # A number beyond its type, somewhere in a malformed request, wrapped round and crashed the server.
    "CVE-2026-24173": (
        (lambda target: target.head(f"POST {CHAT}", _JSON, f"Content-Length: {2**64 + 5}", key="mallory"), 400),
        (
            lambda target: (
                target.head(f"POST {CHAT}", _JSON, "Transfer-Encoding: chunked", key="mallory")
                + b"%x\r\n{}\r\n" % (2**64 + 2)
            ),
            400,
        ),
        (lambda target: target.post(HI[:-1] + b', "max_tokens": %d}' % (2**64 + 5)), 400),
        (lambda target: target.post(HI[:-1] + b', "seed": -%d}' % (2**63 + 1)), 400),
    ),
}
"""Requests and the status of each one's answer."""


@dataclass(frozen=True)
class Checkpoint:
    """A stranger's checkpoint, made of a good one."""

    spoil: Callable[[Path, Path], object]
    """Takes the folder, and a file that its code would make."""
    told: str | None
    """Words of the sentence that the start is refused with; None: it is served, and passes over what is wrong."""
    environment: dict[str, str] = field(default_factory=dict)


def _change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text("utf-8"))
    for name, value in values.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content), "utf-8")


def _with_code(canary: Path, folder: Path, **config: Any) -> None:
    for name in ("modeling_evil.py", "configuration_evil.py", "evil.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    _change(folder / "config.json", **config)


def _template_in_tokenizer(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    spell = "{% for c in ().__class__.__base__.__subclasses__() %}{% if 'wrap_close' in c.__name__ %}"
    spell += "{{ c.__init__.__globals__['system']('touch " + str(canary) + "') }}{% endif %}{% endfor %}"
    _change(folder / "tokenizer_config.json", chat_template=spell)


def _template_file(folder: Path, canary: Path) -> None:
    spell = "{{ lipsum.__globals__['os'].popen('touch " + str(canary) + "').read() }}"
    (folder / "chat_template.jinja").write_text(spell)


def _tensor_beyond_the_file(folder: Path, _: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    entry = header[last]
    start = entry["data_offsets"][0]
    size = (entry["data_offsets"][1] - start) * 1000
    entry["shape"][0] *= 1000
    entry["data_offsets"] = [start, start + size]
    made = json.dumps(header).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + data[end:])


CHECKPOINTS: dict[str, Checkpoint] = {
    # auto_map named a module of the checkpoint's own, which was imported, whatever the operator had allowed.
    "CVE-2026-22807": Checkpoint(
        lambda folder, canary: _with_code(canary, folder, auto_map={"AutoConfig": "configuration_evil.Config"}),
        "config.json: auto_map: ",
    ),
    # For parts of two models the operator's "no" was not asked.
    "CVE-2026-27893": Checkpoint(
        lambda folder, canary: _with_code(
            canary, folder, vision_config={"auto_map": {"AutoModel": "modeling_evil.Tower"}}
        ),
        "config.json: vision_config.auto_map: ",
    ),
    # An activation function was looked up as a path of Python's, behind an assert, of which -O leaves nothing.
    "CVE-2026-41523": Checkpoint(
        lambda folder, canary: _with_code(canary, folder, text_config={"hidden_act": "evil.Activation"}),
        "hidden_act",
        {"PYTHONOPTIMIZE": "1"},
    ),
    # config.json itself could say that its code is trusted.
    "CVE-2026-5241": Checkpoint(
        lambda folder, canary: _with_code(
            canary, folder, text_config={"trust_remote_code": True, "name_or_path": str(folder)}
        ),
        "config.json: text_config.trust_remote_code: ",
    ),
    # A field that was meant for the library alone named a place from which kernels are fetched, imported and run.
    "CVE-2026-4372": Checkpoint(
        lambda folder, canary: _with_code(
            canary,
            folder,
            _attn_implementation_internal=f"{folder}@main:evil",
            text_config={"_attn_implementation_internal": f"{folder}@main:evil"},
        ),
        None,
    ),
    # Code of a checkpoint was run always; there was no setting against it.
    "CVE-2026-46517": Checkpoint(
        lambda folder, canary: _with_code(
            canary, folder, architectures=["EvilModel"], auto_map={"AutoModelForCausalLM": "modeling_evil.EvilModel"}
        ),
        "never done",
    ),
    # The checkpoint's chat template was rendered without a sandbox: it ran commands.
    "CVE-2026-5760": Checkpoint(_template_file, "--chat-template"),
    # The same, from the file's metadata.
    "CVE-2024-34359": Checkpoint(_template_in_tokenizer, "--chat-template"),
    # A tensor said to be longer than its file was read to its end: what lay behind it in memory came out.
    "CVE-2026-7482": Checkpoint(_tensor_beyond_the_file, "model.safetensors"),
}
