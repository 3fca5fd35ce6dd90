"""Pictures show what their scenes say, where they say it, and the held-out parts stay apart from the trained ones."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sightline_models.demo import fonts, words
from sightline_models.demo.questions import ABSENT, HELD_OUT_ABSENT
from sightline_models.demo.scenes import COLORS, FULL, KINDS, PLAIN, SHAPES, TRAINED, Box, Look, Scene, distinct, draw

QUICK = Look(sides=(48, 48), effects=False)
WRITTEN = KINDS[1:]


def drawn(name: str, count: int, look: Look, *kinds: str) -> Iterator[tuple[Image.Image, Scene]]:
    for index in range(count):
        rng = random.Random(f"{name}/{index}")
        yield draw(rng, look, rng.choice(kinds) if kinds else None)


def ink(image: Image.Image, least: int = 1) -> NDArray[np.bool_]:
    """Pixels that aren't background, which is what most of the border is."""
    pixels = np.asarray(image).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colors, counts = np.unique(border, axis=0, return_counts=True)
    found: NDArray[np.bool_] = np.abs(pixels - colors[counts.argmax()]).sum(-1) >= least
    return found


def extent(mask: NDArray[np.bool_]) -> Box:
    ys, xs = np.nonzero(mask)
    height, width = mask.shape
    return xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height


@pytest.mark.parametrize("look", [TRAINED, FULL, PLAIN], ids=["trained", "full", "plain"])
def test_the_same_seed_draws_the_same_picture(look: Look) -> None:
    one, two, other = (draw(random.Random(seed), look) for seed in ("same", "same", "other"))
    assert one[1] == two[1]
    assert one[0].mode == "RGB"
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1] != other[1]


def test_boxes_lie_on_the_picture() -> None:
    seen = 0
    for _, scene in drawn("inside", 300, replace(TRAINED, sides=(60, 90))):
        boxes = [thing.box for thing in scene.things] + [box for text in scene.texts for box in text.boxes]
        seen += len(boxes)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
    assert seen > 900


@pytest.mark.parametrize("square", [1.0, 0.0], ids=["square", "any aspect"])
def test_boxes_bound_what_is_drawn_to_a_pixel(square: float) -> None:
    for image, scene in drawn("tight", 60, replace(PLAIN, square=square, sides=(150, 200)), "shapes"):
        mask = ink(image)
        height, width = mask.shape
        near = 1.5
        for thing in scene.things:
            left, top, right, bottom = (
                round(edge * size) for edge, size in zip(thing.box, (width, height) * 2, strict=True)
            )
            grown = np.zeros_like(mask)
            grown[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
            found = extent(mask & grown)
            for edge, true, size in zip(thing.box, found, (width, height) * 2, strict=True):
                assert abs(edge - true) * size <= near, thing
            mask &= ~grown
        assert not mask.any(), "something is drawn where no box is"


@pytest.mark.parametrize("look", [QUICK, replace(QUICK, square=0)], ids=["square", "any aspect"])
def test_things_keep_apart(look: Look) -> None:
    pairs = 0
    for _, scene in drawn("apart", 400, look, "shapes"):
        for one, other in combinations([thing.box for thing in scene.things], 2):
            pairs += 1
            assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    assert pairs > 1000


def test_a_thing_has_its_colour() -> None:
    for image, scene in drawn("colour", 80, PLAIN, "shapes"):
        pixels = np.asarray(image).astype(int)
        height, width = pixels.shape[:2]
        for thing in scene.things:
            if thing.shape in ("ring", "star", "triangle"):
                continue
            x, y = thing.center
            middle = pixels[int(y * height), int(x * width)]
            away = {name: min(np.abs(middle - base).max() for base in shades) for name, shades in COLORS.items()}
            assert away[thing.color] <= 14, thing


def test_things_come_from_left_to_right() -> None:
    for _, scene in drawn("order", 200, QUICK, "shapes"):
        assert 1 <= len(scene.things) <= 6
        centers = [thing.center[0] for thing in scene.things]
        assert centers == sorted(centers)


def test_every_kind_shape_colour_and_count_occurs() -> None:
    made = [scene for _, scene in drawn("all", 1200, QUICK)]
    assert {scene.kind for scene in made} == set(KINDS)
    things = Counter(thing.name for scene in made for thing in scene.things)
    assert set(things) == {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    assert {scene.background for scene in made} == set(COLORS)
    assert {scene.ink for scene in made if scene.texts} == set(COLORS)
    assert {len(scene.things) for scene in made if scene.kind == "shapes"} == {1, 2, 3, 4, 5, 6}
    assert {len(scene.texts) for scene in made if scene.kind == "numbers"} == {2, 3}
    assert {len(scene.texts) for scene in made if scene.kind == "receipt"} == {4, 6, 8, 10}


def test_kinds_and_squares_have_their_shares() -> None:
    made = [scene for _, scene in drawn("shares", 1200, QUICK)]
    kinds = Counter(scene.kind for scene in made)
    for kind, share in zip(KINDS, QUICK.weights, strict=True):
        assert abs(kinds[kind] / len(made) - share) < 0.05
    square = sum(scene.aspect == 1 for scene in made) / len(made)
    assert 0.45 < square < 0.58
    assert all(0.48 <= scene.aspect <= 2.1 for scene in made)
    assert any(scene.aspect < 0.7 for scene in made)
    assert any(scene.aspect > 1.4 for scene in made)


def test_a_scene_knows_the_aspect_of_its_picture() -> None:
    for image, scene in drawn("aspect", 60, TRAINED):
        assert scene.aspect == image.width / image.height
        assert TRAINED.sides[0] <= min(image.size) <= TRAINED.sides[1]


def test_colours_of_one_picture_can_be_told_apart() -> None:
    for _, scene in drawn("distinct", 500, QUICK):
        for color in [thing.color for thing in scene.things] + [scene.ink] * bool(scene.texts):
            assert distinct(color, scene.background)
            assert distinct(scene.background, color)
    assert not any(distinct(color, color) for color in COLORS)


def test_numbers_and_receipts_hold_what_their_kind_says() -> None:
    for _, scene in drawn("texts", 400, QUICK, *WRITTEN):
        texts = [text.text for text in scene.texts]
        assert not scene.things
        if scene.kind in ("number", "numbers"):
            assert all(str(int(text)) == text for text in texts)
            assert len(texts) == 1 if scene.kind == "number" else all(int(text) < 100 for text in texts)
        if scene.kind == "word":
            assert texts[0] in words.TRAINED or (texts[0].isalpha() and texts[0].isupper() and 2 <= len(texts[0]) <= 6)
        if scene.kind == "receipt":
            items, prices = texts[::2], [int(price) for price in texts[1::2]]
            assert len(set(items)) == len(items)
            assert [text.row for text in scene.texts] == [row for row in range(len(items)) for _ in range(2)]
            if items[-1] == "TOTAL":
                assert prices[-1] == sum(prices[:-1])
            odd = [item for item in items if item not in (*words.ITEMS, "TOTAL")]
            assert all(item in words.TRAINED or re.fullmatch("[A-Z]{2,6}", item) for item in odd)


@pytest.mark.parametrize("font", [*fonts.TRAINED, *fonts.HELD_OUT])
def test_characters_boxes_cover_the_ink(font: str) -> None:
    inked = outside = 0
    for image, scene in drawn(font, 14, replace(PLAIN, fonts=(font,), sides=(200, 200)), *WRITTEN):
        mask = ink(image, 60)
        height, width = mask.shape
        covered = np.zeros_like(mask)
        for text in scene.texts:
            assert len(text.boxes) == len(text.text)
            for left, top, right, bottom in text.boxes:
                rows = slice(int(top * height), int(bottom * height) + 1)
                assert mask[rows, int(left * width) : int(right * width) + 1].any(), "a character's box is empty"
                covered[
                    max(0, rows.start - 2) : rows.stop + 2, max(0, int(left * width) - 2) : int(right * width) + 3
                ] = 1
        inked += mask.sum()
        outside += (mask & ~covered).sum()
        # Nothing is cut off: what touches the edge might go on beyond it.
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
    # A capital J reaches out under its neighbour.
    assert outside < 0.002 * inked


def test_each_character_stands_in_its_own_box() -> None:
    for _, scene in drawn("columns", 100, PLAIN, *WRITTEN):
        for text in scene.texts:
            lefts = [box[0] for box in text.boxes]
            assert lefts == sorted(lefts)
            assert len({(box[1], box[3]) for box in text.boxes}) == 1


def test_plain_pictures_are_clean_squares_without_brown() -> None:
    for image, scene in drawn("plain", 60, PLAIN):
        assert image.size == (384, 384)
        assert scene.aspect == 1
        assert "brown" not in {scene.background, scene.ink, *(thing.color for thing in scene.things)}
    image, _ = next(drawn("clean", 1, PLAIN, "shapes"))
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) <= 7


def test_held_out_words_and_items_are_never_trained_in_their_place() -> None:
    for held_out, trained in (
        (words.HELD_OUT, words.TRAINED),
        (words.HELD_OUT_ITEMS, words.ITEMS),
        (HELD_OUT_ABSENT, ABSENT),
    ):
        assert held_out
        assert not set(held_out) & set(trained)
        assert len(set(held_out)) == len(held_out)
        assert len(set(trained)) == len(trained)
    assert not set(words.HELD_OUT_ITEMS) & set(words.TRAINED)


def test_held_out_words_are_no_trained_items() -> None:
    assert not set(words.HELD_OUT) & set(words.ITEMS)


def test_words_are_short_enough_to_be_labelled() -> None:
    for word in (*words.TRAINED, *words.HELD_OUT, *words.ITEMS, *words.HELD_OUT_ITEMS):
        assert word.isascii()
        assert word.isupper()
        assert 2 <= len(word) <= 7


def test_held_out_fonts_are_of_families_that_are_never_trained() -> None:
    trained = {fonts.load(name, 20).getname()[0] for name in fonts.TRAINED}
    held_out = {fonts.load(name, 20).getname()[0] for name in fonts.HELD_OUT}
    assert len(trained) >= 6
    assert len(held_out) >= 4
    assert not trained & held_out
    assert not set(fonts.TRAINED) & set(fonts.HELD_OUT)
    assert TRAINED.fonts == FULL.fonts == PLAIN.fonts == fonts.TRAINED


def test_a_missing_font_package_is_named_with_its_fix() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no_such_fonts.*pip install 'sightline\[train\]'"):
        fonts.load("no_such_fonts/files/A.ttf", 20)


def test_pictures_are_turned_so_little_that_boxes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A degree moves a corner by an eightieth of the side."""
    turned: list[float] = []
    rotate = Image.Image.rotate

    def note(self: Image.Image, angle: float, *rest: Any, **named: Any) -> Image.Image:
        turned.append(angle)
        return rotate(self, angle, *rest, **named)

    monkeypatch.setattr(Image.Image, "rotate", note)
    assert len(list(drawn("turned", 200, replace(TRAINED, sides=(96, 96)), "shapes"))) == 200
    assert len(turned) > 10
    assert max(abs(angle) for angle in turned) <= 1
