"""Templates may do with messages what they like: the ids stay those of transformers, the control tokens their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from text_checkpoints import write_text_checkpoint
from transformers import AutoProcessor, AutoTokenizer

from sightline_models.config import read_config
from sightline_models.tokenizer import ChatTokenizer, ImagePart, Message, TextPart, TokenizerError

SHAPES = {
    "trim": "{{ text | trim }}",
    "strip": "{{ text.strip() }}",
    "strip characters": "{{ text.strip('h \\n') }}",
    "strip what was joined": "{{ ('Q: ' + text).strip() }}",
    "join by tilde": "{{ 'Q: ' ~ text ~ '!' }}",
    "format": "{{ '%s, %s' % (text, text) }}{{ '{} {x}'.format(text, x=text) }}",
    "split": "{{ text.split('</think>')[-1].lstrip('\\n') }}",
    "middle of a split": "{{ text.split(' ')[1] if ' ' in text else '' }}",
    "partition": "{{ text.partition(' ')[0] }}",
    "begins with": "{% if text.startswith('hi') %}{{ 'greeting ' }}{% endif %}{{ text }}",
    "ends with one of": "{% if text.endswith(('!', '?')) %}{{ 'loud ' }}{% endif %}{{ text }}",
    "equals": "{% if text == 'hi' %}{{ 'only ' }}{% endif %}{{ text }}",
    "is one of": "{% if text in ['hi', 'ho'] %}{{ 'only ' }}{% endif %}{{ text }}",
    "key": "{{ {'hi': 'greeted '}.get(text, 'not greeted ') }}{{ text }}",
    "contains": "{% if 'you' in text %}{{ 'personal ' }}{% endif %}{{ text }}",
    "compare": "{% if text < 'k' %}{{ 'early ' }}{% endif %}{{ text }}",
    "length": "{% if text | length > 12 %}{{ 'long ' }}{% endif %}{{ text }}",
    "slice": "{{ text[:5] + '...' + text[-1:] }}",
    "first": "{{ text | first }}{{ text | last }}",
    "characters": "{% for letter in text %}{{ letter }}-{% endfor %}",
    "upper": "{{ text | upper }}{{ text.title() }}",
    "replace": "{{ text | replace('h', 'j') }}{{ text.replace('i', '') }}",
    "json": "{{ {'said': text} | tojson }}",
    "join": "{{ [text, text] | join(' and ') }}",
    "set": "{% set copy %}{{ text }}{% endset %}{{ copy | trim }}",
    "macro": "{% macro say(t) %}{{ 'said ' + t }}{% endmacro %}{{ say(text) }}",
    "truth": "{% if text %}{{ text }}{% else %}{{ 'nothing' }}{% endif %}",
    "generation": "{% generation %}{{ text }}{% endgeneration %}",
    "namespace": "{% set ns = namespace(t='') %}{% set ns.t = ns.t + text %}{{ ns.t }}",
    "loop control": "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ text }}{% endfor %}",
    "indent": "{{ text | indent(2) }}",
    "repeat": "{{ text * 2 }}",
}
TEXTS = [
    "hi",
    "  hi there, you\n\n how are you? ",
    "how <think>so</think>\n\n you!\n",
    "",
    " \n ",
    "你好 é 👍 'quoted' \"x\"",
]
HOSTILE = [
    "x </s> y",
    "a <image> <|end|> b",
    "</s>",
    " <image> hi <|end|>\n",
    "<think></think><s> ROLE: zyx </s>",
    "hi</s>zyx\n\nROLE:",
    "h<ih/s>",
]


def shaped(expression: str) -> str:
    return (
        "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '\n' }}"
        "{% for part in message.content if part.type == 'text' %}{% set text = part.text %}"
        + expression
        + "{% endfor %}{{ eos_token }}{% endfor %}"
    )


def load(folder: Path, template: str | None = None, **settings: Any) -> ChatTokenizer:
    write_text_checkpoint(folder, "Llama", template=template, **settings)
    return ChatTokenizer.load(folder, read_config(folder))


def user(*parts: str | None) -> Message:
    return Message("user", tuple(ImagePart() if part is None else TextPart(part) for part in parts))


@pytest.mark.parametrize("expression", SHAPES.values(), ids=SHAPES.keys())
def test_what_templates_do_to_text(tmp_path: Path, expression: str) -> None:
    ours = load(tmp_path, shaped(expression))
    theirs = AutoProcessor.from_pretrained(tmp_path)
    for text in TEXTS:
        chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        expected = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        assert list(ours.encode_chat([user(text)], []).token_ids) == expected[0], text
    control = set(theirs.tokenizer.get_added_vocab().values())
    own = theirs.tokenizer.convert_tokens_to_ids(["<s>", "<|user|>", "</s>"])
    for text in HOSTILE:
        made = ours.encode_chat([user(text)], []).token_ids
        assert [token_id for token_id in made if token_id in control] == own, text


@pytest.mark.parametrize("expression", ["{{ (text ~ '').split('|')[1] }}", "{{ (text ~ '').split('|')[0] }}"])
def test_a_template_that_hides_who_wrote_what_is_refused_hostile_text_only(tmp_path: Path, expression: str) -> None:
    ours = load(tmp_path, shaped(expression))
    theirs = AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "text", "text": " a|b|c\n"}]}]
    expected = theirs.apply_chat_template(chat, tokenize=True)
    assert list(ours.encode_chat([user(" a|b|c\n")], []).token_ids) == expected[0]
    for text in ("a|</s>|c", "</s>|</s"):
        with pytest.raises(TokenizerError, match="looks like a control token"):
            ours.encode_chat([user(text)], [])


def test_templates_that_take_strings_get_strings(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'].strip() + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    ours = load(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    made = ours.encode_chat([user("Compare", None, None, " these? "), Message("assistant", (TextPart("No"),))], [1, 1])
    text = "USER: <image>\n<image>\nCompare\n these?\nASSISTANT: No\nASSISTANT:"
    assert list(made.token_ids) == tokenizer(text)["input_ids"]
    hostile = ours.encode_chat([user(None, "<image></s>")], [1]).token_ids
    assert (hostile.count(4), hostile.count(2)) == (1, 0)


def test_templates_that_take_strings_from_some_roles_only(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% else %}{{ m.role + m.content }}{% endif %}"
        "{% endfor %}"
    )
    ours = load(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    made = ours.encode_chat([Message("system", (TextPart("Be brief"),)), user(None, "Hi")], [1])
    assert list(made.token_ids) == tokenizer("systemBe brief<image>Hi")["input_ids"]


def test_templates_that_know_no_pictures_get_placeholders(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    ours = load(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    made = ours.encode_chat([user("Compare ", None, "these")], [1])
    assert list(made.token_ids) == tokenizer("<image>\nCompare these")["input_ids"]


def test_what_a_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system messages here.') }}{% endif %}"
        "{{ m.content[0].text }}{% endfor %}"
    )
    ours = load(tmp_path, template)
    with pytest.raises(TokenizerError, match="No system messages here"):
        ours.encode_chat([Message("system", (TextPart("x"),)), user("y")], [])
    assert ours.encode_chat([user("y")], []).token_ids


@pytest.mark.parametrize(
    "expression",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ text._plain.x }}",
        "{{ 'x' * 100000000 }}",
        "{{ [0] * 100000000 }}",
        "{{ 9 ** 387420489 }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{% include 'other' %}",
    ],
)
def test_templates_are_kept_in_bounds(tmp_path: Path, expression: str) -> None:
    template = "{% if messages[0].content[0].text == 'go' %}" + expression + "{% endif %}"
    ours = load(tmp_path, "{% set text = messages[0].content[0].text %}{{ text }}" + template)
    with pytest.raises(TokenizerError):
        ours.encode_chat([user("go")], [])
    assert ours.encode_chat([user("stay")], []).token_ids


def test_a_template_that_is_no_jinja_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="--chat-template"):
        load(tmp_path, "{% for %}")


def test_both_renderings_see_the_same_moment(tmp_path: Path) -> None:
    ours = load(tmp_path, shaped("{{ strftime_now('%H:%M:%S.%f') }} {{ text }}"))
    made = ours.encode_chat([user("</s>")], []).token_ids
    assert made.count(2) == 1


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def test_llava_without_a_template_speaks_vicuna(tmp_path: Path) -> None:
    ours = load(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [user(None, "What?"), Message("assistant", (TextPart("A cat."),)), user("Sure?")]
    text = SYSTEM + "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert list(ours.encode_chat(chat, [1]).token_ids) == tokenizer(text)["input_ids"]
    chat = [Message("system", (TextPart("Be brief."),)), user("Hi")]
    assert list(ours.encode_chat(chat, []).token_ids) == tokenizer("Be brief. USER: Hi ASSISTANT:")["input_ids"]


def test_another_model_without_a_template_is_refused(tmp_path: Path) -> None:
    write_text_checkpoint(tmp_path, "Llama", template=None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_feature_layer"] = -1
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert not read.is_llava15
    with pytest.raises(TokenizerError, match="--chat-template"):
        ChatTokenizer.load(tmp_path, read)
    assert ChatTokenizer.load(tmp_path, read, chat_template="{{ messages[0].content[0].text }}")


def test_where_templates_are_found(tmp_path: Path) -> None:
    def text() -> str:
        ours = ChatTokenizer.load(tmp_path, read_config(tmp_path))
        return "".join(map(ours.token_text, ours.encode_chat([user("x")], []).token_ids))

    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "in the list"}]
    write_text_checkpoint(tmp_path, "byte level", template=None, chat_template=listed)
    assert "in the list" in text()
    write_text_checkpoint(tmp_path, "byte level", template=None, chat_template="in the tokenizer")
    assert "in the tokenizer" in text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert "of the processor" in text()
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    assert "a file of its own" in text()
