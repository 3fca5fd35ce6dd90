"""Every way to ask wrongly: 400 in OpenAI's shape, with the place, and nothing reaches the engine."""

import json
from contextlib import suppress
from typing import Any

import openai
import pytest
from api_calls import CHAT, chat_body, http, openai_client
from fakes import CONTEXT_LENGTH, VOCAB_SIZE, FakeEngine, FakePool, fake_app, fake_image
from hypothesis import given
from hypothesis import strategies as st

from sightline_server.errors import InvalidRequest
from sightline_server.protocol.chat import ChatRequest, parse_chat_request
from sightline_server.protocol.strict_json import MAX_DEPTH, parse_object


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


# Fields of the body, the param that is named, the code.
WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"model": None}, "model", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user", "content": "Hi"}] * 20_000}, "messages", "invalid_value"),
    (user([{"type": "text", "text": "Hi"}] * 20_000), "messages[0].content", "invalid_value"),
    ({"messages": None}, "messages", "invalid_value"),
    ({"messages": "Hi"}, "messages", "invalid_value"),
    ({"messages": [5]}, "messages[0]", "invalid_value"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_parameter"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    (user(None), "messages[0].content", "invalid_value"),
    (user([]), "messages[0].content", "invalid_value"),
    (user(5), "messages[0].content", "invalid_value"),
    (user([5]), "messages[0].content[0]", "invalid_value"),
    (user([{"text": "x"}]), "messages[0].content[0].type", "missing_required_parameter"),
    (user([{"type": "text"}]), "messages[0].content[0].text", "missing_required_parameter"),
    (user([{"type": "text", "text": 5}]), "messages[0].content[0].text", "invalid_value"),
    (user([{"type": "input_audio"}]), "messages[0].content[0].type", "invalid_value"),
    (user([{"type": "file", "file": {}}]), "messages[0].content[0].type", "invalid_value"),
    (user([{"type": "refusal", "refusal": "no"}]), "messages[0].content[0].type", "invalid_value"),
    (user([{"type": "image_url"}]), "messages[0].content[0].image_url", "missing_required_parameter"),
    (user([{"type": "image_url", "image_url": 5}]), "messages[0].content[0].image_url", "invalid_value"),
    (
        user([{"type": "image_url", "image_url": {"url": "data:,", "detail": "most"}}]),
        "messages[0].content[0].image_url.detail",
        "invalid_value",
    ),
    ({"temperature": "0.5"}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"top_k": -5}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"n": 1.0}, "n", "invalid_value"),
    ({"n": -1}, "n", "invalid_value"),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": 129, "stream": True}, "n", "invalid_value"),
    ({"n": 10**6}, "n", "invalid_value"),
    ({"n": 10**400}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 2**31}, "max_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 2**63}, "max_tokens", "invalid_value"),
    ({"max_tokens": CONTEXT_LENGTH}, "max_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": CONTEXT_LENGTH}, "max_completion_tokens", "context_length_exceeded"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
    ({"min_tokens": CONTEXT_LENGTH}, "min_tokens", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": [""] * 1000}, "stop", "invalid_value"),
    ({"stop": ["a"] * 1000}, "stop", "invalid_value"),
    ({"stop": "a" * 2**20}, "stop", "invalid_value"),
    ({"stop": ["a", 5]}, "stop[1]", "invalid_value"),
    ({"stop": "a" * 257}, "stop", "invalid_value"),
    ({"stop": {"a": 1}}, "stop", "invalid_value"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids[0]", "invalid_value"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1000000000": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(index): "x" for index in range(100_000)}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"abc": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {str(index): 0 for index in range(1025)}}, "logit_bias", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_value"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"metadata": {"k": 1}}, "metadata.k", "invalid_value"),
    ({"metadata": {"k": {"nested": "v"}}}, "metadata.k", "invalid_value"),
    ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65, "invalid_value"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
    ({"metadata": {str(index): "" for index in range(17)}}, "metadata", "invalid_value"),
    ({"service_tier": "best"}, "service_tier", "invalid_value"),
    ({"stream": 1}, "stream", "invalid_value"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": {"name": "f"}}, "function_call", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"moderation": {"model": "x"}}, "moderation", "unsupported_parameter"),
    ({"chat_template": "x"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": None}, "chat_template_kwargs", "unsupported_parameter"),
    ({"mm_processor_kwargs": None}, "mm_processor_kwargs", "unsupported_parameter"),
    ({"media_io_kwargs": {}}, "media_io_kwargs", "unsupported_parameter"),
    ({"prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
    ({"cache_salt": "x"}, "cache_salt", "unsupported_parameter"),
    ({"logits_processors": []}, "logits_processors", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"temprature": 1}, "temprature", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
async def test_J5_J6_J7_J8_J9_J10_J11_J12_J13_J15_J17_wrong_fields(
    fields: dict[str, Any], param: str | None, code: str
) -> None:
    engine = FakeEngine()
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, json=chat_body(**fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert len(error["message"]) < 500
    assert engine.requests == []


def test_every_field_that_is_checked_has_a_wrong_value_above() -> None:
    free = {"user", "safety_identifier", "audio", "prediction", "verbosity", "reasoning", "reasoning_effort"}
    free |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "ignore_eos"}
    tried = {name for fields, _, _ in WRONG for name in fields}
    assert set(ChatRequest.model_fields) - tried == free


def _raw(text: str) -> bytes:
    return json.dumps(chat_body()).encode()[:-1] + b"," + text.encode() + b"}"


BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b"\xff\xfe{}", None),
    (b'{"model": "\xc3"}', None),
    ('{"model": "fake"}'.encode("utf-16"), None),
    (_raw('"temperature": NaN'), "temperature"),
    (_raw('"temperature": -Infinity'), "temperature"),
    (_raw('"temperature": 1e999'), "temperature"),
    (_raw('"seed": ' + "9" * 5000), "seed"),
    (_raw('"user": "\\ud800"'), "user"),
    (_raw('"metadata": {"\\udfff": "x"}'), "metadata.?"),
    (_raw('"user": "a", "user": "b"'), "user"),
    (_raw('"metadata": {"k": "1", "k": "2"}'), "k"),
    (_raw('"audio": ' + '{"a":' * 70 + "1" + "}" * 70), None),
    (_raw('"audio": ' + "[" * 100_000 + "]" * 100_000), None),
    (_raw('"audio": {"a": [' + ",".join(["[]"] * 500_000) + "]}"), None),
]


@pytest.mark.parametrize(("body", "param"), BODIES, ids=range(len(BODIES)))
async def test_J1_J2_J3_J4_J5_bodies_that_are_no_json(body: bytes, param: str | None) -> None:
    engine = FakeEngine()
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.requests == []


def test_J2_the_depth_that_is_allowed() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert "a" in parse_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequest, match="deeper"):
        parse_object(nested(MAX_DEPTH + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(field=st.sampled_from(sorted(ChatRequest.model_fields)), value=JSON)
def test_J3_J5_J9_no_value_of_any_field_is_more_than_refused(field: str, value: Any) -> None:
    with suppress(InvalidRequest):
        parse_chat_request(parse_object(json.dumps(chat_body(**{field: value})).encode()))


@given(content=JSON)
def test_J9_no_content_is_more_than_refused(content: Any) -> None:
    with suppress(InvalidRequest):
        parse_chat_request(parse_object(json.dumps(chat_body(**user(content))).encode()))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_J1_a_content_type_that_pages_of_other_origins_may_send(kind: str) -> None:
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, content=json.dumps(chat_body()), headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_media_type"


async def test_J1_a_compressed_body() -> None:
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, json=chat_body(), headers={"Content-Encoding": "gzip"})
    assert answer.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o",
        "../../etc/passwd",
        "",
        "x" * 2**20,
        "a\r\nb",
        "FAKE",
        "http://x/y",
        "' OR 1=1;--",
        "fake\0",
        "fake ",
        "/",
    ],
)
async def test_J16_another_model(name: str) -> None:
    client = openai_client(fake_app())
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert len(caught.value.message) < 500


async def test_J7_a_prompt_that_is_too_long() -> None:
    client = openai_client(fake_app())
    for length in (CONTEXT_LENGTH, CONTEXT_LENGTH * 200):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x" * length}], stream=True
            )
        assert caught.value.code == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT_LENGTH} tokens. However, " in caught.value.message


async def test_J9_more_messages_than_tokens_are_not_even_rendered() -> None:
    async with http(fake_app()) as client:
        body = chat_body(messages=[{"role": "user", "content": ""}] * (CONTEXT_LENGTH + 1))
        answer = await client.post(CHAT, json=body)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert f"your {CONTEXT_LENGTH + 1} messages" in answer.json()["error"]["message"]


async def test_J7_both_numbers_are_told() -> None:
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, json=chat_body(max_tokens=CONTEXT_LENGTH))
        full = await client.post(CHAT, json=chat_body(**user("x" * (CONTEXT_LENGTH - len("_USER:")))))
    message = answer.json()["error"]["message"]
    assert (
        f"you requested {CONTEXT_LENGTH + 8} tokens (8 in the messages, {CONTEXT_LENGTH} in the completion)" in message
    )
    assert full.json()["error"]["code"] == "context_length_exceeded", "a full context leaves no room for an answer"


async def test_pictures_that_can_not_be_read() -> None:
    engine, pool = FakeEngine(), FakePool()
    parts = [fake_image(), {"type": "text", "text": "?"}, fake_image("bad")]
    remote = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    async with http(fake_app(engine, pool=pool)) as client:
        undecodable = await client.post(CHAT, json=chat_body(**user(parts)))
        fetched = await client.post(CHAT, json=chat_body(**user([remote, fake_image("bad")])))
    assert undecodable.status_code == fetched.status_code == 400
    assert undecodable.json()["error"]["code"] == "invalid_image"
    assert undecodable.json()["error"]["param"] == "messages[0].content[2].image_url"
    assert fetched.json()["error"]["code"] == "invalid_image_url"
    assert fetched.json()["error"]["param"] == "messages[0].content[0].image_url"
    assert engine.requests == []


async def test_limits_of_pictures() -> None:
    pool = FakePool()
    app = fake_app(pool=pool, max_images=2, max_image_mb=0.001, max_request_megapixels=1.0)
    async with http(app) as client:
        many = await client.post(CHAT, json=chat_body(**user([fake_image()] * 3)))
        assert pool.decoded_total == 0, "counted before any is decoded"
        large = await client.post(CHAT, json=chat_body(**user([fake_image("x" * 1100)])))
        together = await client.post(CHAT, json=chat_body(**user([fake_image("600x1000 a"), fake_image("600x1000 b")])))
    assert many.json()["error"]["code"] == "too_many_images"
    assert "3 images; at most 2" in many.json()["error"]["message"]
    assert large.json()["error"]["code"] == "image_file_too_large"
    assert together.json()["error"]["code"] == "image_too_large"
    assert "1.2 megapixels" in together.json()["error"]["message"]
    assert [answer.status_code for answer in (many, large, together)] == [400, 400, 400]


async def test_unknown_routes_and_methods() -> None:
    async with http(fake_app()) as client:
        for method, path, status, code in [
            ("GET", "/", 404, "not_found"),
            ("GET", "/docs", 404, "not_found"),
            ("POST", "/v1/responses", 404, "not_found"),
            ("GET", CHAT + "/", 404, "not_found"),
            ("GET", CHAT, 405, "method_not_allowed"),
            ("DELETE", "/v1/models", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
        ]:
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
            assert answer.headers["x-request-id"]


async def test_J6_more_choices_than_the_queue_holds_are_refused_for_good() -> None:
    """Never 503: no wait makes room for them, and clients would send them again and again."""
    engine = FakeEngine()
    async with http(fake_app(engine, max_queue=2)) as client:
        refused = await client.post(CHAT, json=chat_body(n=3))
        assert (await client.post(CHAT, json=chat_body(n=2))).status_code == 200
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    assert "at most 2 choices" in refused.json()["error"]["message"]
