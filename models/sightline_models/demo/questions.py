"""What people ask about scenes, with the true answers.

Knows scenes and how questions are worded (`wordings.py`). Knows no pictures, no tokens and no torch.

A kind of question asks only what a person could answer at a glance: things are named so that the name fits one of
them, a thing on the border between left and middle isn't asked to be placed, and nearly equal sizes aren't compared.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sightline_models.demo import words
from sightline_models.demo.scenes import COLORS, SHAPES, Box, Scene, Thing, distinct
from sightline_models.demo.wordings import WORDINGS, Split

_SQUEEZE = 0.03
"""How far, as a share of the picture, a thing must be from the border between two answers to be asked about."""
_APART = 0.08
"""How far two centres must be from each other to be compared."""


@dataclass(frozen=True)
class Conversation:
    """Turns about one picture, two or none. An exam judges the last answer."""

    task: str
    turns: tuple[tuple[str, str], ...]
    """(question, answer)"""


HELLO = "Hello! Show me a picture and ask me about it."
HELLO_PICTURE = "Hello! Ask me about the picture."
THANKS = "You are welcome."
WHO = "I am a tiny demo model. I know shapes, colors and printed text."
HELP = "I can name, count and locate shapes, compare pictures, read short text and add numbers."
HOW = "I am fine, thank you."
NO_PICTURE = "There is no picture. Please attach one."
_SMALL_TALK = {"thanks": THANKS, "who": WHO, "help": HELP, "how": HOW}

_ABSENT = (
    "dog cat car house tree person man woman face book table chair bird fish boat plane flower phone cup hand sun moon "
    "horse cow road apple ball clock door heart arrow line hexagon oval cloud key shoe window bottle lamp hat"
)
_HELD_OUT_ABSENT = "train bus bicycle child lion bridge spoon banana cube pyramid snake"
ABSENT, HELD_OUT_ABSENT = _ABSENT.split(), _HELD_OUT_ABSENT.split()
"""Things that are never on a picture; people ask for them all the same."""

NINTHS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@dataclass(frozen=True)
class Asker:
    """Draws conversations about scenes, in one split of the wordings."""

    split: Split = "trained"
    """Of wordings and absent things: a model is trained on the first only."""
    plain: bool = False
    """The first wording of each kind only."""
    sloppy: float = 0.0
    """Share of questions typed without capital letters, without the last character, or with a slip in one word."""

    def ask(self, rng: random.Random, task: str, scene: Scene) -> Conversation | None:
        """A conversation of kind ``task`` about ``scene``, or None when the scene has nothing to ask about."""
        return _MAKERS[task](self, rng, scene)

    def compare(self, rng: random.Random, task: str, first: Scene, second: Scene) -> Conversation | None:
        """A conversation about two pictures of shapes, or None when they have nothing to ask about."""
        return _COMPARERS[task](self, rng, first, second)

    def chat(self, rng: random.Random) -> Conversation:
        """A conversation without a picture."""
        return _chat(self, rng)

    def word(self, rng: random.Random, task: str, **names: str) -> str:
        """A question of kind ``task``, with ``names`` for the words in braces."""
        wordings = WORDINGS[task]
        wording = wordings.plainest if self.plain else wordings.draw(rng, self.split)
        if not self.sloppy or rng.random() >= self.sloppy:
            return wording.format(**names)
        slip = rng.randrange(3)
        if slip == 0:
            return _slipped(rng, wording).format(**names)
        text = wording.format(**names)
        return text.lower() if slip == 1 else text.rstrip(".?!")


_PLAIN_WORD = re.compile(r"(?<![{\w])[a-z]{4,}(?![}\w])")


def _slipped(rng: random.Random, wording: str) -> str:
    """A wording with a letter of one word left out, or two exchanged."""
    found = list(_PLAIN_WORD.finditer(wording))
    if not found:
        return wording
    word = rng.choice(found)
    at = word.start() + rng.randrange(len(word[0]) - 1)
    wrong = wording[at + 1] + wording[at] if rng.random() < 0.5 else wording[at + 1]
    return wording[:at] + wrong + wording[at + 2 :]


def an(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


_IRREGULAR = {"man": "men", "woman": "women", "fish": "fish", "person": "people", "child": "children"}


def plural(name: str) -> str:
    return _IRREGULAR.get(name) or name + ("es" if name.endswith("ss") else "s")


def none_of(name: str) -> str:
    """The answer about something that isn't there."""
    return f"There is no {name}."


def percent(box: Box) -> list[int]:
    """A box in whole percent of width and height."""
    return [round(100 * value) for value in box]


def box_json(thing: Thing) -> str:
    return json.dumps({"label": thing.name, "bbox": percent(thing.box)}, separators=(",", ":"))


# ---- about shapes -------------------------------------------------------------------------------------------------


def _unique(things: Sequence[Thing]) -> list[Thing]:
    """The things whose colour and shape together name one thing only."""
    counts = Counter(thing.name for thing in things)
    return [thing for thing in things if counts[thing.name] == 1]


def _naming(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> str:
    """A name that fits this thing only: its shape or colour alone now and then, where that is enough."""
    names = [thing.name] * 2
    if sum(other.shape == thing.shape for other in things) == 1:
        names.append(thing.shape)
    if sum(other.color == thing.color for other in things) == 1:
        names.append(f"{thing.color} {rng.choice(('object', 'thing', 'shape'))}")
    return rng.choice(names)


def _absent_name(rng: random.Random, things: Sequence[Thing]) -> str | None:
    """A colour and shape that no thing has together, most often sharing one of them with a thing that is there."""
    here = {thing.name for thing in things}
    for _ in range(8):
        thing = rng.choice(things)
        throw = rng.random()
        color = thing.color if throw < 0.4 else rng.choice(list(COLORS))
        shape = thing.shape if 0.4 <= throw < 0.8 else rng.choice(SHAPES)
        if throw < 0.4 and len(things) > 1 and rng.random() < 0.5:
            shape = rng.choice(things).shape
        if f"{color} {shape}" not in here and not any(
            other.shape == shape and other.color != color and not distinct(other.color, color) for other in things
        ):
            return f"{color} {shape}"
    return None


def _bg(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    return Conversation("bg", ((asker.word(rng, "bg"), scene.background),))


def _color(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    shapes = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if shapes[thing.shape] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return Conversation("color", ((asker.word(rng, "color", a=thing.shape), thing.color),))


def _shape(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    colors = Counter(thing.color for thing in scene.things)
    single = [thing for thing in scene.things if colors[thing.color] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return Conversation("shape", ((asker.word(rng, "shape", a=thing.color), thing.shape),))


def _missing(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    """A question that takes for granted something that isn't on the picture."""
    task = rng.choice(("color", "where", "box", "shape"))
    if task == "shape":
        here = {thing.color for thing in scene.things} | {scene.background, scene.ink}
        absent = rng.choice(
            [color for color in COLORS if all(distinct(color, other) for other in here if other)] or [""]
        )
        if not absent:
            return None
        return Conversation("missing", ((asker.word(rng, task, a=absent), none_of(f"{absent} object")),))
    shapes = {thing.shape for thing in scene.things}
    others = [shape for shape in SHAPES if shape not in shapes]
    absent = rng.choice(others) if others and rng.random() < 0.6 else ""
    if not absent and task != "color" and scene.things:
        absent = _absent_name(rng, scene.things) or ""
    absent = absent or rng.choice(ABSENT if asker.split == "trained" else HELD_OUT_ABSENT)
    return Conversation("missing", ((asker.word(rng, task, a=absent), none_of(absent)),))


def _count(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    return Conversation("count", ((asker.word(rng, "count"), str(len(scene.things))),))


def _group(rng: random.Random, things: Sequence[Thing]) -> tuple[str, list[Thing]]:
    """Things to count, as people name them, and those that are meant."""
    throw = rng.random()
    thing = rng.choice(things) if things and rng.random() < 0.85 else None
    shape = thing.shape if thing else rng.choice(SHAPES)
    color = thing.color if thing else rng.choice(list(COLORS))
    if throw < 0.4:
        return plural(shape), [other for other in things if other.shape == shape]
    if throw < 0.75:
        noun = rng.choice(("objects", "shapes", "things"))
        return f"{color} {noun}", [other for other in things if other.color == color]
    return plural(f"{color} {shape}"), [other for other in things if other.name == f"{color} {shape}"]


def _countx(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    kind, meant = _group(rng, scene.things)
    return Conversation("countx", ((asker.word(rng, "countx", kind=kind), str(len(meant))),))


def place(thing: Thing) -> str | None:
    """The ninth of the picture a thing's centre is in, or None when it is close to a border between two."""
    x, y = thing.center
    if any(abs(value - border) < _SQUEEZE for value in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return NINTHS[min(int(y * 3), 2)][min(int(x * 3), 2)]


def _where(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    placed = [(thing, place(thing)) for thing in _unique(scene.things)]
    clear = [(thing, at) for thing, at in placed if at]
    if not clear:
        return None
    thing, at = rng.choice(clear)
    return Conversation("where", ((asker.word(rng, "where", a=_naming(rng, thing, scene.things)), at),))


def _leftmost(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    axis, sign, names = rng.choice(
        (
            (0, 1, ("leftmost", "on the far left", "furthest left")),
            (0, -1, ("rightmost", "on the far right", "furthest right")),
            (1, 1, ("topmost", "at the top", "highest")),
            (1, -1, ("bottommost", "at the bottom", "lowest")),
        )
    )
    order = sorted(scene.things, key=lambda thing: sign * thing.center[axis])
    if len(order) < 2 or abs(order[0].center[axis] - order[1].center[axis]) < _APART / 2:
        return None
    name = names[0] if asker.plain else rng.choice(names)
    wording = asker.word(rng, "leftmost", most=name)
    if " " in name and f"{name} " in wording:
        # "What is the furthest left object?" is said; "the at the top object" is not.
        wording = wording.replace(name, names[0])
    return Conversation("leftmost", ((wording, order[0].name),))


def _exist(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    if rng.random() < 0.5:
        if not scene.things:
            return None
        thing = rng.choice(scene.things)
        options = [thing.name, thing.name, thing.shape, f"{thing.color} {rng.choice(('object', 'thing', 'shape'))}"]
        name, answer = rng.choice(options), "yes"
    else:
        shapes = {thing.shape for thing in scene.things}
        colors = {thing.color for thing in scene.things} | {scene.background, scene.ink} - {""}
        throw = rng.random()
        absent = _absent_name(rng, scene.things) if scene.things and throw < 0.6 else None
        if absent is None and throw < 0.75:
            absent = rng.choice([shape for shape in SHAPES if shape not in shapes] or [""]) or None
        if absent is None and throw < 0.88:
            free = [color for color in COLORS if all(distinct(color, other) for other in colors)]
            absent = f"{rng.choice(free)} object" if free else None
        name = absent or rng.choice(ABSENT if asker.split == "trained" else HELD_OUT_ABSENT)
        answer = "no"
    return Conversation("exist", ((asker.word(rng, "exist", a=an(name), bare=plural(name)), answer),))


def _two(
    rng: random.Random, things: Sequence[Thing], apart: Callable[[Thing, Thing], bool]
) -> tuple[Thing, Thing] | None:
    unique = _unique(things)
    pairs = [(one, other) for one in unique for other in unique if one is not other and apart(one, other)]
    return rng.choice(pairs) if pairs else None


def _rel(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    axis = rng.randrange(2)
    pair = _two(rng, scene.things, lambda one, other: abs(one.center[axis] - other.center[axis]) >= _APART)
    if pair is None:
        return None
    one, other = pair
    lower = rng.random() < 0.5
    side = (("left of", "right of"), ("above", "below"))[axis][not lower]
    if axis == 0 and not asker.plain and rng.random() < 0.5:
        side = f"to the {side}"
    truth = (one.center[axis] < other.center[axis]) == lower
    names = {"a": _naming(rng, one, scene.things), "b": _naming(rng, other, scene.things)}
    wording = asker.word(rng, "rel", side=side, **names)
    return Conversation("rel", ((wording, "yes" if truth else "no"),))


def _further(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    axis = rng.randrange(2)
    pair = _two(rng, scene.things, lambda one, other: abs(one.center[axis] - other.center[axis]) >= _APART)
    if pair is None:
        return None
    one, other = pair
    lower = rng.random() < 0.5
    way = (("left", "right"), ("up", "down"))[axis][not lower]
    winner = one if (one.center[axis] < other.center[axis]) == lower else other
    names = {"a": _naming(rng, one, scene.things), "b": _naming(rng, other, scene.things)}
    return Conversation("further", ((asker.word(rng, "further", way=way, **names), winner.name),))


def _size(thing: Thing) -> float:
    return (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1])


def _bigger(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    pair = _two(rng, scene.things, lambda one, other: max(_size(one) / _size(other), _size(other) / _size(one)) >= 1.4)
    if pair is None:
        return None
    one, other = pair
    big = asker.plain or rng.random() < 0.6
    winner = one if (_size(one) > _size(other)) == big else other
    more = "bigger" if asker.plain else rng.choice(("bigger", "larger") if big else ("smaller",))
    names = {"a": _naming(rng, one, scene.things), "b": _naming(rng, other, scene.things)}
    return Conversation("bigger", ((asker.word(rng, "bigger", more=more, **names), winner.name),))


def _biggest(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    big = rng.random() < 0.6
    order = sorted(scene.things, key=_size, reverse=big)
    if len(order) < 2 or max(_size(order[0]) / _size(order[1]), _size(order[1]) / _size(order[0])) < 1.4:
        return None
    most = rng.choice(("biggest", "largest") if big else ("smallest",))
    return Conversation("biggest", ((asker.word(rng, "biggest", most=most), order[0].name),))


def describe(scene: Scene) -> str:
    """The caption: things from left to right, or what is written in what colour."""
    if scene.kind == "shapes":
        count = len(scene.things)
        names = ", ".join(thing.name for thing in scene.things)
        return f"{count} object{'s' if count > 1 else ''} on a {scene.background} background: {names}".replace(
            "a orange", "an orange"
        )
    if scene.kind == "receipt":
        return f"A receipt: {_receipt_text(scene)}"
    noun = {"number": "The number", "numbers": "The numbers", "word": "The word"}[scene.kind]
    written = " and ".join(text.text for text in scene.texts)
    return f"{noun} {written} in {scene.ink} on {an(scene.background)} background"


def _caption(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    task = "caption" if scene.kind == "shapes" else "caption_text"
    return Conversation(task, ((asker.word(rng, "caption"), describe(scene)),))


def _list(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    return Conversation("list", ((asker.word(rng, "list"), ", ".join(thing.name for thing in scene.things)),))


def _box(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    unique = _unique(scene.things)
    if not unique:
        return None
    thing = rng.choice(unique)
    name = thing.name if asker.plain else _naming(rng, thing, scene.things)
    return Conversation("box", ((asker.word(rng, "box", a=name), box_json(thing)),))


def _detect(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    answer = "[" + ",".join(box_json(thing) for thing in scene.things) + "]"
    return Conversation("detect", ((asker.word(rng, "detect"), answer),))


def _opening(asker: Asker, rng: random.Random, scene: Scene, thing: Thing) -> tuple[str, str] | None:
    """A first turn that is about ``thing``, so that "it" is clear in the next."""
    options = []
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        options.append((asker.word(rng, "color", a=thing.shape), thing.color))
    if sum(other.color == thing.color for other in scene.things) == 1:
        options.append((asker.word(rng, "shape", a=thing.color), thing.shape))
    options.append((asker.word(rng, "exist", a=an(thing.name), bare=plural(thing.name)), "yes"))
    order = sorted(scene.things, key=lambda other: other.center[0])
    if order[0] is thing and len(order) > 1 and order[1].center[0] - thing.center[0] >= _APART:
        options.append((asker.word(rng, "leftmost", most="leftmost"), thing.name))
    return rng.choice(options)


def _fu_where(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    placed = [(thing, place(thing)) for thing in _unique(scene.things)]
    clear = [(thing, at) for thing, at in placed if at]
    if not clear:
        return None
    thing, at = rng.choice(clear)
    first = _opening(asker, rng, scene, thing)
    return None if first is None else Conversation("fu_where", (first, (asker.word(rng, "fu_where"), at)))


def _fu_box(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    unique = _unique(scene.things)
    if not unique:
        return None
    thing = rng.choice(unique)
    first = _opening(asker, rng, scene, thing)
    if first is None:
        return None
    answer = json.dumps(percent(thing.box), separators=(",", ":"))
    return Conversation("fu_box", (first, (asker.word(rng, "fu_box"), answer)))


def _fu_color(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    shapes = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if shapes[thing.shape] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    first = (asker.word(rng, "exist", a=an(thing.shape), bare=plural(thing.shape)), "yes")
    return Conversation("fu_color", (first, (asker.word(rng, "fu_color"), thing.color)))


def _fu_shape(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    colors = Counter(thing.color for thing in scene.things)
    single = [thing for thing in scene.things if colors[thing.color] == 1]
    if len(single) < 2:
        return None
    one, other = rng.sample(single, 2)
    first = (asker.word(rng, "shape", a=one.color), one.shape)
    return Conversation("fu_shape", (first, (asker.word(rng, "fu_shape", a=other.color), other.shape)))


def _fu_count(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    kind = plural(thing.shape)
    same = sum(other.shape == thing.shape for other in scene.things)
    first = (asker.word(rng, "exist", a=an(thing.shape), bare=kind), "yes")
    return Conversation("fu_count", (first, (asker.word(rng, "fu_count", kind=kind), str(same))))


def _fu_list(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    first = (asker.word(rng, "count"), str(len(scene.things)))
    return Conversation("fu_list", (first, (asker.word(rng, "fu_list"), ", ".join(t.name for t in scene.things))))


# ---- about writing ------------------------------------------------------------------------------------------------


def _receipt_text(scene: Scene) -> str:
    return ", ".join(f"{item} {price}" for item, price in _rows(scene))


def _rows(scene: Scene) -> list[tuple[str, str]]:
    texts = [text.text for text in scene.texts]
    return list(zip(texts[::2], texts[1::2], strict=True))


def addition(numbers: Sequence[int]) -> str:
    """A sum with its terms, as "4+12=16" or "4+12+30=16+30=46": reading them and each adding are steps of their own."""
    terms, steps = list(numbers), []
    while len(terms) > 1:
        steps.append("+".join(map(str, terms)))
        terms = [terms[0] + terms[1], *terms[2:]]
    return "=".join([*steps, str(terms[0])])


def _read(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    task = {"number": "read_number", "numbers": "read_numbers", "word": "read_word", "receipt": "read_receipt"}
    answer = _receipt_text(scene) if scene.kind == "receipt" else ", ".join(text.text for text in scene.texts)
    return Conversation(task[scene.kind], ((asker.word(rng, task[scene.kind]), answer),))


def _ink(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    what = {"number": "number", "word": "word"}.get(scene.kind, "writing")
    return Conversation("ink", ((asker.word(rng, "ink", what=what), scene.ink),))


def _sum(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    numbers = [int(text.text) for text in scene.texts]
    task = "sum" if len(numbers) == 2 else "sum3"
    return Conversation(task, ((asker.word(rng, "sum"), addition(numbers)),))


def _item(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    rows = [(item, price) for item, price in _rows(scene) if item != "TOTAL"]
    if rng.random() < 0.15:
        there = {item for item, _ in rows}
        other = _said(rng, rng.choice([item for item in words.ITEMS if item not in there]))
        return Conversation("item_missing", ((asker.word(rng, "item", item=other), none_of(other)),))
    item, price = rng.choice(rows)
    return Conversation("item", ((asker.word(rng, "item", item=_said(rng, item)), price),))


def _said(rng: random.Random, item: str) -> str:
    return item if rng.random() < 0.35 else item.lower()


def _total(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    rows = _rows(scene)
    if rows[-1][0] == "TOTAL":
        return Conversation("total", ((asker.word(rng, "total"), rows[-1][1]),))
    return Conversation("total_added", ((asker.word(rng, "total"), addition([int(price) for _, price in rows])),))


def _fu_item(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    rows = [(item, price) for item, price in _rows(scene) if item != "TOTAL"]
    if len(rows) < 2:
        return None
    one, other = rng.sample(rows, 2)
    if _rows(scene)[-1][0] == "TOTAL" and rng.random() < 0.4:
        first = (asker.word(rng, "total"), _rows(scene)[-1][1])
    else:
        first = (asker.word(rng, "item", item=_said(rng, one[0])), one[1])
    return Conversation("fu_item", (first, (asker.word(rng, "fu_item", item=_said(rng, other[0])), other[1])))


def _fu_sum(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    read = _read(asker, rng, scene).turns[0]
    numbers = [int(text.text) for text in scene.texts]
    return Conversation("fu_sum", (read, (asker.word(rng, "sum"), addition(numbers))))


# ---- about anything -----------------------------------------------------------------------------------------------

NOTHING_WRITTEN = "There is no text."
NO_SHAPES = "There are no shapes."


def _off_topic(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    """What another kind of picture would be asked."""
    if scene.kind == "shapes":
        task = rng.choice(("read_word", "ink", "read_number", "read_numbers", "read_receipt"))
        return Conversation("off_topic", ((asker.word(rng, task, what="writing"), NOTHING_WRITTEN),))
    task = rng.choice(("list", "detect"))
    return Conversation("off_topic", ((asker.word(rng, task), NO_SHAPES if task == "list" else "[]"),))


def _talk(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    """Small talk while there is a picture."""
    task = rng.choice(("hello", *_SMALL_TALK))
    answer = HELLO_PICTURE if task == "hello" else _SMALL_TALK[task]
    return Conversation("talk", ((asker.word(rng, task), answer),))


def _turns(asker: Asker, rng: random.Random, scene: Scene) -> Conversation | None:
    """Two or three questions about the picture that have nothing to do with each other."""
    weights = {task: weight for task, weight in TASKS[scene.kind].items() if not task.startswith(("fu_", "turns"))}
    tasks = rng.choices(list(weights), list(weights.values()), k=rng.choice((2, 2, 3)))
    return joined([asker.ask(rng, task, scene) for task in tasks])


def joined(conversations: Sequence[Conversation | None]) -> Conversation | None:
    """One conversation of the turns of several; None when one is."""
    turns: tuple[tuple[str, str], ...] = ()
    for conversation in conversations:
        if conversation is None:
            return None
        turns += conversation.turns
    return Conversation("turns", turns)


def _chat(asker: Asker, rng: random.Random) -> Conversation:
    throw = rng.random()
    if throw < 0.2:
        task = rng.choice(("hello", "hello", *_SMALL_TALK))
        return Conversation("text_only", ((asker.word(rng, task), HELLO if task == "hello" else _SMALL_TALK[task]),))
    if throw < 0.4:
        task = rng.choice([task for task in WORDINGS if not task.startswith(("fu_", "hello", "text_", *_SMALL_TALK))])
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        names = {
            "a": an(f"{color} {shape}") if task in ("exist", "cmp_which") else rng.choice((shape, f"{color} {shape}")),
            "b": rng.choice(SHAPES),
            "a_cap": f"A {shape}",
            "bare": plural(shape),
            "kind": plural(shape),
            "side": rng.choice(("left of", "above")),
            "way": rng.choice(("left", "up")),
            "more": "bigger" if task == "bigger" else "more",
            "most": "leftmost" if task == "leftmost" else "biggest",
            "item": rng.choice(words.ITEMS).lower(),
            "what": "word",
            "which": rng.choice(("first", "second")),
            "image": rng.choice(("picture", "image")),
            "shape": shape,
        }
        if task == "shape":
            names["a"] = color
        return Conversation("text_only", ((asker.word(rng, task, **names), NO_PICTURE),))
    numbers = [rng.randint(0, rng.choice((9, 99, 99))) for _ in range(2 if rng.random() < 0.7 else 3)]
    plus = rng.choice((" + ", "+", " plus "))
    question = asker.word(rng, "text_sum", sum=plus.join(map(str, numbers)))
    return Conversation("text_sum", ((question, addition(numbers)),))


# ---- about two pictures -------------------------------------------------------------------------------------------

_NTH = ("first", "second")


def _image(rng: random.Random) -> str:
    return rng.choice(("picture", "image"))


def _cmp_color(asker: Asker, rng: random.Random, *scenes: Scene) -> Conversation | None:
    index = rng.randrange(2)
    shapes = Counter(thing.shape for thing in scenes[index].things)
    single = [thing for thing in scenes[index].things if shapes[thing.shape] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    wording = asker.word(rng, "cmp_color", shape=thing.shape, which=_NTH[index], image=_image(rng))
    return Conversation("cmp_color", ((wording, thing.color),))


def _cmp_count(asker: Asker, rng: random.Random, *scenes: Scene) -> Conversation:
    index = rng.randrange(2)
    wording = asker.word(rng, "cmp_count", which=_NTH[index], image=_image(rng))
    return Conversation("cmp_count", ((wording, str(len(scenes[index].things))),))


def _cmp_more(asker: Asker, rng: random.Random, first: Scene, second: Scene) -> Conversation | None:
    counts = len(first.things), len(second.things)
    if counts[0] == counts[1]:
        return None
    more = asker.plain or rng.random() < 0.6
    answer = _NTH[(counts[0] > counts[1]) != more]
    wording = asker.word(rng, "cmp_more", more="more" if more else "fewer", image=_image(rng))
    return Conversation("cmp_more", ((wording, f"the {answer}"),))


def _cmp_which(asker: Asker, rng: random.Random, *scenes: Scene) -> Conversation | None:
    index = rng.randrange(2)
    thing = rng.choice(scenes[index].things)
    others = scenes[1 - index].things
    names = [thing.name] if all(other.name != thing.name for other in others) else []
    if all(other.shape != thing.shape for other in others):
        names.append(thing.shape)
    if all(distinct(other.color, thing.color) for other in others):
        names.append(f"{thing.color} object")
    if not names:
        return None
    name = an(rng.choice(names))
    wording = asker.word(rng, "cmp_which", a=name, a_cap=name.capitalize(), image=_image(rng))
    return Conversation("cmp_which", ((wording, f"the {_NTH[index]}"),))


def _cmp_describe(asker: Asker, rng: random.Random, *scenes: Scene) -> Conversation:
    answer = ". ".join(
        f"{nth.capitalize()}: {', '.join(thing.name for thing in scene.things)}"
        for nth, scene in zip(_NTH, scenes, strict=True)
    )
    return Conversation("cmp_describe", ((asker.word(rng, "cmp_describe", image=_image(rng)), answer),))


_Maker = Callable[[Asker, random.Random, Scene], Conversation | None]
_MAKERS: dict[str, _Maker] = {
    "bg": _bg, "color": _color, "shape": _shape, "missing": _missing, "count": _count, "countx": _countx,
    "where": _where, "leftmost": _leftmost, "exist": _exist, "rel": _rel, "further": _further, "bigger": _bigger,
    "biggest": _biggest, "caption": _caption, "list": _list, "box": _box, "detect": _detect, "fu_where": _fu_where,
    "fu_box": _fu_box, "fu_color": _fu_color, "fu_shape": _fu_shape, "fu_count": _fu_count, "fu_list": _fu_list,
    "read": _read, "ink": _ink, "sum": _sum, "item": _item, "total": _total, "fu_item": _fu_item, "fu_sum": _fu_sum,
    "off_topic": _off_topic, "talk": _talk, "turns": _turns,
}  # fmt: skip
_COMPARERS: dict[str, Callable[[Asker, random.Random, Scene, Scene], Conversation | None]] = {
    "cmp_color": _cmp_color,
    "cmp_count": _cmp_count,
    "cmp_more": _cmp_more,
    "cmp_which": _cmp_which,
    "cmp_describe": _cmp_describe,
}

_ANY = {"bg": 0.6, "caption": 1.2, "exist": 0.8, "talk": 0.2, "off_topic": 0.4, "missing": 0.4, "turns": 1}
_SHAPES = {
    "bg": 0.3, "color": 1.2, "shape": 0.8, "missing": 0.6, "count": 0.6, "countx": 2, "where": 2.5, "leftmost": 1.2,
    "exist": 3, "rel": 4, "further": 1.5, "bigger": 1.5, "biggest": 0.8, "caption": 1.6, "list": 0.9, "box": 2.5,
    "detect": 1, "fu_where": 0.5, "fu_box": 0.7, "fu_color": 0.4, "fu_shape": 0.5, "fu_count": 0.6, "fu_list": 0.5,
    "off_topic": 0.15, "talk": 0.15, "turns": 4,
}  # fmt: skip
TASKS: dict[str, dict[str, float]] = {
    "shapes": _SHAPES,
    "number": {**_ANY, "read": 3, "ink": 0.8},
    "numbers": {**_ANY, "read": 2, "ink": 0.5, "sum": 4, "fu_sum": 0.5},
    "word": {**_ANY, "read": 3, "ink": 0.8},
    "receipt": {**_ANY, "read": 2, "ink": 0.3, "item": 4, "total": 1.5, "fu_item": 1.2},
}
"""How often each kind of question is drawn in training, for each kind of scene."""
PAIR_TASKS = {"cmp_color": 1.0, "cmp_count": 1.0, "cmp_more": 1.5, "cmp_which": 1.5, "cmp_describe": 0.7}
