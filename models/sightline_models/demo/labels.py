"""What each patch of a picture shows, as targets for the first stage of training.

Knows scenes and arrays. Knows no questions and no torch.

The tower learns to see by predicting these from the projected feature of every patch, through linear maps that are
thrown away. A patch tells of the thing or character that covers most of it, and of the picture as a whole.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sightline_models.demo.questions import NINTHS
from sightline_models.demo.scenes import COLORS, SHAPES, Box, Scene
from sightline_models.demo.words import ITEMS

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLOR = {name: index for index, name in enumerate(COLORS)}
_PLACES = [name for row in NINTHS for name in row]
IGNORE = -100

CLASSES: dict[str, int] = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS),
    "background": len(COLORS),
    "character": len(CHARACTERS) + 1,
    "second_character": len(CHARACTERS) + 1,
    "row": 6,
    "column": 8,
    "length": 8,
    "count": 7,
    "same_color": 7,
    "same_shape": 7,
    "rank_x": 6,
    "rank_y": 6,
    "rank_size": 6,
    "place": len(_PLACES),
    "item": len(ITEMS) + 1,
}
"""Class counts. Class 0 of shape, characters and item is "none"; counts are their own class."""

LABELS = len(CLASSES)
OUTPUTS = sum(CLASSES.values()) + 4
"""Width of the linear map: all classes, then the thing's box."""


@dataclass(frozen=True)
class Labels:
    """Targets for one picture."""

    classes: NDArray[np.int16]
    """[labels, patches] in the order of ``CLASSES``; ``IGNORE`` where there is nothing to tell."""
    boxes: NDArray[np.float32]
    """[patches, 4] as fractions; NaN where there is no thing."""


def label(scene: Scene, side: int) -> Labels:
    """Targets for a grid of ``side`` x ``side`` patches."""
    classes = np.full((LABELS, side, side), IGNORE, np.int16)
    boxes = np.full((side, side, 4), np.nan, np.float32)
    put = {name: classes[index] for index, name in enumerate(CLASSES)}
    put["background"][:] = _COLOR[scene.background]
    put["count"][:] = len(scene.things)
    put["shape"][:] = 0
    put["character"][:] = 0
    put["second_character"][:] = 0
    if scene.things:
        _label_things(scene, side, put, boxes)
    if scene.texts:
        _label_texts(scene, side, put)
    return Labels(classes.reshape(LABELS, -1), boxes.reshape(-1, 4))


def _label_things(scene: Scene, side: int, put: dict[str, NDArray[np.int16]], boxes: NDArray[np.float32]) -> None:
    things = scene.things
    cover = _cover([thing.box for thing in things], side)
    for index, thing in enumerate(things):
        x, y = thing.center
        cover[index, min(int(y * side), side - 1), min(int(x * side), side - 1)] = 1
    winner, share = cover.argmax(0), cover.max(0)
    ranks = [
        _ranks([thing.center[0] for thing in things]),
        _ranks([thing.center[1] for thing in things]),
        _ranks([-(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in things]),
    ]
    for index, thing in enumerate(things):
        here = (winner == index) & (share >= 0.25)
        x, y = thing.center
        put["shape"][here] = SHAPES.index(thing.shape) + 1
        put["color"][here] = _COLOR[thing.color]
        put["same_color"][here] = sum(other.color == thing.color for other in things)
        put["same_shape"][here] = sum(other.shape == thing.shape for other in things)
        put["place"][here] = min(int(y * 3), 2) * 3 + min(int(x * 3), 2)
        for name, rank in zip(("rank_x", "rank_y", "rank_size"), ranks, strict=True):
            put[name][here] = rank[index]
        boxes[here] = thing.box


def _label_texts(scene: Scene, side: int, put: dict[str, NDArray[np.int16]]) -> None:
    entries = [
        (character, text.row, column, len(text.text))
        for text in scene.texts
        for column, character in enumerate(text.text)
    ]
    char_boxes = [box for text in scene.texts for box in text.boxes]
    cover = _cover(char_boxes, side)
    order = np.argsort(-cover, axis=0, kind="stable")
    best = order[0]
    share = np.take_along_axis(cover, order[:1], 0)[0]
    table = np.array([(CHARACTERS.index(char) + 1, row, column, size) for char, row, column, size in entries], np.int16)
    here = share >= 0.1
    for index, name in enumerate(("character", "row", "column", "length")):
        put[name][here] = table[best, index][here]
    put["color"][here] = _COLOR[scene.ink]
    if scene.kind == "receipt":
        items = [ITEMS.index(text.text) + 1 if text.text in ITEMS else 0 for text in scene.texts for _ in text.text]
        put["item"][here] = np.array(items, np.int16)[best][here]
    if len(entries) > 1:
        second = order[1]
        also = np.take_along_axis(cover, order[1:2], 0)[0] >= 0.1
        put["second_character"][also] = table[second, 0][also]


def _cover(boxes: list[Box], side: int) -> NDArray[np.float32]:
    """[boxes, side, side]: the share of each patch that each box covers."""
    edges = np.arange(side + 1) / side
    array = np.array(boxes)
    across = np.minimum(array[:, 2:3], edges[1:]) - np.maximum(array[:, 0:1], edges[:-1])
    down = np.minimum(array[:, 3:4], edges[1:]) - np.maximum(array[:, 1:2], edges[:-1])
    cover: NDArray[np.float32] = np.clip(down, 0, None)[:, :, None] * np.clip(across, 0, None)[:, None, :] * side * side
    return cover.astype(np.float32)


def _ranks(values: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(index) for index in range(len(values))]
