"""What each patch of a picture is to be told as, for scenes made by hand on a grid of 12 x 12 patches."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sightline_models.demo.labels import CHARACTERS, CLASSES, IGNORE, LABELS, OUTPUTS, Labels, label
from sightline_models.demo.scenes import COLORS, SHAPES, Scene, Text, Thing
from sightline_models.demo.words import ITEMS

SIDE = 12
COLOR = list(COLORS)

# Rows 0-2 and columns 0-2; rows 6-11 and columns 3-6; a thing that is smaller than a patch, in row 1 and column 10.
THINGS = (
    Thing("red", "circle", (0.0, 0.0, 0.25, 0.25)),
    Thing("blue", "star", (0.25, 0.5, 0.58, 1.0)),
    Thing("red", "cross", (10.3 / 12, 1.3 / 12, 10.6 / 12, 1.7 / 12)),
)
SHAPES_SCENE = Scene("shapes", "white", THINGS)


def grid(labels: Labels, name: str) -> NDArray[np.int16]:
    return labels.classes[list(CLASSES).index(name)].reshape(SIDE, SIDE)


@pytest.fixture(scope="module")
def labels() -> Labels:
    return label(SHAPES_SCENE, SIDE)


def test_labels_have_a_row_a_name_and_a_column_a_patch(labels: Labels) -> None:
    assert labels.classes.shape == (LABELS, SIDE * SIDE)
    assert labels.boxes.shape == (SIDE * SIDE, 4)
    assert sum(CLASSES.values()) + 4 == OUTPUTS


def test_a_patch_tells_of_the_thing_that_covers_it(labels: Labels) -> None:
    expected = np.zeros((SIDE, SIDE), int)
    expected[0:3, 0:3] = SHAPES.index("circle") + 1
    expected[6:12, 3:7] = SHAPES.index("star") + 1
    expected[1, 10] = SHAPES.index("cross") + 1
    # The star ends at 0.58, which is 0.96 of column 6.
    assert (grid(labels, "shape") == expected).all()
    assert (grid(labels, "color")[0:3, 0:3] == COLOR.index("red")).all()
    assert (grid(labels, "color")[6:12, 3:7] == COLOR.index("blue")).all()
    assert grid(labels, "color")[1, 10] == COLOR.index("red")
    assert (grid(labels, "color")[expected == 0] == IGNORE).all()


def test_a_patch_that_is_covered_by_less_than_a_quarter_is_empty() -> None:
    barely = Scene("shapes", "white", (Thing("red", "square", (1 / 12, 1 / 12, 3.2 / 12, 3.3 / 12)),))
    expected = np.zeros((SIDE, SIDE), bool)
    expected[1:4, 1:3] = True
    assert ((grid(label(barely, SIDE), "shape") > 0) == expected).all()


def test_every_patch_tells_of_the_background_and_of_how_many_things_there_are(labels: Labels) -> None:
    assert (grid(labels, "background") == COLOR.index("white")).all()
    assert (grid(labels, "count") == 3).all()
    assert (grid(labels, "character") == 0).all()
    assert (grid(labels, "second_character") == 0).all()


@pytest.mark.parametrize(
    ("name", "circle", "star", "cross"),
    [
        ("same_color", 2, 1, 2),
        ("same_shape", 1, 1, 1),
        ("rank_x", 0, 1, 2),
        ("rank_y", 0, 2, 1),
        ("rank_size", 1, 0, 2),
        ("place", 0, 7, 2),
    ],
)
def test_a_thing_is_told_among_the_others(labels: Labels, name: str, circle: int, star: int, cross: int) -> None:
    told = grid(labels, name)
    assert (told[0:3, 0:3] == circle).all()
    assert (told[6:12, 3:7] == star).all()
    assert told[1, 10] == cross
    assert (told == IGNORE).sum() == SIDE * SIDE - 9 - 24 - 1


def test_boxes_stand_where_the_thing_is_and_nowhere_else(labels: Labels) -> None:
    boxes = labels.boxes.reshape(SIDE, SIDE, 4)
    assert np.allclose(boxes[2, 2], THINGS[0].box)
    assert np.allclose(boxes[8, 5], THINGS[1].box)
    assert np.allclose(boxes[1, 10], THINGS[2].box)
    assert np.isfinite(boxes).sum() == 4 * (9 + 24 + 1)


def test_things_have_no_labels_of_writing(labels: Labels) -> None:
    for name in ("row", "column", "length"):
        assert (grid(labels, name) == IGNORE).all()


def test_a_patch_tells_of_the_character_that_covers_most_of_it_and_of_the_next() -> None:
    # "4B" in row 0: the 4 over columns 2 to 4.5, the B from there to 7; "Z" in row 1.
    first = Text("4B", 0, ((2 / 12, 1 / 12, 4.4 / 12, 4 / 12), (4.4 / 12, 1 / 12, 7 / 12, 4 / 12)))
    second = Text("Z", 1, ((9 / 12, 9 / 12, 12 / 12, 12 / 12),))
    told = label(Scene("word", "black", texts=(first, second), ink="yellow"), SIDE)
    character = grid(told, "character")
    expected = np.zeros((SIDE, SIDE), int)
    expected[1:4, 2:4] = CHARACTERS.index("4") + 1
    expected[1:4, 4:7] = CHARACTERS.index("B") + 1
    expected[9:12, 9:12] = CHARACTERS.index("Z") + 1
    assert (character == expected).all()
    second_character = grid(told, "second_character")
    assert (second_character[1:4, 4] == CHARACTERS.index("4") + 1).all()
    assert (second_character > 0).sum() == 3
    here = expected > 0
    assert (grid(told, "color")[here] == COLOR.index("yellow")).all()
    assert (grid(told, "color")[~here] == IGNORE).all()
    for name, four, bee, zed in (("row", 0, 0, 1), ("column", 0, 1, 0), ("length", 2, 2, 1)):
        values = grid(told, name)
        assert (values[1:4, 2:4] == four).all()
        assert (values[1:4, 4:7] == bee).all()
        assert (values[9:12, 9:12] == zed).all()
        assert (values[~here] == IGNORE).all()
    assert (grid(told, "count") == 0).all()
    assert (grid(told, "shape") == 0).all()
    assert np.isnan(told.boxes).all()


def test_one_character_alone_has_no_second() -> None:
    told = label(Scene("number", "white", texts=(Text("7", 0, ((0.0, 0.0, 0.5, 0.5),)),), ink="red"), SIDE)
    assert (grid(told, "character")[:6, :6] == CHARACTERS.index("7") + 1).all()
    assert (grid(told, "second_character") == 0).all()


def test_classes_stay_below_their_counts() -> None:
    crowded = Scene(
        "shapes", "gray", tuple(Thing("white", "diamond", (x / 6, 0.8, (x + 0.9) / 6, 1.0)) for x in range(6))
    )  # fmt: skip
    written = Scene(
        "receipt",
        "gray",
        texts=tuple(Text("FEATHER", row, tuple((c / 7, row / 5, (c + 1) / 7, (row + 1) / 5) for c in range(7)))
                    for row in range(5)),
        ink="black",
    )  # fmt: skip
    for scene in (crowded, written):
        told = label(scene, SIDE)
        for row, (name, classes) in zip(told.classes, CLASSES.items(), strict=True):
            assert row.max() < classes, name
            assert ((row >= 0) | (row == IGNORE)).all(), name


def test_the_letters_of_a_receipts_item_tell_which_it_is_and_others_that_they_are_none() -> None:
    def row(item: str, price: str, at: int) -> tuple[Text, Text]:
        top, bottom = 4 * at / 12, (4 * at + 3) / 12
        letters = tuple((column / 12, top, (column + 1) / 12, bottom) for column in range(len(item)))
        return Text(item, at, letters), Text(price, at, ((10 / 12, top, 1.0, bottom),))

    told = label(Scene("receipt", "white", texts=(*row("TEA", "4", 0), *row("XYZ", "7", 1)), ink="black"), SIDE)
    expected = np.full((SIDE, SIDE), IGNORE, int)
    expected[0:3, 0:3] = ITEMS.index("TEA") + 1
    expected[0:3, 10:12] = expected[4:7, 0:3] = expected[4:7, 10:12] = 0
    assert (grid(told, "item") == expected).all()


def test_what_is_written_elsewhere_is_no_item() -> None:
    told = label(Scene("word", "white", texts=(Text("T", 0, ((0.0, 0.0, 0.5, 0.5),)),), ink="red"), SIDE)
    assert (grid(told, "item") == IGNORE).all()
