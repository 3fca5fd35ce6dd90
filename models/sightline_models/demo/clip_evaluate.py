"""How well the tiny CLIP finds pictures by words and names what they show, on scenes that no training draws.

Knows scenes, descriptions and a folder that open_clip loads. Knows no training.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from sightline_models.demo import scenes
from sightline_models.demo.clip import FOLDER, Preprocess, load_clip
from sightline_models.demo.questions import an, describe
from sightline_models.demo.scenes import COLORS, FULL, KINDS, SHAPES, Look, Scene


@dataclass(frozen=True)
class Figure:
    """A share of right answers."""

    share: float
    chance: float
    """The share that guessing would have."""
    count: int
    """Answers that it is the share of."""


@torch.inference_mode()
def evaluate_clip(
    folder: Path = FOLDER, *, count: int = 1000, singles: int = 300, look: Look = FULL
) -> dict[str, Figure]:
    """How well the model in ``folder`` finds pictures by their descriptions, and the other way round.

    ``text_to_image/<kind>@<k>`` and ``image_to_text/<kind>@<k>``: the share of queries of a kind of scene, or of
    ``all``, whose own answer is among the first k of all ``count`` scenes', whatever their kind. No two scenes have the
    same description. ``zero_shot/shape``, ``/color`` and ``/both``: the share of ``singles`` pictures of one thing that
    are nearest to its name among all names. No training draws these scenes: their seeds begin otherwise.

    Raises FileNotFoundError when ``folder`` has no model.
    """
    model, preprocess, tokenize = load_clip(folder)
    different: dict[str, _Seen] = {}
    for seen in _held_out("retrieval", look, preprocess):
        different.setdefault(describe(seen.scene), seen)
        if len(different) == count:
            break
    images = _encoded(model, list(different.values()))
    texts = model.encode_text(tokenize(list(different)), normalize=True)
    kinds = [seen.scene.kind for seen in different.values()]
    figures = {f"text_to_image/{name}": figure for name, figure in recall(texts @ images.T, kinds).items()}
    figures |= {f"image_to_text/{name}": figure for name, figure in recall(images @ texts.T, kinds).items()}

    single = (seen for seen in _held_out("single", look, preprocess, "shapes") if len(seen.scene.things) == 1)
    pictures = list(islice(single, singles))
    images = _encoded(model, pictures)
    things = [seen.scene.things[0] for seen in pictures]
    both = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    for what, names, texts_of, truths in (
        ("shape", list(SHAPES), an, [thing.shape for thing in things]),
        ("color", list(COLORS), lambda color: f"{an(color)} object", [thing.color for thing in things]),
        ("both", both, an, [thing.name for thing in things]),
    ):
        nearest = (images @ open_clip.build_zero_shot_classifier(model, tokenize, names, [texts_of])).argmax(1)
        right = [names[index] == truth for index, truth in zip(nearest.tolist(), truths, strict=True)]
        figures[f"zero_shot/{what}"] = Figure(sum(right) / len(right), 1 / len(names), len(right))
    return figures


@dataclass(frozen=True)
class _Seen:
    """A scene, and its picture as the model takes it."""

    scene: Scene
    pixels: Tensor
    """[3, side, side]"""


def _held_out(seed: str, look: Look, preprocess: Preprocess, kind: str | None = None) -> Iterator[_Seen]:
    """Scenes without end."""
    rng = random.Random(f"held-out/clip/{seed}")
    while True:
        image, scene = scenes.draw(rng, look, kind)
        yield _Seen(scene, preprocess(image))


def _encoded(model: Any, seen: Sequence[_Seen]) -> Tensor:
    """Unit vectors [len(seen), embed_dim], a hundred at a time."""
    pixels = torch.stack([one.pixels for one in seen])
    return torch.cat([model.encode_image(part, normalize=True) for part in torch.split(pixels, 100)])


def recall(scores: Tensor, kinds: Sequence[str]) -> dict[str, Figure]:
    """``<kind>@<k>`` for queries of ``kinds``, with ``scores`` [queries, answers]; a query's own answer has its index.

    A query is answered by the k answers that score highest.
    """
    ranks = (scores > scores.diagonal()[:, None]).sum(1).tolist()
    figures = {}
    for kind in ("all", *KINDS):
        asked = [rank for rank, other in zip(ranks, kinds, strict=True) if kind in ("all", other)]
        for k in (1, 5, 10) if asked else ():
            figures[f"{kind}@{k}"] = Figure(sum(rank < k for rank in asked) / len(asked), k / len(ranks), len(asked))
    return figures
