"""Tokens to text: stop strings never leak in part, log probabilities go with the text they belong to."""

from dataclasses import dataclass

import pytest
from fakes import FakeDetokenizer
from hypothesis import given
from hypothesis import strategies as st

from sightline_server.chat.deltas import ChoiceText, TextDelta
from sightline_server.engine.types import FinishReason, TokenEvent


@dataclass
class Outcome:
    deltas: list[TextDelta]
    read: int
    """Tokens taken before it ended."""

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for delta in self.deltas for event in delta.tokens]

    @property
    def finish(self) -> FinishReason | None:
        return self.deltas[-1].finish


def run(said: bytes, stop: tuple[str, ...] = (), **options: int | bool) -> Outcome:
    choice = ChoiceText(FakeDetokenizer(), stop=stop, **options)  # type: ignore[arg-type]
    deltas: list[TextDelta] = []
    for index, token_id in enumerate(said):
        deltas.append(choice.push(TokenEvent("r", token_id, -0.5)))
        if deltas[-1].finish:
            return Outcome(deltas, index + 1)
    return Outcome([*deltas, choice.end(FinishReason.LENGTH)], len(said))


def expected(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """By the definition: the text before the stop string that is complete first, in the order of characters."""
    for end in range(1, len(text) + 1):
        starts = [text.find(one, 0, end) for one in stop]
        if found := [start for start in starts if start >= 0]:
            return text[: min(found)], True
    return text, False


SMALL = st.text(alphabet="abé世", max_size=30)
STOPS = st.lists(st.text(alphabet="abé世", min_size=1, max_size=5), max_size=4).map(tuple)


@given(text=SMALL, stop=STOPS)
def test_the_text_is_what_stands_before_the_first_stop_string(text: str, stop: tuple[str, ...]) -> None:
    outcome = run(text.encode(), stop)
    wanted, stopped = expected(text, stop)
    assert outcome.text == wanted
    assert (outcome.finish is FinishReason.STOP) is stopped


@given(text=SMALL, stop=STOPS)
def test_nothing_is_shown_that_a_stop_string_takes_back(text: str, stop: tuple[str, ...]) -> None:
    outcome = run(text.encode(), stop)
    shown = ""
    for delta in outcome.deltas:
        shown += delta.text
        assert not any(one in shown for one in stop)
        assert outcome.text.startswith(shown)


@given(text=SMALL, stop=STOPS)
def test_text_comes_as_soon_as_no_stop_string_can_claim_it(text: str, stop: tuple[str, ...]) -> None:
    choice = ChoiceText(FakeDetokenizer(), stop=stop)
    said = shown = ""
    for character in text:
        for byte in character.encode():
            delta = choice.push(TokenEvent("r", byte))
            shown += delta.text
            if delta.finish:
                return
        said += character
        held = said[len(shown) :]
        assert not held or any(one.startswith(held) for one in stop)


@given(text=SMALL, stop=STOPS)
def test_log_probabilities_cover_the_shown_text_exactly(text: str, stop: tuple[str, ...]) -> None:
    outcome = run(text.encode(), stop, logprobs=True)
    assert bytes(outcome.tokens).decode() == outcome.text
    shown = b""
    for delta in outcome.deltas:
        shown += bytes(event.token_id for event in delta.tokens)
        assert len(shown) <= len(outcome.text.encode())


def test_a_stop_string_over_token_and_character_boundaries() -> None:
    outcome = run("über Straße und weiter".encode(), ("aße",))
    assert outcome.text == "über Str"
    assert outcome.read == len("über Straße".encode())


def test_the_earlier_of_two_stop_strings_that_end_together() -> None:
    assert run(b"xabcd", ("cd", "abcd")).text == "x"


def test_no_stop_before_min_tokens() -> None:
    assert run(b"a.b.c.d", (".",)).text == "a"
    assert run(b"a.b.c.d", (".",), min_tokens=3).text == "a.b"


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    outcome = run("né".encode()[:-1], logprobs=True)
    assert [delta.text for delta in outcome.deltas] == ["n", "", "�"]
    assert len(outcome.tokens) == 2


def test_hidden_tokens_keep_their_log_probabilities() -> None:
    choice = ChoiceText(FakeDetokenizer(), logprobs=True)
    assert choice.push(TokenEvent("r", 257, -0.5)).tokens == ()
    delta = choice.end(FinishReason.LENGTH)
    assert (delta.text, [event.token_id for event in delta.tokens]) == ("", [257])


def test_held_text_is_shown_when_the_engine_ends() -> None:
    outcome = run(b"ab", ("abc",))
    assert outcome.text == "ab"
    assert outcome.finish is FinishReason.LENGTH


@pytest.mark.parametrize("stop", [(), ("\x01" * 255 + "x", "\x01" * 256)])
def test_J12_a_long_text_stays_cheap(stop: tuple[str, ...]) -> None:
    assert run(b"\x01" * 255 + b"y" * 2000, stop).text == "\x01" * 255 + "y" * 2000
