"""Strange JSON over HTTP, a threat a test: what is refused names its place, what is accepted comes back as sent."""

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_calls import CHAT, chat_body, events, http
from fakes import CONTEXT_LENGTH, FakeEngine, fake_app
from hypothesis import given
from hypothesis import strategies as st

from sightline_server import logs
from sightline_server.chat.deltas import ChoiceText
from sightline_server.engine.types import FinishReason, TokenEvent
from sightline_server.errors import InvalidRequest
from sightline_server.protocol.chat import MAX_STOP_CHARS, MAX_STOP_STRINGS, ChatRequest
from sightline_server.protocol.strict_json import parse_object
from sightline_server.routes.chat import PARSED_AT_ONCE
from sightline_server.settings import Settings

JSON_TYPE = {"Content-Type": "application/json"}


async def send(body: bytes | dict[str, Any], engine: FakeEngine | None = None, **settings: Any) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http(fake_app(engine, **settings)) as client:
        return await client.post(CHAT, content=raw, headers=JSON_TYPE)


async def refused(body: bytes | dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The error of a body that must be refused with 400 before the engine hears of it."""
    engine = FakeEngine()
    answer = await send(body, engine, **settings)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert engine.requests == []
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def raw(name: str, literal: str) -> bytes:
    return json.dumps(chat_body(**{name: "@"})).replace('"@"', literal).encode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
async def test_J1_bodies_in_other_encodings(encoding: str) -> None:
    assert (await refused(json.dumps(chat_body(user="é"), ensure_ascii=False).encode(encoding)))["message"]


async def test_J1_a_byte_order_mark_is_passed_over() -> None:
    assert (await send(json.dumps(chat_body()).encode("utf-8-sig"))).status_code == 200


@pytest.mark.parametrize("depth", [65, 100, 1000, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")], ids=["lists", "objects", "both"])
@pytest.mark.parametrize("place", ["audio", "messages", "logit_bias", "tools", "nobody"])
async def test_J2_depth(depth: int, brackets: tuple[str, str], place: str) -> None:
    await refused(raw(place, brackets[0] * depth + "1" + brackets[1] * depth))
    await refused(raw(place, brackets[0] * depth))


NUMBER_FIELDS = ["n", "max_completion_tokens", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"]
NUMBER_FIELDS += ["presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "top_logprobs"]
UNUSABLE = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-" + "9" * 401, "1e-400", "-2.5E-999"]
UNUSABLE += [str(2**63), str(-(2**63) - 1), '"1"', "true", "[1]", '{"a":1}']


@pytest.mark.parametrize("literal", UNUSABLE, ids=[literal[:12] for literal in UNUSABLE])
@pytest.mark.parametrize("name", NUMBER_FIELDS)
async def test_J3_J5_numbers_that_can_not_be_kept(name: str, literal: str) -> None:
    assert (await refused(raw(name, literal)))["param"] == name


@pytest.mark.parametrize("literal", UNUSABLE[:9], ids=[literal[:12] for literal in UNUSABLE[:9]])
async def test_J3_numbers_in_deeper_places(literal: str) -> None:
    assert (await refused(raw("logit_bias", f'{{"5": {literal}}}')))["param"] == "logit_bias.5"
    assert (await refused(raw("stop_token_ids", f"[1, {literal}]")))["param"] == "stop_token_ids[1]"
    assert (await refused(raw("audio", f'{{"a": [{literal}]}}')))["param"] == "audio.a[0]"


@pytest.mark.parametrize("name", NUMBER_FIELDS)
async def test_J3_minus_zero_is_zero(name: str) -> None:
    answers = [await send(raw(name, literal)) for literal in ("-0", "0")]
    assert answers[0].status_code == answers[1].status_code in (200, 400)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**399), 10**399))
def test_J3_every_other_number_is_kept_exactly(number: float) -> None:
    assert parse_object(json.dumps({"a": number}).encode()) == {"a": number}


EXACT = [
    "\0",
    "a\0b",
    "\u202eabc",
    "\ufeffabc",
    "👩\u200d🔬👨\u200d👩\u200d👧",
    "e" + "\u0301" * 100,
    "\r\n\t\v\f\x1b[2J",
]
EXACT += [
    "\x7f\x80\x85\u2028\u2029",
    "'\"\\/</script>",
    "data: {}\n\ndata: [DONE]\n\n",
    "\U0010ffff\ufffe\ufdd0",
    "नमस्ते مرحبا",
]


@pytest.mark.parametrize("text", EXACT, ids=range(len(EXACT)))
@pytest.mark.parametrize("ensure_ascii", [False, True])
async def test_J4_text_comes_back_as_it_was_sent(text: str, ensure_ascii: bool) -> None:
    engine = FakeEngine(lambda request: bytes(request.prompt.token_ids[len("_USER:") :]).decode())
    body = chat_body(messages=[{"role": "user", "content": text}], max_tokens=len(text.encode()))
    encoded = [json.dumps(body | {"stream": stream}, ensure_ascii=ensure_ascii).encode() for stream in (False, True)]
    whole = (await send(encoded[0], engine)).json()["choices"][0]["message"]["content"]
    streamed = events((await send(encoded[1], engine)).text)[:-1]
    assert whole == text
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == text


@pytest.mark.parametrize("text", ["\\ud800", "\\udc00", "\\udc00\\ud800", "a\\udbffb", "\\ud83d"])
async def test_J4_halves_of_pairs(text: str) -> None:
    for name, literal, param in [
        ("user", f'"{text}"', "user"),
        ("model", f'"{text}"', "model"),
        ("stop", f'["a", "{text}"]', "stop[1]"),
        ("messages", f'[{{"role": "user", "content": "{text}"}}]', "messages[0].content"),
        ("messages", f'[{{"role": "user", "content": "a", "{text}": 1}}]', "messages[0].?"),
    ]:
        found = (await refused(raw(name, literal)))["param"]
        assert found.startswith(param.rstrip("?")), found
        found.encode()


async def test_J4_a_million_combining_marks() -> None:
    marks = "a" + "\u0301" * 10**6
    assert (await refused(chat_body(messages=[{"role": "user", "content": marks}])))[
        "code"
    ] == "context_length_exceeded"
    assert (await send(chat_body(user=marks))).status_code == 200


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    logs.configure(Settings(log_format="json"), stream)
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])


async def test_J4_logs_hold_none_of_it(log_lines: io.StringIO) -> None:
    for text in EXACT:
        await send(chat_body(messages=[{"role": "user", "content": "secret" + text}], user="secret", secret=text))
        await send(chat_body(messages=[{"role": "user", "content": "secret" + text}], model="secret" + text))
    lines = log_lines.getvalue().splitlines()
    assert len(lines) == 2 * len(EXACT)
    assert all(json.loads(line)["outcome"] == "refused" for line in lines)
    assert "secret" not in log_lines.getvalue()


DUPLICATES = [
    ('{"model":"fake","model":"fake","messages":[]}', "model"),
    ('{"model":"fake","messages":[{"role":"user","role":"system","content":"a"}]}', "role"),
    ('{"model":"fake","messages":[],"mess\\u0061ges":[]}', "messages"),
    ('{"model":"fake","logit_bias":{"5":1,"5":-1}}', "5"),
    ('{"":1,"":2}', ""),
]


@pytest.mark.parametrize(("body", "param"), DUPLICATES)
async def test_J5_keys_that_stand_twice(body: str, param: str) -> None:
    error = await refused(body.encode())
    assert error["param"] == param
    assert "stands twice" in error["message"]


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"model", "messages"}))
async def test_J5_null_is_as_good_as_absent(name: str) -> None:
    assert (await send(chat_body(**{name: None}))).status_code == 200


@pytest.mark.parametrize("name", ["unknown", "__proto__", "Model", "model ", "", "a" * 5000, "mes\u200bsages"])
async def test_J5_unknown_fields(name: str) -> None:
    error = await refused(chat_body(**{name: 1}))
    assert error["code"] == "unsupported_parameter"
    assert len(error["message"]) < 200


async def test_J5_fifty_thousand_unknown_fields() -> None:
    error = await refused({**chat_body(), **{f"unknown{index}": 1 for index in range(50_000)}})
    assert (error["code"], error["param"]) == ("unsupported_parameter", "unknown0")


async def test_J6_choices_times_tokens_have_a_bound() -> None:
    """Each choice is a place in the queue and none is longer than the context, so the product is bounded by both."""
    engine = FakeEngine("x" * CONTEXT_LENGTH)
    body = chat_body(n=16)
    assert (await send(body, engine)).status_code == 200
    room = CONTEXT_LENGTH - len(engine.requests[0].prompt.token_ids)
    assert [request.sampling.max_tokens for request in engine.requests] == [room] * 16
    assert (await refused(chat_body(n=17)))["param"] == "n"
    assert (await refused(chat_body(n=128), max_choices=128, max_queue=100))["param"] == "n"
    assert (await refused(chat_body(n=2, best_of=2)))["param"] == "best_of"


async def test_J8_the_two_limits_of_tokens_together() -> None:
    for fields in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_completion_tokens": 4, "max_tokens": 400}):
        assert (await refused(chat_body(min_tokens=5, **fields)))["param"] == "min_tokens"
    for fields in (
        {"min_tokens": None, "max_tokens": None},
        {"min_tokens": 2, "max_tokens": None},
        {"min_tokens": None},
    ):
        assert (await send(chat_body(**fields))).status_code == 200


def user(**fields: Any) -> dict[str, Any]:
    return chat_body(messages=[{"role": "user", "content": "Hi", **fields}])


async def test_J9_messages_at_the_edge_of_sense() -> None:
    tool = {"role": "tool", "tool_call_id": "x", "content": "4"}
    for messages in ([], [{}], [None], [[]], "Hi", {}, [tool], [{"role": "user", "content": "a"}] * 100_000):
        await refused(chat_body(messages=messages))
    for body in (
        user(content=None),
        user(content=[]),
        user(content=[{}]),
        user(content=[None]),
        user(role="wizard"),
        user(role=None),
        user(role="function", name="f"),
    ):
        assert (await refused(body))["param"].startswith("messages[0]")
    for body in (
        user(name="n" * 10_000),
        user(content=""),
        chat_body(messages=[{"role": "system", "content": "Be brief."}]),
        user(content=[{"type": "text", "text": ""}] * 100),
    ):
        assert (await send(body)).status_code == 200


async def test_J10_penalties_at_their_bounds_are_heard() -> None:
    for fields in (
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 10},
        {"repetition_penalty": 5e-324, "temperature": 2, "top_p": 0, "top_k": -1, "seed": -(2**63)},
    ):
        assert (await send(chat_body(**fields))).status_code == 200
    for seed in (2**64, 2**63, -(2**64)):
        assert (await refused(chat_body(seed=seed)))["param"] == "seed"


async def test_J11_a_bias_for_every_token_there_may_be() -> None:
    assert (await send(chat_body(logit_bias={str(index): 1 for index in range(260)}))).status_code == 200
    for name in ("-1", "260", "1000000000", "abc", "", "1.0", " 1", "+1", "١", "9" * 300, "0x1"):
        assert (await refused(chat_body(logit_bias={name: 1})))["param"] == "logit_bias"
    began = time.perf_counter()
    await refused(chat_body(logit_bias={str(index): "x" for index in range(100_000)}))
    assert time.perf_counter() - began < 2, "counted before it is looked at"


def test_J12_stop_strings_cost_every_token_the_same() -> None:
    class Letters:
        def push(self, token_id: int) -> str:
            return "a"

        def flush(self) -> str:
            return ""

    # All that is said begins every stop string, and none is ever complete.
    stop = ["a" * (MAX_STOP_CHARS - 1) + letter for letter in "bcde"]
    assert len(stop) == MAX_STOP_STRINGS
    text = ChoiceText(Letters(), stop=stop)
    shown, seconds = 0, []
    for _ in range(8):
        began = time.process_time()
        for _ in range(500):
            shown += len(text.push(TokenEvent("r", 1)).text)
        seconds.append(time.process_time() - began)
    assert shown + len(text.end(FinishReason.LENGTH).text) == 4000
    assert min(seconds[4:]) < 4 * min(seconds[1:4]), f"seconds of 500 tokens each: {seconds}"
    assert min(seconds) < 0.25, "half a millisecond a token"


async def test_J12_stop_strings_are_no_patterns() -> None:
    answer = await send(chat_body(stop=["(a+)+$", ".*", "[", "\\"]), FakeEngine("aaaa.b"))
    assert answer.json()["choices"][0]["message"]["content"] == "aaaa.b"


async def test_J13_more_log_probabilities_than_are_kept() -> None:
    for number in (21, 10**6, -1, 2**63):
        assert (await refused(chat_body(logprobs=True, top_logprobs=number)))["param"] == "top_logprobs"
    assert (await send(chat_body(logprobs=True, top_logprobs=20))).status_code == 200


FAMILY = ["chat_template", "chat_template_kwargs", "chat_template_content_format", "mm_processor_kwargs"]
FAMILY += ["media_io_kwargs", "prompt_embeds", "cache_salt", "logits_processors"]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("value", [None, "", "{{ ''.__class__ }}", {}, {"a": 1}, [], ["os.system"], 0, False])
async def test_J15_what_reaches_into_the_server_does_not_exist(name: str, value: Any) -> None:
    error = await refused(chat_body(**{name: value}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


async def test_J17_metadata_at_its_limits() -> None:
    most = {f"{index:064}": "v" * 512 for index in range(16)}
    assert (await send(chat_body(metadata=most))).status_code == 200
    for metadata in (
        most | {"one": "more"},
        {"k" * 65: ""},
        {"k": "v" * 513},
        {"k": {}},
        {"k": ["v"]},
        {"k": None},
        [],
        "k",
    ):
        assert (await refused(chat_body(metadata=metadata)))["param"].startswith("metadata")
    began = time.perf_counter()
    await refused(chat_body(metadata={str(index): 5 for index in range(100_000)}))
    assert time.perf_counter() - began < 2, "counted before it is looked at"


async def test_J18_tools_without_number_and_measure() -> None:
    def tool(description: str) -> dict[str, Any]:
        function = {"name": "f", "description": description, "parameters": {"type": "object", "properties": {}}}
        return {"type": "function", "function": function}

    assert (await refused(chat_body(tools=[tool("")] * 1000)))["param"] == "tools"
    assert (await refused(chat_body(tools=[tool("x" * 2**20)] * 10)))["param"] == "tools"
    answer = await send(chat_body(tools=[tool("x" * 2**20)] * 10), max_body_mb=8)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_long_bodies_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def parse(body: bytes) -> ChatRequest:
        threads.append(threading.current_thread().name)
        raise InvalidRequest("No.")

    monkeypatch.setattr("sightline_server.routes.chat._parse", parse)
    await asyncio.gather(refused(b" " * PARSED_AT_ONCE), refused(b" " * (PARSED_AT_ONCE + 1)))
    assert [name.startswith("prompt") for name in sorted(threads)] == [False, True]
