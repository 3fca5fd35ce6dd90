"""Exams for the demo model: held-out scenes with questions, and how answers are judged.

Knows scenes, questions and answers as text. Knows neither models nor servers: whoever gives an exam asks the questions.

Judging reads the answer, not its form: a final full stop, capital letters and blanks around it don't matter, a sum may
show its terms or not, and a box counts by how much it overlaps the true one.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from PIL import Image

from sightline_models.demo import fonts, words
from sightline_models.demo.questions import PAIR_TASKS, Asker, Conversation
from sightline_models.demo.scenes import COLORS, FULL, PLAIN, SHAPES, Box, Look, Scene, draw

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Item:
    """One question of an exam."""

    conversation: Conversation
    images: tuple[Image.Image, ...]
    scenes: tuple[Scene, ...]

    @property
    def task(self) -> str:
        return self.conversation.task

    @property
    def square(self) -> bool:
        return all(scene.aspect == 1 for scene in self.scenes)

    def grey(self) -> "Item":
        """The same question with plain grey pictures of the same sizes: what can be guessed without looking."""
        return replace(self, images=tuple(Image.new("RGB", image.size, GREY) for image in self.images))


@dataclass(frozen=True)
class Exam:
    """A set of questions."""

    name: str
    look: Look
    asker: Asker
    writing_only: bool = False
    """Questions about pictures with writing on them, and no others."""


_SHAPE_TASKS = (
    "bg", "color", "shape", "count", "countx", "where", "leftmost", "exist", "rel", "further", "bigger", "biggest",
    "caption", "list", "box", "detect", "missing", "fu_where", "fu_box", "fu_color", "fu_shape", "fu_count", "fu_list",
    "turns",
)  # fmt: skip
_TEXT_TASKS = {
    "number": ("read", "ink"), "numbers": ("read", "sum", "fu_sum"), "word": ("read", "caption"),
    "receipt": ("read", "item", "total", "fu_item", "turns"),
}  # fmt: skip

EXAMS = {
    exam.name: exam
    for exam in (
        Exam("plain", PLAIN, Asker(plain=True)),
        Exam("full", FULL, Asker()),
        Exam("wordings", FULL, Asker("held out")),
        Exam("strangers", FULL, Asker("strangers")),
        Exam("fonts", replace(FULL, fonts=fonts.HELD_OUT), Asker(), writing_only=True),
        Exam("words", replace(FULL, words=words.HELD_OUT, items=words.HELD_OUT_ITEMS), Asker(), writing_only=True),
    )
}
"""``plain``: clean square pictures in the plainest wording. ``full``: every size, shape, light and trained wording.
``wordings``, ``strangers``, ``fonts``, ``words``: as ``full``, with what no training ever showed."""


def items(exam: Exam, count: int, seed: str) -> list[Item]:
    """``count`` questions for each task, from pictures that training can't have drawn: its seeds begin otherwise."""
    seed = f"held-out/{exam.name}/{seed}"
    made: list[Item] = []
    for task in () if exam.writing_only else _SHAPE_TASKS:
        made += _collect(exam, task, "shapes", count, f"{seed}/{task}")
    for kind, tasks in _TEXT_TASKS.items():
        for task in tasks:
            made += _collect(exam, task, kind, count, f"{seed}/{kind}/{task}")
    if not exam.writing_only:
        for task in PAIR_TASKS:
            made += _collect_pairs(exam, task, count, f"{seed}/{task}")
        rng = random.Random(f"{seed}/chat")
        made += [Item(exam.asker.chat(rng), (), ()) for _ in range(count)]
    return made


def _collect(exam: Exam, task: str, kind: str, count: int, seed: str) -> list[Item]:
    made: list[Item] = []
    rng = random.Random(seed)
    while len(made) < count:
        image, scene = draw(rng, exam.look, kind)
        conversation = exam.asker.ask(rng, task, scene)
        if conversation is not None:
            made.append(Item(conversation, (image,), (scene,)))
    return made


def _collect_pairs(exam: Exam, task: str, count: int, seed: str) -> list[Item]:
    made: list[Item] = []
    rng = random.Random(seed)
    while len(made) < count:
        (one, first), (two, second) = (draw(rng, exam.look, "shapes") for _ in range(2))
        conversation = exam.asker.compare(rng, task, first, second)
        if conversation is not None:
            made.append(Item(conversation, (one, two), (first, second)))
    return made


@dataclass(frozen=True)
class Score:
    """A task's result."""

    mean: float
    count: int


def grade(asked: Sequence[Item], said: Sequence[str]) -> dict[str, Score]:
    """Mean of every measure over the items it applies to."""
    marks: dict[str, list[float]] = defaultdict(list)
    for item, answer in zip(asked, said, strict=True):
        for measure, mark in judge(item, answer).items():
            marks[measure].append(mark)
    return {measure: Score(sum(values) / len(values), len(values)) for measure, values in sorted(marks.items())}


# ---- judging ------------------------------------------------------------------------------------------------------


def judge(item: Item, said: str) -> dict[str, float]:
    """Marks from 0 to 1 by measure. The first is the task's own."""
    task, truth = item.task, item.conversation.turns[-1][1]
    said, exact = said.strip(), float(_same(said, truth))
    if task in ("box", "fu_box"):
        overlap = iou(_first_box(said), _first_box(truth))
        return {task: exact, f"{task}@iou.5": float(overlap >= 0.5), f"{task}@iou.7": float(overlap >= 0.7)}
    if task == "detect":
        recall, valid = _detected(said, truth)
        return {task: exact, "detect_recall@.5": recall, "detect_validjson": valid}
    if task == "caption":
        first = re.search(r"\d+", said)
        counted = first is not None and int(first[0]) == len(item.scenes[0].things)
        return {task: exact, "caption_count": float(counted), "caption_objF1": _named_f1(said, truth)}
    if task in ("read_number", "read_numbers", "read_receipt", "read_word"):
        return {task: exact, f"{task}_charsim": SequenceMatcher(None, said, truth).ratio()}
    if task in ("sum", "sum3", "fu_sum", "text_sum", "total_added"):
        return {task: float(_last_number(said) == _last_number(truth))}
    if task == "turns":
        return {task: _like(said, truth)}
    if task in ("exist", "rel"):
        return {task: float(_same(re.split(r"[\s,.!]", said, maxsplit=1)[0], truth))}
    return {task: exact}


def _same(one: str, other: str) -> bool:
    return one.strip().rstrip(".").lower() == other.strip().rstrip(".").lower()


def _like(said: str, truth: str) -> float:
    """A mark for an answer of any kind: boxes by their overlap, sums by their result, anything else as it stands."""
    if truth.startswith("["):
        return float(truth == said) if truth == "[]" else _detected(said, truth)[0]
    if _first_box(truth):
        return float(iou(_first_box(said), _first_box(truth)) >= 0.5)
    if "=" in truth:
        return float(_last_number(said) == _last_number(truth))
    return float(_same(said, truth))


def _last_number(text: str) -> int | None:
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


def _first_box(text: str) -> Box | None:
    found = re.search(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]", text)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return left, top, right, bottom


def iou(one: Box | None, other: Box | None) -> float:
    """Intersection over union of two boxes; 0 where there is none."""
    if one is None or other is None:
        return 0.0
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    common = max(across, 0) * max(down, 0)
    areas = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other))
    return common / (areas - common) if areas > common else 0.0


def _detected(said: str, truth: str) -> tuple[float, float]:
    """The share of true things found with their name and an overlap of 0.5, and whether the answer is valid."""
    wanted = json.loads(truth)
    try:
        told = json.loads(said)
        boxes = [(str(entry["label"]), _box(entry["bbox"])) for entry in told]
    except (ValueError, TypeError, KeyError):
        return 0.0, 0.0
    found = 0
    for entry in wanted:
        hits = [at for at, (name, box) in enumerate(boxes) if name == entry["label"] and iou(box, entry["bbox"]) >= 0.5]
        if hits:
            found += 1
            boxes.pop(hits[0])
    return found / len(wanted), 1.0


def _box(values: Iterable[object]) -> Box:
    """Raises ValueError for other than four numbers."""
    left, top, right, bottom = (float(str(value)) for value in values)
    return left, top, right, bottom


_NAME = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")


def _named_f1(said: str, truth: str) -> float:
    """F1 of the things named, each as often as it is there."""
    one, other = (Counter(_NAME.findall(text)) for text in (said, truth))
    common = sum((one & other).values())
    return 2 * common / (sum(one.values()) + sum(other.values())) if common else 0.0
