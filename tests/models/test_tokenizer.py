"""Chats become the ids that transformers makes of them, as long as no user writes a control token; then, none do."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from text_checkpoints import KINDS, MORE_TOKENS, SPECIAL, write_text_checkpoint
from transformers import AutoProcessor

from sightline_models.config import read_config
from sightline_models.presets import demo_checkpoint
from sightline_models.text_encoder import _Origin
from sightline_models.tokenizer import ChatTokenizer, ImagePart, Message, TextPart, TokenizerError

IMAGE_TOKENS = 144
PICTURE = Image.new("RGB", (20, 20))
CONTROL = SPECIAL + [token.content for token in MORE_TOKENS]


class Checkpoint:
    """One tokenizer as we load it and as transformers does."""

    def __init__(self, folder: Path) -> None:
        self.ours = ChatTokenizer.load(folder, read_config(folder))
        self.theirs = AutoProcessor.from_pretrained(folder)

    def expected(self, messages: Sequence[Message]) -> list[int]:
        """The ids transformers makes, images expanded."""
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image", "image": PICTURE}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        ids = self.theirs.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
        return list(ids[0] if isinstance(ids[0], list) else ids)

    def made(self, messages: Sequence[Message]) -> list[int]:
        images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        return list(self.ours.encode_chat(messages, [IMAGE_TOKENS] * images).token_ids)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    @cache
    def load(kind: str) -> Checkpoint:
        if kind == "demo":
            return Checkpoint(demo_checkpoint())
        folder = tmp_path_factory.mktemp("text")
        write_text_checkpoint(folder, kind)
        return Checkpoint(folder)

    return load


def user(*parts: str | None) -> Message:
    """A question; None stands for a picture."""
    return Message("user", tuple(ImagePart() if part is None else TextPart(part) for part in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


CHATS: list[list[Message]] = [
    [user("What is in this picture?")],
    [user(None, "What is in this picture?")],
    [user("Before ", None, " after"), assistant("A cat."), user(None, None, "\n\n and now?  ")],
    [Message("system", (TextPart("  Be brief.\n"),)), user(" 你好世界 naïve 👨‍👩‍👧 \u202e x\u00a0")],
    [user(""), assistant(""), user("\n"), assistant("  "), user("\t a"), assistant("ok \n")],
    [user("zy"), assistant("ROL"), user("E"), assistant("<imag"), user("|> <0x41> ▁ ▁▁USER")],
]


@pytest.mark.parametrize("kind", ["demo", *KINDS])
def test_ids_equal_those_of_transformers(checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    both = checkpoint(kind)
    for chat in CHATS:
        assert both.made(chat) == both.expected(chat), chat


texts = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(" \n\t\u00a0▁<>|[]/:_0aeiHUé你👍\u200d\u0301"),
    ),
    max_size=30,
)
words = st.lists(st.sampled_from(["picture", " the", "  ", "\n", "What is", "USER", " 你好", "<", "s>", "."])).map(
    "".join
)
parts = st.one_of(texts.map(TextPart), words.map(TextPart), st.just(ImagePart()))
chats = st.lists(
    st.one_of(
        st.builds(Message, st.just("user"), st.lists(parts, min_size=1, max_size=3).map(tuple)),
        st.builds(Message, st.sampled_from(["system", "assistant"]), st.tuples(texts.map(TextPart))),
    ),
    min_size=1,
    max_size=3,
)


def joined(chat: Sequence[Message]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else "\x00" for message in chat for part in message.parts)


@pytest.mark.parametrize("kind", ["demo", *KINDS])
def test_ids_equal_those_of_transformers_for_any_text_without_control_tokens(
    checkpoint: Callable[[str], Checkpoint], kind: str
) -> None:
    both = checkpoint(kind)
    control = both.theirs.tokenizer.get_added_vocab()

    @settings(max_examples=60)
    @given(chats)
    def check(chat: list[Message]) -> None:
        assume(not any(token in joined(chat) for token in control))
        assert both.made(chat) == both.expected(chat)

    check()


hostile = st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from([" ", "\n", "x", "<", ">"]), texts)).map("".join)


@pytest.mark.parametrize("kind", ["demo", *KINDS])
def test_J14_no_text_of_a_user_makes_a_control_token(checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    both = checkpoint(kind)
    # A character that the vocabulary lacks is the unknown token, and controls nothing.
    control = set(both.theirs.tokenizer.get_added_vocab().values()) - {0}

    def written_by_template(ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in control]

    harmless = [user("a"), assistant("b"), user(None, "c")]
    expected = written_by_template(both.made(harmless))

    @settings(max_examples=60)
    @given(hostile, hostile, hostile, st.integers(0, 20))
    def check(first: str, second: str, third: str, cut: int) -> None:
        chat = [user(first[:cut], first[cut:]), assistant(second), user(None, third)]
        assert written_by_template(both.made(chat)) == expected
        assert written_by_template(both.ours.encode_text(first)) == []

    check()


# Unigram has no bytes to spell an unknown character with.
@pytest.mark.parametrize("kind", ["demo", *KINDS[:-1]])
def test_J14_control_tokens_in_text_read_back_as_text(checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    ours = checkpoint(kind).ours
    for text in [*CONTROL, "USER:", " ".join(CONTROL), "".join(CONTROL)]:
        detokenizer = ours.detokenizer()
        shown = "".join(map(detokenizer.push, ours.encode_text(text))) + detokenizer.flush()
        assert shown.lstrip(" ") == text, kind


def test_J14_tokens_are_not_forged_from_the_pieces_of_two_parts(checkpoint: Callable[[str], Checkpoint]) -> None:
    both = checkpoint("Llama")
    chat = [user("</", "s> <ima", "ge>"), assistant("<|end"), user("|>ROLE", ": zy", "x")]
    assert both.made(chat).count(2) == 1, "the template's own, after the assistant's message"
    assert not {4, *both.theirs.tokenizer.convert_tokens_to_ids(["<|end|>", "ROLE:", "zyx"])} & set(both.made(chat))


def test_a_template_keeps_its_own_tokens_whatever_stands_next_to_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% endfor %}ROLE:"
    write_text_checkpoint(tmp_path, "byte level", template=template)
    both = Checkpoint(tmp_path)
    ids = both.theirs.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "ROLE:"])
    for text in ["hi", " hi ", "|>", "<|end|>", "<|user|", "R", "\n\n", ""]:
        made = both.made([user(text)])
        assert [token_id for token_id in made if token_id in ids] == ids, text
        if "<" not in text:
            assert made == both.expected([user(text)]), text


def test_images_stand_where_the_template_puts_them(checkpoint: Callable[[str], Checkpoint]) -> None:
    ours = checkpoint("demo").ours
    chat = [user("a", None, "b", None), assistant("c"), user(None)]
    made = ours.encode_chat(chat, [3, 1, 5])
    assert len(made.image_starts) == 3
    for start, length in zip(made.image_starts, [3, 1, 5], strict=True):
        assert made.token_ids[start : start + length] == (4,) * length
        assert made.token_ids[start - 1] != 4 or start - 1 in made.image_starts
        assert made.token_ids[start + length] != 4
    assert made.token_ids.count(4) == 9


def test_an_image_the_template_does_not_place_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    write_text_checkpoint(tmp_path, "Llama")
    once = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}<image>"
    ours = ChatTokenizer.load(tmp_path, read_config(tmp_path), chat_template=once)
    assert ours.encode_chat([user(None, "x")], [2]).token_ids.count(4) == 2
    with pytest.raises(TokenizerError, match="1 image placeholders for 2 images"):
        ours.encode_chat([user(None, None, "x")], [2, 2])
    with pytest.raises(TokenizerError, match="1 image placeholders for 0 images"):
        ours.encode_chat([user("x")], [])


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {}),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {}),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {"add_bos_token": False}),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {"add_bos_token": True, "add_eos_token": True}),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {"bos_token": None}),
    ],
)
def test_the_text_begins_once(tmp_path: Path, template: str, settings: dict[str, Any]) -> None:
    write_text_checkpoint(tmp_path, "Llama", template=template, **settings)
    both = Checkpoint(tmp_path)
    chat = [user("hello world")]
    assert both.made(chat) == both.expected(chat)
    assert both.made(chat).count(1) <= 1


def test_J14_a_user_cannot_begin_the_text(tmp_path: Path) -> None:
    write_text_checkpoint(tmp_path, "Llama", template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    made = Checkpoint(tmp_path).made([user("<s>hello")])
    assert made[0] == 1
    assert made.count(1) == 1


def test_tokens_only_named_beside_the_vocabulary_are_added(tmp_path: Path) -> None:
    extra = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    write_text_checkpoint(tmp_path, "byte level")
    size = ChatTokenizer.load(tmp_path, read_config(tmp_path)).vocab_size
    template = "<|new|>{{ messages[0].content[0].text }}"
    write_text_checkpoint(
        tmp_path, "byte level", template=template, added_tokens_decoder={str(size): {**extra, "single_word": False}}
    )
    both = Checkpoint(tmp_path)
    assert both.made([user("hi")]) == both.expected([user("hi")])
    assert both.ours.is_special(size)
    assert both.made([user("<|new|>")]).count(size) == 1


@pytest.mark.parametrize("stride", [1, 5, 4096])
def test_normalized_tokens_are_found_where_the_template_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    # Such tokens are looked for in normalized text, whose offsets are not those of the text: here one character
    # becomes two, and two become one.
    monkeypatch.setattr(_Origin, "_STRIDE", stride)
    template = "{% for m in messages %}ROLE: {{ m.content[0].text }} ROLE:{% endfor %}"
    write_text_checkpoint(tmp_path, "legacy Llama", template=template)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"]["normalizers"].append({"type": "NFKC"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    both = Checkpoint(tmp_path)
    for text in ["ﬁne ① e\u0301\u0301 ", "hi", "㍿" * 9 + " é  "]:
        assert both.made([user(text)]) == both.expected([user(text)]), text
    role = both.theirs.tokenizer.convert_tokens_to_ids("ROLE:")
    assert both.made([user("x")]).count(role) == 2
    for text in ["ROLE:", "ﬁROLE: ROLE:①", "ＲＯＬＥ: ﬁ", "㍿ ROLE:" * 50, "ﬁ" * 70 + "ROLE:"]:
        assert both.made([user(text)]).count(role) == 2, text
