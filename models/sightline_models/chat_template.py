"""Renders a chat template so that what the user wrote can be told from what the template wrote.

Knows Jinja, messages and text. Knows no token ids.

Every string of a message goes into the template between two marks, digits that are drawn anew for each rendering, so
that no user can write one. The template may strip, split, slice or compare such a string: its methods see the text
without the marks, and what they return is marked again. White space at the ends stands outside the marks, so that
stripping a longer string that holds a marked one works too. A mark also breaks every control token inside such a
string, so that none comes out whole and unmarked of a piece cut from a longer string. The template is also rendered
without marks: what comes out with the marks taken away has to be the same.
"""

import itertools
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_EXTRA_CHARACTERS = 1_000_000
"""How far a rendering may outgrow four times its input."""

VICUNA_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "{{ 'A chat between a curious human and an artificial intelligence assistant. '"
    " + 'The assistant gives helpful, detailed, and polite answers to the human\\'s questions. ' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER: ' }}{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for part in message.content if part.type == 'image' %}{{ image_token + '\\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The Vicuna v1.1 conversation of LLaVA-1.5, for checkpoints that ship no template: a system sentence, then
``USER: ...`` and ``ASSISTANT: ...`` in turn, a space after a question and the end-of-sequence token after an answer,
each picture as the image token and a line break before the text of its message."""


class TokenizerError(ValueError):
    """Text or a template that can't become tokens; the sentence says why and what would do."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    pass


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant."""
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered chat, written by the user or by the template."""

    text: str
    by_user: bool


class Template(Protocol):
    """A chat template, wherever it runs."""

    def render(self, messages: Sequence[Message]) -> tuple[Span, ...]:
        """The chat as text up to where the answer begins; raises TokenizerError where that can't be had."""


class TemplateMaker(Protocol):
    def __call__(
        self, source: str, special_tokens: Mapping[str, str], image_token: str, control_tokens: Collection[str]
    ) -> Template:
        """What ``ChatTemplate`` does. Raises TokenizerError for a template that can't be used."""


def output_limit(messages: Sequence[Message]) -> int:
    """Characters that a template may write for ``messages``."""
    return MAX_EXTRA_CHARACTERS + 4 * sum(
        len(part.text) for message in messages for part in message.parts if isinstance(part, TextPart)
    )


class ChatTemplate:
    """A compiled template with the special tokens it may name. It runs in this process: whoever serves strangers'
    templates has a process for them that can be ended.

    ``image_token`` is the text that stands for a picture, ``control_tokens`` are the texts of all added tokens.
    Raises TokenizerError for a template that is no Jinja, or that can't render the plainest question.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], image_token: str, control_tokens: Collection[str]
    ) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(
                f"The chat template can't be parsed: {error}. Give another one with --chat-template."
            ) from None
        except Exception as error:
            raise TokenizerError(
                f"The chat template can't be compiled ({type(error).__name__}). Give another one with --chat-template."
            ) from None
        self._variables = {"image_token": image_token, **special_tokens}
        self._image_token = image_token
        self._control_tokens = control_tokens
        # Some templates understand a list of parts, some only a string, and some take either by role.
        self._takes_parts = dict.fromkeys(_PROBES, True)
        self._writes_images = True
        for role in _PROBES:
            self._takes_parts[role] = self._understands_parts(role)
        self._writes_images = self._takes_parts["user"] and self._understands_images()
        self._refuse_useless()

    def render(self, messages: Sequence[Message], now: datetime | None = None) -> tuple[Span, ...]:
        """The chat as text up to where the answer begins, in spans of alternating authors.

        Raises TokenizerError, with the template's own words where it refuses the messages.
        """
        now = now or datetime.now()
        written = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
        limit = output_limit(messages)
        plain = self._run(self._arguments(messages, str), now, limit)
        marks = _Marks(self._control_tokens)
        spans = marks.spans(self._run(self._arguments(messages, marks.wrap), now, limit * 64))
        if spans is not None and "".join(span.text for span in spans) == plain:
            return spans
        # The template does something to the text that marks don't survive. That is no harm while the text has nothing
        # in it that could become a control token.
        if not any(_might_hold(text, token) for text in written for token in self._control_tokens):
            return (Span(plain, by_user=False),)
        if spans is not None:
            return spans
        raise TokenizerError(
            "A message holds text that looks like a control token of this model, and its chat template rewrites "
            "messages in a way that leaves no telling which it is. Take that text out of the message."
        )

    def _arguments(self, messages: Sequence[Message], wrap: Callable[[str], str]) -> list[dict[str, Any]]:
        return [{"role": message.role, "content": self._content(message, wrap)} for message in messages]

    def _content(self, message: Message, wrap: Callable[[str], str]) -> str | list[dict[str, str]]:
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        images = len(message.parts) - len(texts)
        if not self._takes_parts.get(message.role, True):
            text = wrap("\n".join(texts))
            return f"{self._image_token}\n" * images + text if images else text
        if self._writes_images:
            return [
                {"type": "text", "text": wrap(part.text)} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ]
        placeholders = [{"type": "text", "text": f"{self._image_token}\n"}] * images
        return placeholders + [{"type": "text", "text": wrap(text)} for text in texts]

    def _run(self, messages: list[dict[str, Any]], now: datetime, limit: int) -> str:
        chunks, length = [], 0
        try:
            for chunk in self._template.generate(
                **self._variables,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                strftime_now=now.strftime,
            ):
                chunks.append(chunk)
                length += len(chunk)
                if length > limit:
                    raise TokenizerError(f"The chat template writes more than {limit} characters for these messages.")
        except TokenizerError:
            raise
        except jinja2.TemplateError as error:
            raise TokenizerError(f"The chat template refuses these messages: {error}") from None
        except Exception as error:
            raise TokenizerError(f"The chat template fails on these messages ({type(error).__name__}).") from None
        return "".join(chunks)

    def _understands_parts(self, role: str) -> bool:
        shown = self._try(_PROBES[role])
        if shown is not None and _PROBE in shown and not _LEAKED_LIST.search(shown):
            return True
        self._takes_parts[role] = False
        shown = self._try(_PROBES[role])
        # Where neither works the template has something to say about it, which the real messages will bring out.
        return shown is None or _PROBE not in shown

    def _understands_images(self) -> bool:
        shown = self._try([Message("user", (ImagePart(), TextPart(_PROBE)))])
        return shown is not None and self._image_token in shown

    def _refuse_useless(self) -> None:
        question = _PROBES["user"]
        try:
            self.render(question)
        except TokenizerError as error:
            # Some templates want to be told who they are first.
            if self._try((_INSTRUCTION, *question)) is None:
                raise TokenizerError(
                    f"The chat template can't render a plain question. {error} Give another one with --chat-template."
                ) from None

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._run(self._arguments(messages, str), datetime.now(), MAX_EXTRA_CHARACTERS)
        except TokenizerError:
            return None


_PROBE = "What is this?"
_QUESTION = Message("user", (TextPart("Hello"),))
_INSTRUCTION = Message("system", (TextPart("Be brief."),))
_PROBES: Mapping[str, tuple[Message, ...]] = {
    "user": (Message("user", (TextPart(_PROBE),)),),
    "assistant": (_QUESTION, Message("assistant", (TextPart(_PROBE),)), _QUESTION),
    "system": (Message("system", (TextPart(_PROBE),)), _QUESTION),
}
# A list of parts written out as it stands, by a template that took it for a string.
_LEAKED_LIST = re.compile(r"""["']text["']: ?["']""" + re.escape(_PROBE))


def _might_hold(text: str, token: str) -> bool:
    """Whether ``text`` holds ``token``, or could make one together with its neighbours."""
    return (
        token in text
        or text in token
        or any(text.endswith(token[:cut]) or text.startswith(token[cut:]) for cut in range(1, len(token)))
    )


class _Marks:
    """The marks of one rendering: where a user's text opens, where it closes, and where a control token is broken."""

    _OPEN, _CLOSE, _BREAK = "012"

    def __init__(self, control_tokens: Collection[str]) -> None:
        self._control_tokens = control_tokens
        self._secret = f"{secrets.randbelow(10**30):030}"
        self._pattern = re.compile(self._secret + r"(\d{7})([012])")
        self._margins: list[tuple[str, str]] = []

    def wrap(self, text: str) -> str:
        """``text`` as a string whose characters carry the marks."""
        if not text:
            return ""
        core = text.strip()
        # Text of white space alone is all margin before an empty core.
        lead = text[: len(text) - len(text.lstrip())]
        trail = text[len(lead) + len(core) :]
        mark = f"{self._secret}{len(self._margins):07}"
        self._margins.append((lead, trail))
        inside = self._break_tokens(core, mark + self._BREAK)
        return _UserText(text, f"{lead}{mark}{self._OPEN}{inside}{mark}{self._CLOSE}{trail}", self)

    def _break_tokens(self, text: str, mark: str) -> str:
        held = [token for token in self._control_tokens if token in text]
        if not held:
            return text
        # Looking ahead finds tokens that overlap, too.
        starts = re.finditer("(?=" + "|".join(map(re.escape, held)) + ")", text)
        cuts = [0, *(start.start() + 1 for start in starts), len(text)]
        return mark.join(text[low:high] for low, high in itertools.pairwise(cuts))

    def spans(self, rendered: str) -> tuple[Span, ...] | None:
        """``rendered`` without its marks, or None where a mark has lost its partner."""
        made: list[Span] = []

        def add(text: str, by_user: bool) -> None:
            if made and text and made[-1].by_user == by_user:
                text = made.pop().text + text
            if text:
                made.append(Span(text, by_user))

        first, *rest = self._pattern.split(rendered)
        add(first, False)
        opened = None
        for number, kind, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            lead, trail = self._margins[int(number)]
            if kind == self._OPEN and opened is None:
                opened = number
                if made and not made[-1].by_user:
                    before = made.pop().text
                    cut = len(before) - _common(before[::-1], lead[::-1])
                    add(before[:cut], False)
                    add(before[cut:], True)
                add(text, True)
            elif kind == self._BREAK and opened is not None:
                add(text, True)
            elif kind == self._CLOSE and opened == number:
                opened = None
                cut = _common(text, trail)
                add(text[:cut], True)
                add(text[cut:], False)
            else:
                return None
        return None if opened is not None else tuple(made)


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


class _UserText(str):
    """User text inside a template: joined to other strings it carries its marks, asked for anything it shows none."""

    _plain: str
    _marks: _Marks

    def __new__(cls, plain: str, marked: str, marks: _Marks) -> "_UserText":
        made = super().__new__(cls, marked)
        made._plain = plain
        made._marks = marks
        return made

    def __hash__(self) -> int:
        return hash(self._plain)

    def __iter__(self) -> Iterator[str]:
        return map(self._marks.wrap, self._plain)


def _on_plain_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: _UserText, *arguments: Any, **named: Any) -> Any:
        return _wrapped(method(self._plain, *map(_plain, arguments), **named), self._marks)

    return call


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._plain if isinstance(value, _UserText) else value


def _wrapped(value: Any, marks: _Marks) -> Any:
    if isinstance(value, str):
        return marks.wrap(value)
    return type(value)(_wrapped(item, marks) for item in value) if isinstance(value, list | tuple) else value


_METHODS = (
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isprintable isspace istitle isupper ljust lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill "
    "__contains__ __eq__ __ge__ __getitem__ __gt__ __le__ __len__ __lt__ __ne__"
)
for _name in _METHODS.split():
    setattr(_UserText, _name, _on_plain_text(_name))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with repetition limited."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > 1_000_000:
                raise SecurityError("a chat template may not repeat a value that often")
        if operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise SecurityError("a chat template may not raise to so high a power")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model is trained on; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _make_environment() -> _Environment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


_ENVIRONMENT = _make_environment()
