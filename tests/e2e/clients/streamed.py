"""Answers that come in chunks: what the package's own accumulators rely on, and what a user sees while it comes."""

from collections import Counter

from common import DESCRIBE, IMAGE_TOKENS, MODEL, SCENE_TEXT, ask, client, picture

api = client()
create = api.chat.completions.create
scene = ask(DESCRIBE, picture())


def text_of(chunks, index=0) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


def chunks_keep_the_rules() -> None:
    chunks = list(
        create(model=MODEL, messages=scene, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert text_of(chunks).strip() == SCENE_TEXT
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *spoken, last = chunks
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert last.usage.prompt_tokens > IMAGE_TOKENS
    assert all(chunk.usage is None for chunk in spoken)
    roles = [choice.delta.role for chunk in spoken for choice in chunk.choices if choice.delta.role]
    assert roles == ["assistant"] and spoken[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in spoken for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]
    # It really comes in pieces.
    assert sum(bool(choice.delta.content) for chunk in spoken for choice in chunk.choices) > 1


def usage_comes_only_when_asked_for() -> None:
    chunks = list(create(model=MODEL, messages=scene, max_tokens=4, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def two_choices_begin_with_the_first() -> None:
    chunks = list(create(model=MODEL, messages=scene, n=2, temperature=1.5, seed=5, max_tokens=12, stream=True))
    seen = [choice.index for chunk in chunks for choice in chunk.choices]
    assert seen[0] == 0 and set(seen) == {0, 1}
    roles = Counter(choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role)
    ends = Counter(choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason)
    assert roles == ends == {0: 1, 1: 1}
    whole = create(model=MODEL, messages=scene, n=2, temperature=1.5, seed=5, max_tokens=12)
    assert [text_of(chunks, index) for index in (0, 1)] == [choice.message.content for choice in whole.choices]


def a_stop_string_never_shows_in_part() -> None:
    full = create(model=MODEL, messages=scene, temperature=0).choices[0].message.content
    for stop in ("ground: r", "e", full[-3:]):
        shown = text_of(create(model=MODEL, messages=scene, temperature=0, stop=stop, stream=True))
        assert shown == full.split(stop)[0], (stop, shown)
    # What only began like a stop string is shown after all.
    for near_miss in ("white backgammon", "blue squares"):
        assert text_of(create(model=MODEL, messages=scene, temperature=0, stop=near_miss, stream=True)) == full


def any_bytes_survive_the_chunks() -> None:
    # Hot sampling past the end token makes halves of characters, which must come out as in the whole answer.
    wild = {
        "model": MODEL,
        "messages": scene,
        "temperature": 2.0,
        "max_tokens": 60,
        "extra_body": {"ignore_eos": True},
    }
    for seed in (1, 2):
        whole = create(seed=seed, **wild).choices[0].message.content
        assert text_of(create(seed=seed, stream=True, **wild)) == whole


def log_probabilities_come_along() -> None:
    whole = create(model=MODEL, messages=scene, temperature=0, logprobs=True, top_logprobs=2)
    chunks = list(create(model=MODEL, messages=scene, temperature=0, logprobs=True, top_logprobs=2, stream=True))
    streamed = [
        entry.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    assert streamed == [entry.token for entry in whole.choices[0].logprobs.content]


def the_packages_accumulator_agrees() -> None:
    with api.chat.completions.stream(model=MODEL, messages=scene, temperature=0, n=2) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 1
    assert [choice.message.content.strip() for choice in final.choices] == [SCENE_TEXT] * 2


def leaving_early_hurts_nobody() -> None:
    for _ in range(3):
        stream = create(model=MODEL, messages=scene, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert create(model=MODEL, messages=scene, temperature=0).choices[0].message.content.strip() == SCENE_TEXT


for check in (
    chunks_keep_the_rules,
    usage_comes_only_when_asked_for,
    two_choices_begin_with_the_first,
    a_stop_string_never_shows_in_part,
    any_bytes_survive_the_chunks,
    log_probabilities_come_along,
    the_packages_accumulator_agrees,
    leaving_early_hurts_nobody,
):
    check()
    print("ok", check.__name__)
