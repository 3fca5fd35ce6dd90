"""Conversations become the tokens that transformers and the server make of the exported checkpoint's chat template."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor

from sightline_models.config import read_config
from sightline_models.demo import scenes, words
from sightline_models.demo.network import Shape
from sightline_models.demo.questions import PAIR_TASKS, TASKS, Asker, Conversation
from sightline_models.demo.text import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    PAD,
    SPECIAL,
    SYSTEM_PROMPTS,
    UNK,
    USER,
    Codec,
    to_json,
)
from sightline_models.tokenizer import ChatTokenizer, ImagePart, Message, TextPart

PICTURE = Image.new("RGB", (40, 30))
# Wide and low, and free of wear: as many scenes a second as can be.
QUICK = scenes.Look(sides=(48, 48), effects=False)

TURNS = {
    "one turn": (("What color is the circle?", "red"),),
    "two turns": (("How many objects are there?", "2"), ("List them.", "red circle, orange cross")),
    "three turns": (("Hi!", "Hello!"), ("Read the word.", "QUIZ"), ("4 + 12", "4+12=16")),
    "a box": (("Box of the star?", '{"label":"red star","bbox":[4,0,100,63]}'),),
    "text that nothing was trained on": (("naïve\n\n  Straße 你好 👍?", "  İ \t~"), ("", "x")),
}


def messages(conversation: Conversation, pictures: int, system: str) -> list[Message]:
    made = [Message("system", (TextPart(system),))] if system else []
    shown: tuple[ImagePart, ...] = (ImagePart(),) * pictures
    for question, answer in conversation.turns:
        made += [Message("user", (*shown, TextPart(question))), Message("assistant", (TextPart(answer),))]
        shown = ()
    return made


@pytest.fixture(scope="module")
def processor(small_checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(small_checkpoint)


@pytest.fixture(scope="module")
def chat_tokenizer(small_checkpoint: Path) -> ChatTokenizer:
    return ChatTokenizer.load(small_checkpoint, read_config(small_checkpoint))


def by_transformers(processor: Any, said: Sequence[Message], *, prompt: bool) -> list[int]:
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": PICTURE}
                for part in message.parts
            ],
        }
        for message in said
    ]
    ids = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt)
    return list(ids[0] if isinstance(ids[0], list) else ids)


def by_server(chat_tokenizer: ChatTokenizer, said: Sequence[Message], patches: int) -> list[int]:
    pictures = sum(isinstance(part, ImagePart) for message in said for part in message.parts)
    return list(chat_tokenizer.encode_chat(said, [patches] * pictures).token_ids)


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("system", ["", SYSTEM_PROMPTS[1]], ids=["no system prompt", "system prompt"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_conversation_has_the_tokens_of_the_chat_template(
    codec: Codec,
    processor: Any,
    chat_tokenizer: ChatTokenizer,
    small: Shape,
    pictures: int,
    system: str,
    turns: tuple[tuple[str, str], ...],
) -> None:
    conversation = Conversation("any", turns)
    segment = codec.segment(conversation)
    tokens = codec.prefix(pictures, small.patches, system) + segment.tokens
    said = messages(conversation, pictures, system)
    assert tokens == by_transformers(processor, said, prompt=False)
    asked = len(tokens) - len(codec.ids(turns[-1][1])) - 1
    assert tokens[:asked] == by_transformers(processor, said[:-1], prompt=True)
    assert tokens[:asked] == by_server(chat_tokenizer, said[:-1], small.patches)


def test_the_tokens_of_drawn_conversations_are_those_of_transformers_and_the_server(
    codec: Codec, processor: Any, chat_tokenizer: ChatTokenizer, small: Shape
) -> None:
    rng = random.Random("tokens")
    askers = (Asker(sloppy=0.5), Asker("held out"))
    kinds = set()
    for kind in scenes.KINDS * 2:
        scene, other = (scenes.draw(rng, QUICK, kind)[1] for _ in range(2))
        asker = askers[len(kinds) % 2]
        drawn = [(1, asker.ask(rng, task, scene)) for task in TASKS[kind]] + [(0, asker.chat(rng))]
        drawn += [(2, asker.compare(rng, task, scene, other)) for task in PAIR_TASKS if kind == "shapes"]
        for pictures, conversation in drawn:
            if conversation is None:
                continue
            said = messages(conversation, pictures, "")
            segment = codec.segment(conversation)
            tokens = codec.prefix(pictures, small.patches) + segment.tokens
            assert tokens == by_transformers(processor, said, prompt=False), conversation
            told = segment.last.index(True) + len(tokens) - len(segment.tokens)
            assert tokens[:told] == by_server(chat_tokenizer, said[:-1], small.patches), conversation
            kinds.add(conversation.task)
    assert len(kinds) > 30


def test_the_answers_and_their_ends_are_what_is_predicted(codec: Codec) -> None:
    turns = TURNS["two turns"]
    segment = codec.segment(Conversation("fu_list", turns))
    assert len(segment.tokens) == len(segment.answer) == len(segment.last)
    told = [token for token, asked in zip(segment.tokens, segment.answer, strict=True) if asked]
    assert told == [*codec.ids(turns[0][1]), EOS, *codec.ids(turns[1][1]), EOS]
    last = [token for token, asked in zip(segment.tokens, segment.last, strict=True) if asked]
    assert last == [*codec.ids(turns[1][1]), EOS]


def test_special_tokens_have_the_ids_that_the_configuration_names(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert ids == [UNK, BOS, EOS, PAD, IMAGE] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 1408


def test_what_is_read_is_spelt_a_token_a_character_and_what_is_said_a_token_a_word(codec: Codec) -> None:
    for word in (*words.TRAINED, *words.HELD_OUT, *words.ITEMS, *words.HELD_OUT_ITEMS, "0123456789"):
        assert len(codec.ids(word)) == len(word), word
    names = [f" {name}" for name in (*scenes.COLORS, *scenes.SHAPES)]
    assert [name for name in names if len(codec.ids(name)) != 1] == []
    assert len({codec.ids(name)[0] for name in names}) == len(names)


@pytest.mark.parametrize(
    "text", ["red circle, 4+12=16", '[{"label":"red star","bbox":[0,1,99,100]}]', "è 你 👍\n\t ok"]
)
def test_text_comes_back_from_its_tokens(codec: Codec, text: str) -> None:
    assert codec.tokenizer.decode(codec.ids(text), skip_special_tokens=False) == text


def test_the_tokenizer_survives_its_file(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_str(to_json(tokenizer))
    text = "USER: How many red circles? ASSISTANT:12</s>"
    assert again.encode(text).ids == tokenizer.encode(text).ids
    assert again.encode(text).ids[0] == BOS


def test_turns_may_come_before_the_picture(codec: Codec) -> None:
    before = (("Hello", "Hello! Show me a picture and ask me about it."),)
    told = codec.tokenizer.decode(codec.prefix(1, 2, before=before), skip_special_tokens=False)
    asked, said = before[0]
    assert told == f"<s>{USER}{asked}{ASSISTANT}{said}</s>{USER}<image><image>\n"
