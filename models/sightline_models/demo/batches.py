"""Pictures and conversations as the arrays that training steps take.

Knows scenes, questions, labels and tokens. Knows no weights. The pictures of a step follow from the seed, the stage,
the step and the rank alone, so a run that was interrupted goes on with the pictures it would have had.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sightline_models.demo import labels as labelling
from sightline_models.demo import scenes
from sightline_models.demo.questions import PAIR_TASKS, TASKS, Asker, joined
from sightline_models.demo.scenes import Look, Scene
from sightline_models.demo.text import PAD, SYSTEM_PROMPTS, Codec, Segment
from sightline_models.presets import CLIP_MEAN, CLIP_STD

_MEAN = torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255
_STD = torch.tensor(CLIP_STD).view(3, 1, 1) * 255

SEEING = Look(weights=(0.46, 0.12, 0.14, 0.16, 0.12))
"""The first stage's pictures: more writing, since a character is harder to tell than a shape."""


@dataclass(frozen=True)
class Layout:
    """How many conversations of what length go beside each other."""

    pictures: int
    groups: tuple[tuple[int, int], ...]
    """(segments, tokens in each)"""


ONE = Layout(1, ((12, 22), (5, 42)))
LONG = Layout(1, ((6, 22), (4, 50), (2, 150)))
PAIR = Layout(2, ((7, 26), (2, 64)))
NONE = Layout(0, ((24, 32),))


@dataclass
class Group:
    """Segments of one length: arrays [B, N, S]."""

    tokens: Tensor
    targets: Tensor
    """The token that each position should predict; -100 where nothing is asked."""
    weights: Tensor
    """Each target's share in the loss, float32."""
    last: Tensor
    """Whether each target belongs to the last answer."""
    tasks: list[list[str]]
    """[B][N], "" for a segment left empty."""


@dataclass
class Batch:
    """Rows that share a layout."""

    layout: Layout
    prefix: list[int]
    """Token ids that all rows begin with; pictures stand as the image token."""
    pixels: Tensor
    """uint8 [rows, pictures, 3, side, side]"""
    groups: list[Group]
    classes: Tensor
    """int64 [rows, labels, patches], for layouts of one picture; else empty."""
    boxes: Tensor
    """float32 [rows, patches, 4]"""

    @property
    def weight(self) -> float:
        return float(sum(group.weights.sum() for group in self.groups))


def to_array(image: Image.Image, side: int) -> Tensor:
    """uint8 [3, side, side]: what the processor makes of a picture, before it is normalized."""
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def normalized(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., 3, H, W] as CLIP's towers take it."""
    return ((pixels.float() - _MEAN.to(pixels.device)) / _STD.to(pixels.device)).to(dtype)


class SeeingSteps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Steps of the first stage: pixels [B, 3, side, side], classes [B, labels, patches], boxes [B, patches, 4]."""

    def __init__(self, seed: str, rows: int, side: int, grid: int) -> None:
        self.seed, self.rows, self.side, self.grid = seed, rows, side, grid

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        drawn = [scenes.draw(random.Random(f"{self.seed}/{step}/{row}"), SEEING) for row in range(self.rows)]
        return _pictures(drawn, self.side, self.grid)


def _pictures(drawn: Sequence[tuple[Image.Image, Scene]], side: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = [labelling.label(scene, grid) for _, scene in drawn]
    return (
        torch.stack([to_array(image, side) for image, _ in drawn]),
        torch.from_numpy(np.stack([label.classes for label in labels])).long(),
        torch.from_numpy(np.stack([label.boxes for label in labels])),
    )


class AnsweringSteps(Dataset[list[Batch]]):
    """Steps of the second stage: one or two batches each."""

    def __init__(self, seed: str, rows: int, side: int, grid: int, codec: Codec) -> None:
        self.seed, self.rows, self.side, self.grid, self.codec = seed, rows, side, grid, codec
        self.asker = Asker(sloppy=0.2)

    def __getitem__(self, step: int) -> list[Batch]:
        rng = random.Random(f"{self.seed}/{step}")
        if step % 5 == 0:
            return [self._single(rng, LONG, self._start(rng, step // 5))]
        if step % 5 == 2:
            return [self._pairs(rng), self._without(rng)]
        return [self._single(rng, ONE, self.codec.prefix(1, self.grid**2))]

    def _start(self, rng: random.Random, turn: int) -> list[int]:
        """What comes before the questions of a long step: in turn a system prompt, small talk, or only the picture."""
        kind, patches = turn % 8, self.grid**2
        if kind < len(SYSTEM_PROMPTS):
            return self.codec.prefix(1, patches, SYSTEM_PROMPTS[kind])
        return self.codec.prefix(1, patches, before=self.asker.chat(rng).turns if kind < 6 else ())

    def _single(self, rng: random.Random, layout: Layout, prefix: list[int]) -> Batch:
        kinds = [
            None if layout is ONE else rng.choice(("shapes", "shapes", "shapes", "receipt")) for _ in range(self.rows)
        ]
        drawn = [scenes.draw(rng, scenes.TRAINED, kind) for kind in kinds]
        segments = [self._about(rng, scene, layout) for _, scene in drawn]
        pixels, classes, boxes = _pictures(drawn, self.side, self.grid)
        return Batch(layout, prefix, pixels[:, None], _packed(segments, layout), classes, boxes)

    def _about(self, rng: random.Random, scene: Scene, layout: Layout) -> dict[int, list[Segment]]:
        tasks = dict(TASKS[scene.kind])
        if layout is ONE:
            tasks.pop("detect", None)
        elif scene.kind == "shapes":
            tasks["detect"] = 8.0
        else:
            tasks["caption"] = tasks["read"] = 8.0
        names, weights = list(tasks), list(tasks.values())

        def ask() -> Iterator[Segment]:
            for task in rng.choices(names, weights, k=60):
                conversation = self.asker.ask(rng, task, scene)
                if conversation:
                    yield self.codec.segment(conversation)

        return _fill(ask(), layout)

    def _pairs(self, rng: random.Random) -> Batch:
        names, weights = list(PAIR_TASKS), list(PAIR_TASKS.values())
        segments, pixels = [], []
        for _ in range(self.rows // 2):
            (one, first), (two, second) = (scenes.draw(rng, scenes.TRAINED, "shapes") for _ in range(2))
            asked = [self.asker.compare(rng, task, first, second) for task in rng.choices(names, weights, k=40)]
            asked[::4] = [joined(asked[at : at + 2]) for at in range(0, len(asked), 4)]
            segments.append(_fill((self.codec.segment(item) for item in asked if item), PAIR))
            pixels.append(torch.stack([to_array(one, self.side), to_array(two, self.side)]))
        prefix = self.codec.prefix(2, self.grid**2)
        return Batch(PAIR, prefix, torch.stack(pixels), _packed(segments, PAIR), torch.empty(0), torch.empty(0))

    def _without(self, rng: random.Random) -> Batch:
        rows = max(1, self.rows // 6)
        segments = [_fill(self._chats(rng), NONE) for _ in range(rows)]
        empty = torch.empty(rows, 0, 3, self.side, self.side, dtype=torch.uint8)
        return Batch(NONE, self.codec.prefix(0, 0), empty, _packed(segments, NONE), torch.empty(0), torch.empty(0))

    def _chats(self, rng: random.Random) -> Iterator[Segment]:
        for _ in range(40):
            chat = self.asker.chat(rng)
            more = joined([chat, self.asker.chat(rng)]) if rng.random() < 0.2 else None
            yield self.codec.segment(more or chat)


def _fill(segments: Iterator[Segment], layout: Layout) -> dict[int, list[Segment]]:
    """Segments by the length of the place they take, until the layout is full or there are no more."""
    room = {size: count for count, size in sorted(layout.groups, key=lambda group: group[1])}
    kept: dict[int, list[Segment]] = {size: [] for size in room}
    for segment in segments:
        size = next((size for size in room if len(kept[size]) < room[size] and len(segment.tokens) <= size), None)
        if size is not None:
            kept[size].append(segment)
        if all(len(kept[size]) == count for size, count in room.items()):
            break
    return kept


def _packed(rows: Sequence[dict[int, list[Segment]]], layout: Layout) -> list[Group]:
    groups = []
    for count, size in layout.groups:
        shape = (len(rows), count, size)
        tokens = torch.full(shape, PAD)
        targets = torch.full(shape, -100)
        weights = torch.zeros(shape)
        last = torch.zeros(shape, dtype=torch.bool)
        tasks = [[""] * count for _ in rows]
        for index, row in enumerate(rows):
            for slot, segment in enumerate(row[size]):
                length = len(segment.tokens)
                ids, told = torch.tensor(segment.tokens), torch.tensor(segment.answer[1:])
                tokens[index, slot, :length] = ids
                targets[index, slot, : length - 1][told] = ids[1:][told]
                # Long answers weigh more than short ones, but not as much more as they are longer.
                weights[index, slot, : length - 1][told] = float(told.sum()) ** -0.5
                last[index, slot, : length - 1] = torch.tensor(segment.last[1:])
                tasks[index][slot] = segment.task
        groups.append(Group(tokens, targets, weights, last, tasks))
    return groups
