"""Ids become text again, a token at a time, and nothing is shown that is not whole."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_checkpoints import KINDS, tokenizer_json, write_text_checkpoint
from tokenizers import Tokenizer

from sightline_models.config import CheckpointError, read_config
from sightline_models.tokenizer import ChatTokenizer, TokenizerError

SAMPLES = [
    "A red circle and a blue square.",
    " leading and trailing ",
    "  two\n\n\tlines\r\n",
    "naïve café, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "你好世界，日本語、한국어",
    "👍🏽 👨‍👩‍👧 🏳️‍🌈 é e\u0301 \u202e",
    "▁ <0x41> Ġ",
    "",
]


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTokenizer, Tokenizer]:
    write_text_checkpoint(tmp_path, request.param)
    return ChatTokenizer.load(tmp_path, read_config(tmp_path)), Tokenizer.from_str(tokenizer_json(request.param))


def pieces(ours: ChatTokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = ours.detokenizer()
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def test_text_comes_back_as_decoding_all_at_once_gives_it(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    ours, theirs = both

    @settings(max_examples=80)
    @given(st.one_of(st.sampled_from(SAMPLES), st.text(st.characters(codec="utf-8"), max_size=20)))
    def check(text: str) -> None:
        ids = theirs.encode(text, add_special_tokens=False).ids
        shown = pieces(ours, ids)
        assert "".join(shown) == theirs.decode(ids, skip_special_tokens=True)
        assert "\ufffd" not in "".join(shown) or "\ufffd" in text

    check()


def test_any_tokens_that_make_whole_characters_come_back(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    ours, theirs = both
    size = theirs.get_vocab_size()

    @settings(max_examples=150)
    @given(st.lists(st.integers(0, size - 1), max_size=12))
    def check(ids: list[int]) -> None:
        whole = theirs.decode(ids, skip_special_tokens=True)
        shown = "".join(pieces(ours, ids))
        if "\ufffd" not in whole:
            assert shown == whole

    check()


def test_special_tokens_and_padding_show_nothing(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    ours, theirs = both
    size = theirs.get_vocab_size()
    assert ours.vocab_size == size
    hidden = [token.content for token in theirs.get_added_tokens_decoder().values() if token.special]
    for token_id in [*map(theirs.token_to_id, hidden), size, size + 63, 10**9, -1]:
        assert pieces(ours, [token_id]) == ["", ""]
    assert all(ours.is_special(theirs.token_to_id(token)) for token in hidden)
    assert not ours.is_special(theirs.token_to_id("ROLE:"))
    assert not ours.is_special(size)
    assert "".join(pieces(ours, [theirs.token_to_id("ROLE:")])) == "ROLE:"


def test_what_one_token_shows(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    ours, theirs = both
    ids = theirs.encode("the 你", add_special_tokens=False).ids
    assert b"".join(map(ours.token_bytes, ids)).decode().strip() == "the 你"
    assert ours.token_text(theirs.token_to_id("</s>")) == "</s>"
    assert ours.token_bytes(theirs.get_vocab_size()) == b""
    assert ours.token_text(-5) == ""


def test_a_long_answer_costs_no_more_a_token_than_a_short_one(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    ours, theirs = both
    ids = theirs.encode("the quick brown 你好 fox ", add_special_tokens=False).ids * 2000
    detokenizer = ours.detokenizer()
    started = time.process_time()
    for token_id in ids:
        detokenizer.push(token_id)
    assert (time.process_time() - started) / len(ids) < 50e-6


@pytest.mark.parametrize("kind", ["byte level", "Llama"])
def test_an_unfinished_character_is_not_shown(tmp_path: Path, kind: str) -> None:
    write_text_checkpoint(tmp_path, kind)
    ours = ChatTokenizer.load(tmp_path, read_config(tmp_path))
    ids = ours.encode_text("🜚")
    shown = pieces(ours, ids)
    assert shown[-2:] == ["🜚", ""]
    assert "".join(shown).strip() == "🜚"
    assert len(ids) >= 4
    for count in range(1, len(ids)):
        assert "".join(pieces(ours, ids[:count])).strip() == ""
    # What can't become a character any more is shown as such, once something else follows.
    assert "".join(pieces(ours, [*ids[:-1], *ours.encode_text("a")])).replace(" ", "") == "\ufffda"


def test_a_tokenizer_without_a_file_is_refused_with_the_fix(tmp_path: Path) -> None:
    write_text_checkpoint(tmp_path, "Llama")
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="save_pretrained"):
        ChatTokenizer.load(tmp_path, read_config(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        ChatTokenizer.load(tmp_path, read_config(tmp_path))


def test_half_a_surrogate_pair_is_refused(both: tuple[ChatTokenizer, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        both[0].encode_text("a\ud83d")


def edited(tmp_path: Path, **changes: Any) -> ChatTokenizer:
    write_text_checkpoint(tmp_path, "Llama")
    spec = json.loads(tokenizer_json("Llama")) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return ChatTokenizer.load(tmp_path, read_config(tmp_path))


def test_tokenizer_files_we_cannot_use_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="WordPiece"):
        edited(tmp_path, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        edited(tmp_path, pre_tokenizer={"type": "Unknown"})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        edited(tmp_path, model={})
    with pytest.raises(TokenizerError, match="image token 4"):
        edited(tmp_path, added_tokens=[])
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json must hold a JSON object"):
        ChatTokenizer.load(tmp_path, read_config(tmp_path))
