"""Fuzzes what turns a body into a ChatRequest. Knows no HTTP.

    python tests/fuzz/fuzz_json.py CORPUS_FOLDER -max_total_time=300     with atheris installed, libFuzzer's options
    python tests/fuzz/fuzz_json.py FILE...                               runs the given inputs once, without it

What it found is kept in ``inputs/`` beside it, which ``test_fuzz_json.py`` runs.
"""

import json
import math
import sys
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline_server.errors import InvalidRequest

LONGEST_SENTENCE = 1000
PART = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    17,
    0.5,
    1e308,
    2**63,
    10**400,
    math.nan,
    math.inf,
    "",
    "a",
    "auto",
    "\ud800",
]
VALUES += ["\0", "text", "user", "tool", "é" * 300, [], {}, [PART], [[PART]], {"role": "user", "content": [PART]}]
VALUES += [
    ["a"] * 5,
    [1, None],
    {"5": 1},
    {"k": "v"},
    {"a" * 2000: {"b" * 2000: 1}},
    {"type": "text", "text": 5},
    [{}],
    PART,
]
HONEST = b'{"model":"fake","messages":[{"role":"user","content":"a"}]}'


def check(body: bytes) -> None:
    """Raises AssertionError when ``body`` is neither a request nor refused as every refusal must look."""
    from sightline_server.errors import InvalidRequest
    from sightline_server.protocol.chat import parse_chat_request
    from sightline_server.protocol.strict_json import parse_object

    try:
        data = parse_object(body)
        assert_agrees_with_json(body, data)
        request = parse_chat_request(data)
    except InvalidRequest as error:
        assert_well_said(error)
        return
    # What was accepted is text and finite numbers throughout, so that it can be sent on.
    request.model_dump_json()


def assert_well_said(error: "InvalidRequest") -> None:
    assert 0 < len(error.message) <= LONGEST_SENTENCE, f"{len(error.message)} characters"
    assert error.param is None or len(error.param) <= LONGEST_SENTENCE, f"{len(error.param)} characters"
    # It must be possible to send it.
    json.dumps(error.body(), ensure_ascii=False).encode()


def assert_agrees_with_json(body: bytes, data: dict[str, Any]) -> None:
    """What is accepted has one meaning: the same, also when it is written and read again."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    assert json.loads(text.encode().decode()) == data == json.loads(body.decode("utf-8-sig"))


def changed(tree: dict[str, Any], rng: Random) -> dict[str, Any]:
    """``tree`` with one value somewhere replaced, or one field more."""
    from sightline_server.protocol.chat import NEVER, NOT_BUILT, ChatRequest

    names = [
        *ChatRequest.model_fields,
        *NEVER,
        *NOT_BUILT,
        "type",
        "text",
        "role",
        "content",
        "image_url",
        "url",
        "detail",
    ]
    value = deepcopy(rng.choice(VALUES))
    place: Any = tree
    while True:
        if isinstance(place, dict):
            key: Any = rng.choice([*place] * 3 + [rng.choice(names)])
        else:
            key = rng.randrange(len(place))
        inner = place[key] if isinstance(place, list) else place.get(key)
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            place[key] = value
            return tree
        place = inner


def main(arguments: list[str]) -> None:
    files = [Path(argument) for argument in arguments[1:] if Path(argument).is_file()]
    if files:
        for file in files:
            check(file.read_bytes())
        print(f"{len(files)} inputs, nothing found.")
        return
    import atheris

    with atheris.instrument_imports(include=["sightline_server.protocol", "json"]):
        import sightline_server.protocol.chat  # noqa: F401 - instrumented as it is imported

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Every other time as bytes, else as JSON, which changes of bytes would seldom leave whole."""
        rng = Random(seed)
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            tree = json.loads(HONEST)
        if rng.random() < 0.5 or not isinstance(tree, dict):
            return bytes(atheris.Mutate(data, max_size))
        return json.dumps(changed(tree, rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")[
            :max_size
        ]

    atheris.Setup(arguments, check, custom_mutator=lambda data, size, seed: mutate(bytes(data), size, seed))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
