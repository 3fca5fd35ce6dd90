"""Lines with choices become sentences."""

import random
import re

import pytest

from sightline_models.demo.strangers import STRANGERS
from sightline_models.demo.wordings import WORDINGS, Wordings, plainly, sentences


def test_a_line_becomes_a_sentence_for_each_choice() -> None:
    assert sentences("Count [the|all] {kind}[| here].") == [
        "Count the {kind}.", "Count the {kind} here.", "Count all {kind}.", "Count all {kind} here.",
    ]  # fmt: skip
    assert sentences("Hello") == ["Hello"]


def test_each_sentence_is_drawn_from_its_own_split() -> None:
    wordings = Wordings(("[a|b] c", "d[|e]"), ("f [g|h]",), ("i",))
    rng = random.Random("split")
    assert {wordings.draw(rng) for _ in range(100)} == {"a c", "b c", "d", "de"}
    assert {wordings.draw(rng, "held out") for _ in range(100)} == {"f g", "f h"}
    assert {wordings.draw(rng, "strangers") for _ in range(10)} == {"i"}
    assert wordings.plainest == "a c"


def test_strangers_are_asked_for_every_kind_and_trained_sentences_of_theirs_left_out() -> None:
    assert set(STRANGERS) == set(WORDINGS)
    for task, wordings in WORDINGS.items():
        trained = {plainly(text) for line in wordings.trained for text in sentences(line)}
        assert len(wordings.strangers) >= 2, task
        assert set(wordings.strangers) <= set(STRANGERS[task])
        assert not trained & {plainly(text) for text in wordings.strangers}, task


@pytest.mark.parametrize("task", WORDINGS)
def test_every_sentence_of_a_kind_names_what_it_asks_for(task: str) -> None:
    told = {
        frozenset(re.findall(r"\{(\w+)\}", text)) - {"image"}
        for line in (*WORDINGS[task].trained, *WORDINGS[task].held_out, *WORDINGS[task].strangers)
        for text in sentences(line)
    }
    optional = {"ink": {"what"}, "fu_count": {"kind"}, "exist": {"a", "bare"}, "cmp_which": {"a", "a_cap"}}.get(
        task, set()
    )
    assert len({names - optional for names in told}) == 1, told


@pytest.mark.parametrize("task", WORDINGS)
def test_sentences_are_written_cleanly(task: str) -> None:
    for line in (*WORDINGS[task].trained, *WORDINGS[task].held_out):
        for text in sentences(line):
            assert text == text.strip()
            assert "  " not in text
            assert not set("[]|") & set(text)
            assert not re.search(r" [.,?!:](?! ?\))", text) or text.endswith((" :)", "= ?")), text
