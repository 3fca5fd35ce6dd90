"""What people type to find a picture: captions of scenes that say everything, and searches that say a part.

Knows scenes and English. Knows no pictures, no tokens and no torch.

The answer to "Describe the picture." (`describe`) is one of the forms, so that it can be searched with as it is.
"""

import random
from collections import Counter
from collections.abc import Sequence

from sightline_models.demo.questions import an, describe, place, plural
from sightline_models.demo.scenes import Scene, Thing

_OPENINGS = ("a picture of", "an image of", "a picture with", "a photo of", "an image with")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_NOUNS = ("object", "shape", "thing")
_APART = 0.08
"""How far two centres must be from each other, as a share of the picture, to be compared."""


def full(rng: random.Random, scene: Scene) -> str:
    """All that is on ``scene``, in the words of `describe` or in those of a search."""
    if rng.random() < 0.5:
        return describe(scene)
    if scene.kind == "shapes":
        return _opened(rng, f"{_listed(rng, [thing.name for thing in scene.things])} {_ground(rng, scene)}")
    if scene.kind == "receipt":
        return f"{rng.choice(('a receipt with', 'receipt'))} {_joined(rng, _rows(scene))}"
    return _opened(rng, f"{_written(rng, scene)} in {scene.ink} {_ground(rng, scene)}")


def search(rng: random.Random, scene: Scene) -> str:
    """Some of what is on ``scene``, as typed into a search box: short, sloppy, and perhaps true of other scenes too."""
    text = {"shapes": _some_shapes, "receipt": _some_rows}.get(scene.kind, _written)(rng, scene)
    if scene.ink and scene.kind != "receipt" and rng.random() < 0.3:
        text = f"{text} in {scene.ink}"
    if rng.random() < 0.25:
        text = f"{text} {_ground(rng, scene)}"
    text = _opened(rng, text)
    return text.lower() if rng.random() < 0.15 else text


def _opened(rng: random.Random, text: str) -> str:
    return f"{rng.choice(_OPENINGS)} {text}" if rng.random() < 0.2 else text


def _ground(rng: random.Random, scene: Scene) -> str:
    if rng.random() < 0.4:
        return f"on {scene.background}"
    return f"on {an(scene.background)} background"


# ---- shapes -------------------------------------------------------------------------------------------------------


def _listed(rng: random.Random, names: Sequence[str]) -> str:
    """Names in their order, those that are alike counted: "a red star and two blue rings"."""
    bare = rng.random() < 0.4
    parts = [_counted(rng, name, count, bare) for name, count in Counter(names).items()]
    return rng.choice((", ", " ", " and ")).join(parts) if bare else _joined(rng, parts)


def _counted(rng: random.Random, name: str, count: int, bare: bool = False) -> str:
    if count == 1:
        return name if bare else an(name)
    return f"{_NUMBERS[count] if rng.random() < 0.5 else count} {plural(name)}"


def _joined(rng: random.Random, parts: Sequence[str]) -> str:
    if len(parts) == 1 or rng.random() < 0.3:
        return ", ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _some_shapes(rng: random.Random, scene: Scene) -> str:
    things, throw = scene.things, rng.random()
    if throw < 0.15:
        thing = rng.choice(things)
        at = place(thing)
        return f"{an(thing.name)} {_at(at)}" if at else an(thing.name)
    if throw < 0.3 and len(things) > 1:
        one, other = rng.sample(things, 2)
        side = _side(rng, one, other)
        if side:
            return f"{an(one.name)} {side} {an(other.name)}"
    if throw < 0.5:
        return _in_general(rng, things)
    some = rng.sample(things, rng.randint(1, len(things)))
    return _listed(rng, [thing.name for thing in some])


def _at(ninth: str) -> str:
    preposition = {"left": "on", "right": "on", "top": "at", "bottom": "at"}.get(ninth, "in")
    return f"{preposition} the {ninth}"


def _side(rng: random.Random, one: Thing, other: Thing) -> str | None:
    """Where ``one`` is from ``other``, or None where that can't be told at a glance."""
    axis = rng.randrange(2)
    ahead = other.center[axis] - one.center[axis]
    if abs(ahead) < _APART:
        return None
    return (("left of", "right of"), ("above", "below"))[axis][ahead < 0]


def _in_general(rng: random.Random, things: Sequence[Thing]) -> str:
    """A colour, a shape or a number alone."""
    thing, noun, throw = rng.choice(things), rng.choice(_NOUNS), rng.random()
    if throw < 0.4:
        return _counted(rng, f"{thing.color} {noun}", sum(other.color == thing.color for other in things))
    if throw < 0.8:
        return _counted(rng, thing.shape, sum(other.shape == thing.shape for other in things))
    return _counted(rng, noun, len(things))


# ---- writing ------------------------------------------------------------------------------------------------------


def _written(rng: random.Random, scene: Scene) -> str:
    """What is written, with or without the name of what it is."""
    texts = [text.text for text in scene.texts]
    written = rng.choice((" and ", ", ", " ")).join(texts)
    if scene.kind == "word":
        form = rng.choice(("the word {}", "the word {}", "{}", "word {}", "a sign that says {}", "the text {}"))
    else:
        noun = "number" if len(texts) == 1 else "numbers"
        form = rng.choice((f"the {noun} {{}}", f"the {noun} {{}}", f"{noun} {{}}", "{}"))
    return form.format(written)


def _rows(scene: Scene) -> list[str]:
    """A receipt's rows, as "TEA 4"."""
    texts = [text.text for text in scene.texts]
    return [f"{item} {price}" for item, price in zip(texts[::2], texts[1::2], strict=True)]


def _some_rows(rng: random.Random, scene: Scene) -> str:
    rows = _rows(scene)
    if rows[-1].startswith("TOTAL ") and rng.random() < 0.3:
        return f"{rng.choice(('a receipt with a total of', 'receipt total'))} {rows[-1].split()[1]}"
    goods = [row for row in rows if not row.startswith("TOTAL ")]
    some = rng.sample(goods, rng.randint(1, len(goods)))
    if rng.random() < 0.3:
        some = [row.split()[0].lower() for row in some]
    return f"{rng.choice(('a receipt with', 'a receipt for', 'receipt'))} {_joined(rng, some)}"
