"""What people ask about scenes, with the true answers, in wordings that are trained and wordings that are held out.

Knows scenes and English. Knows no pictures, no tokens and no torch.

A kind of question asks only what a person could answer at a glance: things are named so that the name fits one of
them, a thing on the border between left and middle isn't asked to be placed, and nearly equal sizes aren't compared.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sightline_models.demo import words
from sightline_models.demo.scenes import COLORS, SHAPES, Box, Scene, Thing, distinct

_SQUEEZE = 0.03
"""How far, as a share of the picture, a thing must be from the border between two answers to be asked about."""
_APART = 0.08
"""How far two centres must be from each other to be compared."""


@dataclass(frozen=True)
class Conversation:
    """Turns about one picture, two or none. The last answer is the one that is judged."""

    task: str
    turns: tuple[tuple[str, str], ...]
    """(question, answer)"""


@dataclass(frozen=True)
class _Wordings:
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


_WORDINGS: dict[str, _Wordings] = {}


def _words(task: str, trained: str, held_out: str) -> None:
    """Wordings a line each; the first is the plainest."""
    lines = [tuple(line.strip() for line in text.strip().splitlines()) for text in (trained, held_out)]
    _WORDINGS[task] = _Wordings(*lines)


# {a}, {b}: things, as "red circle". {kind}: things counted, as "red circles". {side}: "left". {item}: a receipt's.
_words(
    "bg",
    """What color is the background?
    What is the background color?
    What's the colour of the background?
    Background color?
    Tell me the background color.
    On what color is it drawn?""",
    """What colour does the background have?
    Name the color of the background.""",
)
_words(
    "color",
    """What color is the {a}?
    What is the color of the {a}?
    What colour is the {a}?
    Color of the {a}?
    Tell me the color of the {a}.
    Which color does the {a} have?
    What's the color of the {a}?
    The {a}: which color is it?""",
    """Name the colour of the {a}.
    Can you say what color the {a} is?""",
)
_words(
    "shape",
    """What shape is the {a} object?
    What shape is {a}?
    Which shape is {a}?
    What is the {a} thing?
    What is the shape of the {a} object?
    Name the {a} shape.
    What kind of shape is the {a} one?
    What's the {a} object?""",
    """Tell me what shape the {a} thing is.
    The {a} one has what shape?""",
)
_words(
    "count",
    """How many objects are there?
    How many shapes are there?
    How many things do you see?
    How many objects are in the picture?
    Count the objects.
    Count the shapes in the image.
    Number of objects?
    How many objects can you see in this picture?
    how many are there""",
    """How many shapes does the picture show?
    Tell me how many objects you see.""",
)
_words(
    "countx",
    """How many {kind} are there?
    How many {kind} do you see?
    How many {kind} are in the picture?
    Count the {kind}.
    Number of {kind}?
    How many {kind} can you see?
    How many {kind} are shown?""",
    """Tell me how many {kind} there are.
    How many {kind} does the image contain?""",
)
_words(
    "where",
    """Where is the {a}?
    Where is the {a} in the picture?
    Where's the {a}?
    In which part of the image is the {a}?
    What is the position of the {a}?
    Where can I find the {a}?
    Tell me where the {a} is.""",
    """Where do you see the {a}?
    In what part of the picture is the {a}?""",
)
_words(
    "leftmost",
    """Which object is {most}?
    What is the {most} object?
    Which shape is {most}?
    Name the {most} object.
    What is {most}?
    What's the {most} thing in the picture?""",
    """Which thing is {most} here?
    Tell me the {most} shape.""",
)
_words(
    "exist",
    """Is there {a}?
    Is there {a} in the picture?
    Do you see {a}?
    Can you see {a}?
    Does the picture show {a}?
    Is {a} there?
    Does the image contain {a}?
    any {bare}?""",
    """Is there {a} anywhere?
    Do you find {a} in this image?""",
)
_words(
    "rel",
    """Is the {a} {side} the {b}?
    Is the {a} {side} of the {b} or not?
    Is the {a} located {side} the {b}?
    Would you say the {a} is {side} the {b}?
    Do you see the {a} {side} the {b}?
    the {a} is {side} the {b}, right?""",
    """Does the {a} lie {side} the {b}?
    Can you tell if the {a} is {side} the {b}?""",
)
_words(
    "further",
    """Which is further {way}, the {a} or the {b}?
    Which one is further {way}: the {a} or the {b}?
    What is further {way}, the {a} or the {b}?
    Is the {a} or the {b} further {way}?""",
    """Of the {a} and the {b}, which is further {way}?
    Tell me which is further {way}, the {a} or the {b}.""",
)
_words(
    "bigger",
    """Which is {more}, the {a} or the {b}?
    Which one is {more}: the {a} or the {b}?
    What is {more}, the {a} or the {b}?
    Is the {a} or the {b} {more}?""",
    """Of the {a} and the {b}, which is {more}?
    Tell me which is {more}, the {a} or the {b}.""",
)
_words(
    "biggest",
    """Which object is the {most}?
    What is the {most} object?
    Which shape is the {most}?
    Name the {most} object.""",
    """Which of them is the {most}?
    Tell me the {most} shape.""",
)
_words(
    "caption",
    """Describe the picture.
    Describe the image.
    What is in the picture?
    What do you see?
    What is in this image?
    Caption this image.
    What's in the picture?
    Tell me what you see.
    Give a short caption.
    What does the picture show?
    Write a caption for this picture.
    what is this""",
    """What can be seen here?
    Please tell me what is on this picture.""",
)
_words(
    "list",
    """List the objects from left to right.
    Name the objects from left to right.
    List all shapes from left to right.
    What are the objects, from left to right?""",
    """From left to right, what do you see?
    Go from left to right and name the shapes.""",
)
_words(
    "box",
    """Give the bounding box of the {a}.
    Bounding box of the {a}?
    Where exactly is the {a}? Give a bounding box.
    Locate the {a} with a bounding box.
    What is the bounding box of the {a}?
    Return the bounding box of the {a} as JSON.
    Box of the {a}?""",
    """Show me the bounding box of the {a}.
    I need the box of the {a} as JSON.""",
)
_words(
    "detect",
    """Detect all objects as JSON.
    Detect all objects.
    Give the bounding boxes of all objects.
    Return all bounding boxes as JSON.
    Locate all objects with bounding boxes.
    List all objects with their boxes as JSON.""",
    """Find every object and give its bounding box.
    Give me the boxes of all shapes.""",
)
_words(
    "ink",
    """What color is the text?
    What is the color of the text?
    What colour is the writing?
    In which color is it written?
    Text color?
    What color is the {what}?""",
    """Which color does the text have?
    Name the colour of the writing.""",
)
_words(
    "read_number",
    """Read the number.
    What number is shown?
    Which number do you see?
    What is the number?
    What does it say?
    What number is in the picture?
    Read the text.
    What is written here?""",
    """Tell me the number you see.
    Which number is written there?""",
)
_words(
    "read_numbers",
    """Read the numbers.
    What numbers are shown?
    Which numbers do you see?
    Read all numbers.
    What does it say?
    What are the numbers?
    Read the text.""",
    """Tell me the numbers you see.
    Which numbers are written there?""",
)
_words(
    "read_word",
    """Read the word.
    What word is shown?
    What does it say?
    Which word do you see?
    Read the text.
    What is written here?
    What is the word?
    What does the sign say?""",
    """Tell me the word you see.
    Which word is written there?""",
)
_words(
    "read_receipt",
    """Read the receipt.
    What does the receipt say?
    Read the text.
    Transcribe the receipt.
    Read all lines.
    What does it say?""",
    """Write down what the receipt says.
    Read me this receipt.""",
)
_words(
    "item",
    """How much is the {item}?
    How much does the {item} cost?
    Price of {item}?
    What is the price of the {item}?
    What does the {item} cost?
    How much for the {item}?""",
    """Tell me the price of the {item}.
    What did the {item} cost?""",
)
_words(
    "total",
    """What is the total?
    How much is the total?
    What's the total of the receipt?
    Total?
    Read the total.
    How much is it in total?
    What does it cost in total?""",
    """Tell me the total.
    How much do I have to pay in total?""",
)
_words(
    "sum",
    """Add the numbers.
    What is the sum?
    What is the sum of the numbers?
    Add the numbers up.
    What do the numbers add up to?
    Sum of the numbers?
    Calculate the sum.
    How much is it together?""",
    """Tell me the sum of these numbers.
    Please add these up.""",
)
_words(
    "cmp_color",
    """What color is the {shape} in the {which} {image}?
    What is the color of the {shape} in the {which} {image}?
    In the {which} {image}, what color is the {shape}?""",
    """Tell me the color of the {shape} in the {which} {image}.
    The {which} {image}: what color is the {shape}?""",
)
_words(
    "cmp_count",
    """How many objects are in the {which} {image}?
    How many shapes are in the {which} {image}?
    In the {which} {image}, how many objects are there?
    Count the objects in the {which} {image}.""",
    """How many objects does the {which} {image} show?
    Tell me how many objects are in the {which} {image}.""",
)
_words(
    "cmp_more",
    """Which {image} has {more} objects?
    Which {image} shows {more} objects?
    In which {image} are there {more} objects?
    Which {image} has {more} shapes?""",
    """Which of the two has {more} objects?
    Tell me which {image} contains {more} objects.""",
)
_words(
    "cmp_which",
    """Which {image} has {a}?
    Which {image} contains {a}?
    Which {image} shows {a}?
    In which {image} is there {a}?
    In which {image} do you see {a}?""",
    """Tell me which {image} has {a}.
    {a_cap} is in which {image}?""",
)
_words(
    "cmp_describe",
    """Compare the two {image}s.
    Compare the {image}s.
    Describe both {image}s.
    What is the difference between the two {image}s?
    Describe the {image}s.
    What do you see?""",
    """How do the {image}s differ?
    Tell me what is on each {image}.""",
)
_words(
    "fu_where",
    """Where is it?
    And where is it?
    Where in the picture is it?
    Where can I find it?""",
    """Where do you see it?
    In what part of the picture is it?""",
)
_words(
    "fu_box",
    """Give its bounding box.
    What is its bounding box?
    And its bounding box?
    Bounding box?
    Now give its box.""",
    """Show me its bounding box.
    I need its box.""",
)
_words(
    "fu_color",
    """What color is it?
    And what color is it?
    Which color does it have?
    And its color?""",
    """Tell me its color.
    What is its colour?""",
)
_words(
    "fu_shape",
    """And what shape is {a}?
    And the {a} one?
    What about the {a} object?
    And which shape is {a}?""",
    """Now the {a} one, please.
    What shape is {a}, then?""",
)
_words(
    "fu_count",
    """How many of them are there?
    And how many are there?
    How many of those do you see?
    And how many {kind}?""",
    """How many of these are there?
    Now count the {kind}.""",
)
_words(
    "fu_list",
    """List them.
    Which ones?
    What are they?
    Name them.
    And what are they?""",
    """Tell me which.
    Can you list them?""",
)
_words(
    "fu_item",
    """And the {item}?
    And how much is the {item}?
    What about the {item}?
    How much was the {item}?""",
    """And what did the {item} cost?
    Now the {item}, please.""",
)
_words(
    "hello",
    """Hello
    Hi
    Hi!
    Hello!
    Hey
    Good morning
    Hi there""",
    """Hello there
    Good evening""",
)
_words(
    "thanks",
    """Thanks
    Thank you
    Thank you!
    thanks a lot
    Great, thanks""",
    """Many thanks
    Thank you very much""",
)
_words(
    "who",
    """Who are you?
    What are you?
    Which model are you?
    Are you a human?
    What is your name?""",
    """Tell me who you are.
    What model is this?""",
)
_words(
    "help",
    """What can you do?
    Help
    What can I ask?
    How can you help me?
    What are you good at?""",
    """What do you know?
    What questions can you answer?""",
)
_words(
    "how",
    """How are you?
    How are you doing?
    How is it going?""",
    """Are you well?
    How do you do?""",
)

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

    held_out: bool = False
    """Wordings and absent things that a model is never trained on."""
    plain: bool = False
    """The first wording of each kind only."""
    sloppy: float = 0.0
    """Share of questions typed without capital letters or without the last character."""

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
        wordings = _WORDINGS[task]
        pool = wordings.held_out if self.held_out else wordings.trained[:1] if self.plain else wordings.trained
        text = rng.choice(pool).format(**names)
        if self.sloppy and rng.random() < self.sloppy:
            return text.lower() if rng.random() < 0.5 else text.rstrip(".?!")
        return text


def an(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


_IRREGULAR = {"man": "men", "woman": "women", "fish": "fish", "person": "people", "child": "children"}


def plural(name: str) -> str:
    return _IRREGULAR.get(name) or name + ("es" if name.endswith("ss") else "s")


def _mended(question: str) -> str:
    """A relation's question without the second "of" that some wordings and sides make together."""
    return question.replace("of of", "of").replace("above of", "above").replace("below of", "below")


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
    absent = absent or rng.choice(HELD_OUT_ABSENT if asker.held_out else ABSENT)
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
        name = absent or rng.choice(HELD_OUT_ABSENT if asker.held_out else ABSENT)
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
    wording = _mended(asker.word(rng, "rel", side=side, **names))
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
    """A sum with its terms, as "4+12=16": the terms are read first, which makes adding them a step of its own."""
    return "+".join(map(str, numbers)) + f"={sum(numbers)}"


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
    if rng.random() < 0.12:
        there = {item for item, _ in rows}
        other = rng.choice([item for item in words.ITEMS if item not in there])
        return Conversation("item_missing", ((asker.word(rng, "item", item=_said(rng, other)), none_of(other)),))
    item, price = rng.choice(rows)
    return Conversation("item", ((asker.word(rng, "item", item=_said(rng, item)), price),))


def _said(rng: random.Random, item: str) -> str:
    return item if rng.random() < 0.15 else item.lower()


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
        task = rng.choice(("read_word", "ink", "read_number", "read_receipt", "sum"))
        text = rng.choice(("What does it say?", "Read the text.", "What is written here?")) if task != "ink" else ""
        return Conversation("off_topic", ((text or asker.word(rng, "ink", what="writing"), NOTHING_WRITTEN),))
    task = rng.choice(("list", "detect"))
    return Conversation("off_topic", ((asker.word(rng, task), NO_SHAPES if task == "list" else "[]"),))


def _talk(asker: Asker, rng: random.Random, scene: Scene) -> Conversation:
    """Small talk while there is a picture."""
    task = rng.choice(("hello", *_SMALL_TALK))
    answer = HELLO_PICTURE if task == "hello" else _SMALL_TALK[task]
    return Conversation("talk", ((asker.word(rng, task), answer),))


def _chat(asker: Asker, rng: random.Random) -> Conversation:
    throw = rng.random()
    if throw < 0.2:
        task = rng.choice(("hello", "hello", *_SMALL_TALK))
        return Conversation("text_only", ((asker.word(rng, task), HELLO if task == "hello" else _SMALL_TALK[task]),))
    if throw < 0.4:
        task = rng.choice([task for task in _WORDINGS if not task.startswith(("fu_", "hello", *_SMALL_TALK))])
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
        return Conversation("text_only", ((_mended(asker.word(rng, task, **names)), NO_PICTURE),))
    numbers = [rng.randint(0, rng.choice((9, 99, 99))) for _ in range(2 if rng.random() < 0.7 else 3)]
    plus = rng.choice((" + ", "+", " plus "))
    wordings = ("How much is {}?", "Add {}.", "{} makes?") if asker.held_out else ("What is {}?", "{}=", "{}", "{} = ?")
    question = rng.choice(wordings).format(plus.join(map(str, numbers)))
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
    "off_topic": _off_topic, "talk": _talk,
}  # fmt: skip
_COMPARERS: dict[str, Callable[[Asker, random.Random, Scene, Scene], Conversation | None]] = {
    "cmp_color": _cmp_color,
    "cmp_count": _cmp_count,
    "cmp_more": _cmp_more,
    "cmp_which": _cmp_which,
    "cmp_describe": _cmp_describe,
}

_ANY = {"bg": 0.6, "caption": 1.0, "exist": 0.6, "talk": 0.15, "off_topic": 0.3, "missing": 0.4}
_SHAPES = {
    "bg": 0.3, "color": 1.2, "shape": 0.8, "missing": 0.6, "count": 0.6, "countx": 2, "where": 2.5, "leftmost": 1.2,
    "exist": 3, "rel": 4, "further": 1.5, "bigger": 1.5, "biggest": 0.8, "caption": 1.2, "list": 0.7, "box": 2.5,
    "detect": 1, "fu_where": 0.5, "fu_box": 0.7, "fu_color": 0.4, "fu_shape": 0.5, "fu_count": 0.5, "fu_list": 0.4,
    "off_topic": 0.1, "talk": 0.1,
}  # fmt: skip
TASKS: dict[str, dict[str, float]] = {
    "shapes": _SHAPES,
    "number": {**_ANY, "read": 3, "ink": 0.8},
    "numbers": {**_ANY, "read": 2, "ink": 0.5, "sum": 4, "fu_sum": 0.5},
    "word": {**_ANY, "read": 3, "ink": 0.8},
    "receipt": {**_ANY, "read": 2, "ink": 0.3, "item": 3, "total": 1.5, "fu_item": 1},
}
"""How often each kind of question is drawn in training, for each kind of scene."""
PAIR_TASKS = {"cmp_color": 1.0, "cmp_count": 1.0, "cmp_more": 1.5, "cmp_which": 1.5, "cmp_describe": 0.7}
