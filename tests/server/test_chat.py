"""``POST /v1/chat/completions`` through the true client: what goes to the engine, and what comes back."""

import json

import httpx
import pytest
from api_calls import CHAT, chat_body, events, http, openai_client
from fakes import BOS, CONTEXT_LENGTH, EOS, IMAGE, MODEL_NAME, FakeEngine, FakePool, fake_app, fake_image

from sightline_server.engine.types import Request


async def test_a_whole_answer() -> None:
    engine = FakeEngine("Grüße, 世界! 🎉")
    client = openai_client(fake_app(engine))
    answer = await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Grüße, 世界! 🎉"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL_NAME
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id
    prompt = f"{chr(0)}USER:Hi"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len("Grüße, 世界! 🎉".encode()) + 1, "the stop token counts"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == engine.cached_tokens


async def test_nulls_that_strict_clients_demand() -> None:
    async with http(fake_app()) as client:
        body = (await client.post(CHAT, json=chat_body())).json()
    choice = body["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"]["refusal"] is None
    assert "service_tier" not in body
    assert "error" not in body


async def test_a_stream_is_what_the_whole_answer_says() -> None:
    text = "Ein Mädchen \U0001f469‍\U0001f52c sagt: नमस्ते, مرحبا"
    client = openai_client(fake_app(FakeEngine(text)))
    stream = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices].count("assistant") == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1


async def test_the_order_of_chunks() -> None:
    async with http(fake_app(FakeEngine("abc"))) as client:
        answer = await client.post(CHAT, json=chat_body(stream=True, n=3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(choice["index"], choice["delta"].get("role")) for choice in choices[:3]] == [
        (0, "assistant"),
        (1, "assistant"),
        (2, "assistant"),
    ]
    assert all("role" not in choice["delta"] for choice in choices[3:])
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == "stop"
        assert own[-1]["delta"] == {}


async def test_usage_in_a_stream() -> None:
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, json=chat_body(stream=True, stream_options={"include_usage": True}))
    *chunks, last, _ = events(answer.text)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_the_accumulators_of_the_client_agree() -> None:
    client = openai_client(fake_app(FakeEngine(lambda request: f"choice {request.sampling.choice}")))
    async with client.chat.completions.stream(
        model="fake", n=2, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["choice 0", "choice 1"]
    assert final.choices[1].logprobs is not None
    assert final.choices[1].logprobs.content is not None
    assert len(final.choices[1].logprobs.content) == len("choice 1")


async def test_choices_share_the_prompt_and_the_seed() -> None:
    engine = FakeEngine("four")
    async with http(fake_app(engine)) as client:
        body = (await client.post(CHAT, json=chat_body(n=3, seed=-1))).json()
    assert [request.sampling.choice for request in engine.requests] == [0, 1, 2]
    assert {request.sampling.seed for request in engine.requests} == {2**64 - 1}
    assert [request.id.rpartition("-")[2] for request in engine.requests] == ["0", "1", "2"]
    assert {request.id.rpartition("-")[0] for request in engine.requests} == {body["id"]}
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt.token_ids)
    assert body["usage"]["completion_tokens"] == 3 * 5


async def test_what_the_engine_is_asked() -> None:
    engine = FakeEngine()
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 9,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"65": -100, "66": 2.5},
        "seed": 11,
        "stop_token_ids": [10],
        "logprobs": True,
        "top_logprobs": 3,
    }
    async with http(fake_app(engine)) as client:
        assert (await client.post(CHAT, json=chat_body(**fields))).status_code == 200
    sampling = engine.requests[0].sampling
    assert sampling.max_tokens == 7
    assert sampling.min_tokens == 2
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 9, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert sampling.logit_bias == {65: -100, 66: 2.5}
    assert sampling.seed == 11
    assert sampling.stop_token_ids == (EOS, 10)
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 3)


async def test_defaults_are_the_checkpoints() -> None:
    engine = FakeEngine()
    async with http(fake_app(engine)) as client:
        for extra in ({}, {"temperature": None, "max_tokens": None, "seed": None, "stop": None}):
            assert (await client.post(CHAT, json=chat_body(**extra))).status_code == 200
    for request in engine.requests:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
        assert sampling.max_tokens == CONTEXT_LENGTH - len(request.prompt.token_ids), "null fills the context"
        assert sampling.stop_token_ids == (EOS,)
    first, second = engine.requests
    assert first.sampling.seed != second.sampling.seed, "drawn anew where none was given"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_engine_too(stream: bool) -> None:
    engine = FakeEngine("abc" + "STOP" + "d" * 400)
    engine.overshoot = 2
    async with http(fake_app(engine)) as client:
        body = chat_body(stop=["STOP"], n=2, stream=stream, stream_options={"include_usage": True})
        answer = await client.post(CHAT, json=body)
    whole = events(answer.text)[-2] if stream else answer.json()
    assert whole["usage"]["completion_tokens"] == 2 * len("abcSTOP"), "not what the engine sampled on the way"
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == engine.cached_tokens
    assert sorted(engine.aborted) == sorted(request.id for request in engine.requests)
    assert "d" not in ("" if stream else whole["choices"][0]["message"]["content"])


async def test_ignore_eos_and_the_newer_name_of_max_tokens() -> None:
    engine = FakeEngine("ab")
    async with http(fake_app(engine)) as client:
        body = chat_body(ignore_eos=True, max_completion_tokens=9, max_tokens=4)
        answer = (await client.post(CHAT, json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "ababab"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 9


async def test_no_probability_mass_means_the_likeliest_token() -> None:
    engine = FakeEngine()
    async with http(fake_app(engine)) as client:
        assert (await client.post(CHAT, json=chat_body(top_p=0))).status_code == 200
    assert engine.requests[0].sampling.temperature == 0
    assert engine.requests[0].sampling.top_p > 0


async def test_log_probabilities() -> None:
    client = openai_client(fake_app(FakeEngine("é!")))
    answer = await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=20
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == "é!", "the true bytes"
    assert all(len(entry.top_logprobs) == 20 for entry in content)
    assert content[2].token == "!"


async def test_no_event_of_a_stream_is_too_long_for_clients() -> None:
    engine = FakeEngine("\x01" * 300)
    async with http(fake_app(engine)) as client:
        # Everything is held back for the stop string, then released at once.
        body = chat_body(stream=True, logprobs=True, top_logprobs=20, stop=["\x01" * 200 + "x"])
        answer = await client.post(CHAT, json=body)
    longest = max(len(line) for line in answer.text.encode().split(b"\n"))
    assert longest < 64 * 1024
    entries = [
        entry
        for chunk in events(answer.text)[:-1]
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(entries) == 300


async def test_pictures_stand_where_the_text_has_them() -> None:
    engine, pool = FakeEngine(), FakePool()
    engine.wants_pixels = True
    content = [fake_image("one"), {"type": "text", "text": "or"}, fake_image("two"), fake_image("one")]
    async with http(fake_app(engine, pool=pool)) as client:
        body = chat_body(messages=[{"role": "user", "content": content}])
        usage = (await client.post(CHAT, json=body)).json()["usage"]
    prompt = engine.requests[0].prompt
    assert [span.start for span in prompt.images] == [6, 12, 16]
    assert prompt.images[0].digest == prompt.images[2].digest != prompt.images[1].digest
    assert [pixels[0, 0, 0] for pixels in engine.pixels] == [ord("o"), ord("t"), ord("o")]
    assert list(prompt.token_ids) == [BOS, *b"USER:", *[IMAGE] * 4, *b"or", *[IMAGE] * 8]
    assert usage["prompt_tokens_details"]["image_tokens"] == 12


@pytest.mark.parametrize("spelling", ["object", "string", "detail"])
async def test_spellings_of_a_picture(spelling: str) -> None:
    engine = FakeEngine()
    part = fake_image()
    if spelling == "string":
        part["image_url"] = part["image_url"]["url"]
    if spelling == "detail":
        part["image_url"]["detail"] = "original"
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, json=chat_body(messages=[{"role": "user", "content": [part]}]))
    assert answer.status_code == 200
    assert len(engine.requests[0].prompt.images) == 1


async def test_a_developer_message_joins_the_system_message() -> None:
    engine = FakeEngine()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "...", "refusal": None},
        {"role": "user", "content": "Go on", "name": "ann"},
    ]
    async with http(fake_app(engine)) as client:
        assert (await client.post(CHAT, json=chat_body(messages=messages))).status_code == 200
        late = [*messages, {"role": "developer", "content": "Late."}]
        refused = await client.post(CHAT, json=chat_body(messages=late))
    text = bytes(engine.requests[0].prompt.token_ids[1:]).decode()
    assert text == "SYSTEM:Be brief.\n\nBe kind.USER:HiASSISTANT:HelloUSER:Go on"
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


async def test_fields_without_effect_are_accepted() -> None:
    fields = {
        "user": "ann",
        "safety_identifier": "x",
        "metadata": {"team": "a"},
        "store": False,
        "service_tier": "priority",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "parallel_tool_calls": False,
        "reasoning_effort": "high",
        "reasoning": {"effort": "high"},
        "verbosity": "low",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "web_search_options": None,
        "functions": None,
        "stream_options": None,
    }
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, json=chat_body(**fields))
        nothing = await client.post(CHAT, json=chat_body(**dict.fromkeys(fields)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["service_tier"] == "default"
    assert nothing.status_code == 200, nothing.text


async def test_text_that_looks_like_line_ends_stays_on_one_line() -> None:
    text = "a\u2028b\u2029c\x85d\re\nf"
    async with http(fake_app(FakeEngine(text))) as client:
        answer = await client.post(CHAT, json=chat_body(stream=True))
    lines = [line for line in answer.text.splitlines() if line]
    parsed = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in parsed) == text


async def test_an_engine_that_holds_less_than_the_checkpoint_allows() -> None:
    engine = FakeEngine()
    engine.become(max_model_len=40)
    async with http(fake_app(engine)) as client:
        await client.post(CHAT, json=chat_body())
        card = (await client.get("/v1/models/fake")).json()
    request: Request = engine.requests[0]
    assert request.sampling.max_tokens == 40 - len(request.prompt.token_ids)
    assert card["max_model_len"] == card["context_length"] == 40


async def test_a_request_id_is_the_clients_if_it_is_sane() -> None:
    async with http(fake_app()) as client:
        for given, kept in (("abc-1", True), ("a b", False), ("x" * 200, False)):
            answer = await client.post(CHAT, json=chat_body(), headers={"X-Request-Id": given})
            assert (answer.headers["x-request-id"] == given) is kept


async def test_a_body_as_clients_send_it() -> None:
    raw = b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, content=raw, headers={"Content-Type": "application/json; charset=utf-8"})
    assert isinstance(answer, httpx.Response)
    assert answer.status_code == 200
