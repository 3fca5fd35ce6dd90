"""What the fuzzer found once, and what it began with, run without it; and its own oracle."""

import json
from pathlib import Path
from random import Random

import pytest
from fuzz import fuzz_json

from sightline_server.errors import InvalidRequest

INPUTS = sorted((Path(__file__).parent / "inputs").iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
def test_J3_J4_J5_J9_an_input_of_the_fuzzer(path: Path) -> None:
    fuzz_json.check(path.read_bytes())


def test_J5_J9_changed_requests() -> None:
    rng = Random(0)
    tree = json.loads(fuzz_json.HONEST)
    for _ in range(2000):
        tree = json.loads(fuzz_json.HONEST) if rng.random() < 0.2 else fuzz_json.changed(tree, rng)
        fuzz_json.check(json.dumps(tree).encode())


@pytest.mark.parametrize("message", ["", "x" * 2000, "\ud800"])
def test_the_oracle_sees_what_is_badly_said(message: str) -> None:
    with pytest.raises((AssertionError, UnicodeEncodeError)):
        fuzz_json.assert_well_said(InvalidRequest(message))


def test_the_oracle_sees_another_meaning() -> None:
    with pytest.raises(AssertionError):
        fuzz_json.assert_agrees_with_json(b'{"a":1}', {"a": 2})
