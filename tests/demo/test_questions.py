"""Every answer is worked out again here, from the question as it is written and the scene it is about.

Nothing of the making is used but the wordings, to know which words of a question are names.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import SequenceMatcher
from functools import cache
from itertools import product

import pytest

from sightline_models.demo import questions, scenes, words
from sightline_models.demo.questions import ABSENT, HELD_OUT_ABSENT, PAIR_TASKS, TASKS, Asker, Conversation, an, plural
from sightline_models.demo.scenes import COLORS, SHAPES, Look, Scene, Thing
from sightline_models.demo.wordings import WORDINGS, sentences

QUICK = Look(sides=(48, 48), effects=False)
SCENES = 220
ASKERS = {
    "trained": Asker(), "held out": Asker("held out"), "strangers": Asker("strangers"), "plain": Asker(plain=True),
}  # fmt: skip
NOUNS = ("object", "thing", "shape")
PLURALS = {
    "circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star", "rings": "ring",
    "crosses": "cross", "diamonds": "diamond", "objects": "object", "things": "thing", "shapes": "shape",
}  # fmt: skip
NEAR = 1e-9


# ---- reading questions --------------------------------------------------------------------------------------------


def meant(name: str, things: tuple[Thing, ...]) -> list[Thing]:
    """The things that a name like "red circle", "circle", "red object" or "red" fits. ValueError for no such name."""
    first, _, rest = name.partition(" ")
    color = first if first in COLORS else None
    shape = rest if color else name
    if shape in NOUNS or (color and not shape):
        shape = ""
    if (shape and shape not in SHAPES) or not (color or shape):
        raise ValueError(name)
    return [thing for thing in things if color in (None, thing.color) and shape in ("", thing.shape)]


def one_meant(name: str, scene: Scene) -> Thing:
    found = meant(name, scene.things)
    assert len(found) == 1, f"{name} names {len(found)} of {scene.things}"
    return found[0]


def counted(kind: str, scene: Scene) -> int:
    """How many things a plural like "red crosses" fits."""
    *color, noun = kind.split(" ")
    return len(meant(" ".join([*color, PLURALS[noun]]), scene.things))


AXES: dict[str, tuple[int, int]] = {
    "leftmost": (0, 1), "on the far left": (0, 1), "furthest left": (0, 1), "left": (0, 1), "left of": (0, 1),
    "rightmost": (0, -1), "on the far right": (0, -1), "furthest right": (0, -1), "right": (0, -1),
    "right of": (0, -1), "topmost": (1, 1), "at the top": (1, 1), "highest": (1, 1), "up": (1, 1), "above": (1, 1),
    "bottommost": (1, -1), "at the bottom": (1, -1), "lowest": (1, -1), "down": (1, -1), "below": (1, -1),
}  # fmt: skip
PARTS = {
    "side": "(?:to the )?(?:left|right) of|above|below", "way": "left|right|up|down", "which": "first|second",
    "image": "picture|image", "more": "bigger|larger|smaller|more|fewer",
    "most": "|".join([*AXES, "biggest", "largest", "smallest"]),
}  # fmt: skip


@cache
def patterns(task: str) -> list[re.Pattern[str]]:
    wordings = WORDINGS[task]
    made: list[re.Pattern[str]] = []
    for text in dict.fromkeys(
        text for line in (*wordings.trained, *wordings.held_out, *wordings.strangers) for text in sentences(line)
    ):
        parts = re.split(r"\{(\w+)\}", text)
        parts[::2] = map(re.escape, parts[::2])
        parts[1::2] = (f"(?P<{part}>{PARTS.get(part, '.+?')})" for part in parts[1::2])
        made.append(re.compile("".join(parts)))
    return made


def readings(task: str, question: str) -> list[dict[str, str]]:
    """The names in a question, by every wording it could be."""
    found = [match.groupdict() for pattern in patterns(task) if (match := pattern.fullmatch(question))]
    assert found, f"no wording of {task}: {question}"
    return found


def reading_of(task: str, question: str) -> dict[str, str]:
    """Of several readings the one with the longest wording."""
    return min(readings(task, question), key=lambda names: sum(map(len, names.values())))


def read(task: str, question: str, *keys: str) -> list[str]:
    """The names that stand for ``keys`` in a question."""
    reading = reading_of(task, question)
    return [reading[key] for key in keys]


# ---- answers, worked out ------------------------------------------------------------------------------------------


def middle(thing: Thing, axis: int) -> float:
    return (thing.box[axis] + thing.box[axis + 2]) / 2


def area(thing: Thing) -> float:
    left, top, right, bottom = thing.box
    return (right - left) * (bottom - top)


def names(scene: Scene) -> str:
    return ", ".join(f"{thing.color} {thing.shape}" for thing in sorted(scene.things, key=lambda t: middle(t, 0)))


def whole(thing: Thing) -> list[int]:
    return [round(100 * edge) for edge in thing.box]


def where(thing: Thing) -> str:
    for axis, border in product((0, 1), (1 / 3, 2 / 3)):
        assert abs(middle(thing, axis) - border) >= 0.03 - NEAR, "too near to the border of two answers"
    column, row = (0 if at < 1 / 3 else 1 if at < 2 / 3 else 2 for at in (middle(thing, 0), middle(thing, 1)))
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "center"


def extreme(phrase: str, scene: Scene, apart: float) -> Thing:
    axis, sign = AXES[phrase]
    first, second, *_ = sorted(scene.things, key=lambda thing: sign * middle(thing, axis))
    assert abs(middle(first, axis) - middle(second, axis)) >= apart - NEAR
    return first


def written(scene: Scene) -> str:
    texts = [text.text for text in scene.texts]
    if scene.kind == "receipt":
        return ", ".join(f"{item} {price}" for item, price in zip(texts[::2], texts[1::2], strict=True))
    return ", ".join(texts)


def prices(scene: Scene) -> dict[str, str]:
    texts = [text.text for text in scene.texts]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def added(numbers: list[int]) -> str:
    """As a person writes it down: two at a time, from the left."""
    steps = ["+".join(str(n) for n in (sum(numbers[:done]), *numbers[done:])) for done in range(1, len(numbers) + 1)]
    return "=".join(steps)


def color_answer(question: str, scene: Scene) -> str:
    return one_meant(*read("color", question, "a"), scene).color


def shape_answer(question: str, scene: Scene) -> str:
    return one_meant(*read("shape", question, "a"), scene).shape


def where_answer(question: str, scene: Scene) -> str:
    return where(one_meant(*read("where", question, "a"), scene))


def leftmost_answer(question: str, scene: Scene) -> str:
    return extreme(*read("leftmost", question, "most"), scene, 0.04).name


def exist_answer(question: str, scene: Scene) -> str:
    reading = reading_of("exist", question)
    if reading.get("bare"):
        *color, noun = reading["bare"].split(" ")
        name = " ".join([*color, PLURALS.get(noun, noun)])
    else:
        article, _, name = reading["a"].partition(" ")
        assert article == ("an" if name[0] in "aeiou" else "a")
    try:
        found = meant(name, scene.things)
    except ValueError:
        assert name in (*ABSENT, *HELD_OUT_ABSENT) or plural_of_absent(name)
        return "no"
    if not found and name.split(" ")[-1] in NOUNS:
        here = {thing.color for thing in scene.things} | {scene.background, scene.ink} - {""}
        assert all(scenes.distinct(name.split(" ")[0], color) for color in here), "something is nearly of that colour"
    return "yes" if found else "no"


def plural_of_absent(name: str) -> bool:
    return name in {plural(absent) for absent in (*ABSENT, *HELD_OUT_ABSENT)}


def rel_answer(question: str, scene: Scene) -> str:
    a, b, side = read("rel", question, "a", "b", "side")
    axis, sign = AXES[side.removeprefix("to the ")]
    one, other = one_meant(a, scene), one_meant(b, scene)
    assert abs(middle(one, axis) - middle(other, axis)) >= 0.08 - NEAR
    return "yes" if sign * middle(one, axis) < sign * middle(other, axis) else "no"


def further_answer(question: str, scene: Scene) -> str:
    a, b, way = read("further", question, "a", "b", "way")
    axis, sign = AXES[way]
    one, other = one_meant(a, scene), one_meant(b, scene)
    assert abs(middle(one, axis) - middle(other, axis)) >= 0.08 - NEAR
    return min(one, other, key=lambda thing: sign * middle(thing, axis)).name


def bigger_answer(question: str, scene: Scene) -> str:
    a, b, more = read("bigger", question, "a", "b", "more")
    small, big = sorted((one_meant(a, scene), one_meant(b, scene)), key=area)
    assert area(big) >= 1.4 * area(small) - NEAR
    return {"bigger": big, "larger": big, "smaller": small}[more].name


def biggest_answer(question: str, scene: Scene) -> str:
    (most,) = read("biggest", question, "most")
    order = sorted(scene.things, key=area, reverse=most != "smallest")
    assert most in ("biggest", "largest", "smallest")
    big, small = sorted(map(area, order[:2]), reverse=True)
    assert big >= 1.4 * small - NEAR
    return order[0].name


def caption_answer(question: str, scene: Scene) -> str:
    assert readings("caption", question)
    return caption(scene)


def caption(scene: Scene) -> str:
    ground = f"{'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"
    if scene.kind == "shapes":
        count = len(scene.things)
        return f"{count} object{'' if count == 1 else 's'} on {ground}: {names(scene)}"
    if scene.kind == "receipt":
        return f"A receipt: {written(scene)}"
    noun = {"number": "number", "numbers": "numbers", "word": "word"}[scene.kind]
    return f"The {noun} {written(scene).replace(', ', ' and ')} in {scene.ink} on {ground}"


def box_answer(question: str, scene: Scene) -> str:
    thing = one_meant(*read("box", question, "a"), scene)
    left, top, right, bottom = whole(thing)
    return f'{{"label":"{thing.name}","bbox":[{left},{top},{right},{bottom}]}}'


def detect_answer(question: str, scene: Scene) -> str:
    entries = [{"label": thing.name, "bbox": whole(thing)} for thing in scene.things]
    return json.dumps(entries).replace(", ", ",").replace(": ", ":") if readings("detect", question) else ""


def missing_answer(question: str, scene: Scene) -> str:
    for task in ("color", "where", "box", "shape"):
        for pattern in patterns(task):
            match = pattern.fullmatch(question)
            if match is None:
                continue
            name = match["a"] + (" object" if task == "shape" else "")
            try:
                assert not meant(name, scene.things), f"{name} is there: {scene.things}"
            except ValueError:
                if name not in (*ABSENT, *HELD_OUT_ABSENT):
                    continue
            return f"There is no {name}."
    raise AssertionError(question)


def read_answer(question: str, scene: Scene) -> str:
    task = {"number": "read_number", "numbers": "read_numbers", "word": "read_word", "receipt": "read_receipt"}
    return written(scene) if readings(task[scene.kind], question) else ""


def sum_answer(question: str, scene: Scene) -> str:
    assert readings("sum", question)
    return added([int(text.text) for text in scene.texts])


def item_answer(question: str, scene: Scene) -> str:
    (item,) = read("item", question, "item")
    assert item in (item.upper(), item.lower())
    return prices(scene).get(item.upper(), f"There is no {item}.")


def total_answer(question: str, scene: Scene) -> str:
    assert readings("total", question)
    told = prices(scene)
    return told.get("TOTAL") or added([int(price) for price in told.values()])


def ink_answer(question: str, scene: Scene) -> str:
    noun = {"number": "number", "word": "word"}.get(scene.kind, "writing")
    assert readings("ink", question)[-1].get("what", noun) in (noun, "text", "writing", "ink", "print")
    return scene.ink


def off_topic_answer(question: str, scene: Scene) -> str:
    if scene.kind == "shapes":
        kinds = ("read_word", "read_number", "read_numbers", "read_receipt", "ink")
        assert any(pattern.fullmatch(question) for kind in kinds for pattern in patterns(kind))
        return "There is no text."
    if any(pattern.fullmatch(question) for pattern in patterns("list")):
        return "There are no shapes."
    return "[]" if readings("detect", question) else ""


TALK = {
    "hello": "Hello! Ask me about the picture.", "thanks": questions.THANKS, "who": questions.WHO,
    "help": questions.HELP, "how": questions.HOW,
}  # fmt: skip


def talk_answer(question: str, scene: Scene) -> str:
    (kind,) = (kind for kind in TALK if any(pattern.fullmatch(question) for pattern in patterns(kind)))
    return TALK[kind]


Answer = Callable[[str, Scene], str]
ANSWERS: dict[str, Answer] = {
    "bg": lambda question, scene: scene.background if readings("bg", question) else "",
    "count": lambda question, scene: str(len(scene.things)) if readings("count", question) else "",
    "countx": lambda question, scene: str(counted(*read("countx", question, "kind"), scene)),
    "list": lambda question, scene: names(scene) if readings("list", question) else "",
    "color": color_answer, "shape": shape_answer, "where": where_answer, "leftmost": leftmost_answer,
    "exist": exist_answer, "rel": rel_answer, "further": further_answer, "bigger": bigger_answer,
    "biggest": biggest_answer, "caption": caption_answer, "box": box_answer, "detect": detect_answer,
    "missing": missing_answer, "read": read_answer, "sum": sum_answer, "item": item_answer, "total": total_answer,
    "ink": ink_answer, "off_topic": off_topic_answer, "talk": talk_answer,
}  # fmt: skip


def possible_answers(question: str, scene: Scene) -> set[str]:
    """The answers to a question of a kind that isn't told, by every kind it could be."""
    answers = set()
    for kind in set(TASKS[scene.kind]) & set(ANSWERS):
        with suppress(AssertionError, KeyError, ValueError):
            answers.add(ANSWERS[kind](question, scene))
    return answers


def follow_up(task: str, turns: tuple[tuple[str, str], ...], scene: Scene) -> tuple[str, str]:
    """Both answers of a conversation of two turns, the second understood from the first."""
    (before, _), (question, _) = turns
    first: dict[str, tuple[str, ...]] = {
        "fu_where": ("leftmost", "color", "shape", "exist"), "fu_box": ("leftmost", "color", "shape", "exist"),
        "fu_color": ("exist",), "fu_shape": ("shape",), "fu_count": ("exist",), "fu_list": ("count",),
        "fu_item": ("total", "item"), "fu_sum": ("read",),
    }  # fmt: skip
    kind = next(kind for kind in first[task] if kind == "read" or any(p.fullmatch(before) for p in patterns(kind)))
    answer = ANSWERS[kind](before, scene)
    assert readings("sum" if task == "fu_sum" else task, question)
    if task in ("fu_where", "fu_box", "fu_color", "fu_count"):
        if kind == "leftmost":
            found = [extreme("leftmost", scene, 0.08)]
        elif kind == "exist":
            reading = reading_of("exist", before)
            *color, noun = (reading.get("bare") or reading["a"].partition(" ")[2]).split(" ")
            found = meant(" ".join([*color, PLURALS.get(noun, noun)]), scene.things)
        else:
            found = meant(*read(kind, before, "a"), scene.things)
        if task == "fu_count":
            named = reading_of(task, question)
            assert "kind" not in named or counted(named["kind"], scene) == len(found)
            return answer, str(len(found))
        (thing,) = found
        told = {"fu_where": lambda: where(thing), "fu_box": lambda: json.dumps(whole(thing)).replace(" ", ""),
                "fu_color": lambda: thing.color}  # fmt: skip
        return answer, told[task]()
    if task == "fu_shape":
        (name,) = read(task, question, "a")
        return answer, one_meant(name, scene).shape
    if task == "fu_list":
        return answer, names(scene)
    if task == "fu_item":
        (item,) = read(task, question, "item")
        return answer, prices(scene)[item.upper()]
    return answer, sum_answer(question, scene)


# ---- the tests ----------------------------------------------------------------------------------------------------


def drawn(name: str, count: int, *kinds: str) -> Iterator[tuple[random.Random, Scene]]:
    for index in range(count):
        rng = random.Random(f"{name}/{index}")
        yield rng, scenes.draw(rng, QUICK, rng.choice(kinds or scenes.KINDS))[1]


WRITTEN = scenes.KINDS[1:]
CASES = [(task, ("shapes",)) for task in TASKS["shapes"]]
CASES += [
    (task, tuple(kind for kind in WRITTEN if task in TASKS[kind]))
    for task in dict.fromkeys(task for kind in WRITTEN for task in TASKS[kind])
]


@pytest.mark.parametrize("split", ASKERS)
@pytest.mark.parametrize(("task", "kinds"), CASES, ids=[f"{task}-{kinds[-1]}" for task, kinds in CASES])
def test_the_answer_follows_from_the_scene(task: str, kinds: tuple[str, ...], split: str) -> None:
    answers: dict[str, int] = defaultdict(int)
    for rng, scene in drawn(f"answers/{task}", SCENES, *kinds):
        conversation = ASKERS[split].ask(rng, task, scene)
        if conversation is None:
            continue
        told = tuple(answer for _, answer in conversation.turns)
        if task.startswith("fu_"):
            assert told == follow_up(task, conversation.turns, scene), (conversation, scene)
        elif task == "turns":
            assert len(told) in (2, 3)
            for question, answer in conversation.turns:
                assert answer in possible_answers(question, scene), (question, scene)
        else:
            assert told == (ANSWERS[task](conversation.turns[0][0], scene),), (conversation, scene)
        answers[told[-1]] += 1
    assert sum(answers.values()) > SCENES // 5, "asked too seldom"
    if task in ("exist", "rel") and kinds == ("shapes",):
        assert min(answers["yes"], answers["no"]) > 0.35 * sum(answers.values())


@pytest.mark.parametrize("split", ASKERS)
@pytest.mark.parametrize("task", PAIR_TASKS)
def test_the_answer_about_two_pictures_follows_from_both(task: str, split: str) -> None:
    asked = 0
    for rng, first in drawn(f"pairs/{task}", SCENES, "shapes"):
        second = scenes.draw(rng, QUICK, "shapes")[1]
        conversation = ASKERS[split].compare(rng, task, first, second)
        if conversation is None:
            continue
        asked += 1
        ((question, told),) = conversation.turns
        nth = {"first": first, "second": second}
        if task == "cmp_color":
            shape, which = read(task, question, "shape", "which")
            assert told == one_meant(shape, nth[which]).color
        elif task == "cmp_count":
            (which,) = read(task, question, "which")
            assert told == str(len(nth[which].things))
        elif task == "cmp_more":
            (more,) = read(task, question, "more")
            counts = {name: len(scene.things) for name, scene in nth.items()}
            assert counts["first"] != counts["second"]
            assert told == f"the {(max if more == 'more' else min)(counts, key=counts.__getitem__)}"
            assert more in ("more", "fewer")
        elif task == "cmp_which":
            reading = reading_of(task, question)
            article, _, name = (reading.get("a") or reading["a_cap"].lower()).partition(" ")
            assert article == ("an" if name[0] in "aeiou" else "a")
            (which,) = (number for number, scene in nth.items() if meant(name, scene.things))
            assert told == f"the {which}"
        else:
            assert readings(task, question)
            assert told == f"First: {names(first)}. Second: {names(second)}"
    assert asked > SCENES // 2


@pytest.mark.parametrize("split", ASKERS)
def test_without_a_picture_numbers_are_added_and_pictures_asked_for(split: str) -> None:
    rng = random.Random("chat")
    kinds: dict[str, int] = defaultdict(int)
    for _ in range(400):
        conversation = ASKERS[split].chat(rng)
        ((question, told),) = conversation.turns
        if conversation.task == "text_sum":
            assert told == added([int(number) for number in re.findall(r"\d+", question)])
            assert len(re.findall(r"\d+", question)) in (2, 3)
            kinds["sum"] += 1
        elif told == "There is no picture. Please attach one.":
            assert any(pattern.fullmatch(question) for task in WORDINGS for pattern in patterns(task))
            kinds["picture"] += 1
        else:
            talk = {**TALK, "hello": "Hello! Show me a picture and ask me about it."}
            (kind,) = (kind for kind in talk if any(pattern.fullmatch(question) for pattern in patterns(kind)))
            assert told == talk[kind]
            kinds["talk"] += 1
    assert min(kinds.values()) > 40
    assert len(kinds) == 3


def conversations(name: str, count: int, asker: Asker) -> Iterator[Conversation]:
    """Of every kind."""
    before = None
    for rng, scene in drawn(name, count):
        made = [asker.ask(rng, task, scene) for task in TASKS[scene.kind]]
        if scene.things:
            made += [asker.compare(rng, task, before, scene) for task in PAIR_TASKS if before]
            before = scene
        yield from (conversation for conversation in [*made, asker.chat(rng)] if conversation)


@pytest.mark.parametrize("split", ASKERS)
def test_questions_and_answers_are_whole_sentences_with_right_articles(split: str) -> None:
    for conversation in conversations("english", 150, ASKERS[split]):
        for question, answer in conversation.turns:
            assert "{" not in question, conversation
            assert "{" not in answer or json.loads(answer)
            for said in (question, answer):
                assert said
                assert said == said.strip()
                assert "  " not in said
                # Made-up words are in capitals.
                for article, word in re.findall(r"\b([Aa]n?) ([a-z]+)", said):
                    assert (article.lower() == "an") == (word[0] in "aeiou"), said
                assert not re.search(r"\bof of\b|above of|below of|\bthe the\b|\bthe (a|an|at|on)\b", said), said


def test_no_question_without_a_picture_stumbles() -> None:
    rng = random.Random("stumbles")
    asked = [Asker().chat(rng).turns[0][0] for _ in range(3000)]
    assert [question for question in asked if re.search(r"of of|above of", question)] == []


def test_articles_and_plurals_are_right() -> None:
    assert [an(name) for name in ("orange circle", "red star", "oval", "hexagon", "arrow")] == [
        "an orange circle", "a red star", "an oval", "a hexagon", "an arrow",
    ]  # fmt: skip
    assert {plural(name): name for name in (*SHAPES, *NOUNS)} == PLURALS
    assert plural("red cross") == "red crosses"


def test_absent_things_have_right_plurals() -> None:
    irregular = {"man": "men", "woman": "women", "fish": "fish", "person": "people"}
    assert [plural(name) for name in ABSENT if name in irregular] == [
        irregular[name] for name in ABSENT if name in irregular
    ]


def test_a_question_about_one_picture_has_one_answer() -> None:
    asker = Asker()
    for rng, scene in drawn("one", 60):
        answers: dict[tuple[str, ...], str] = {}
        for task in [*TASKS[scene.kind]] * 8:
            conversation = asker.ask(rng, task, scene)
            if conversation:
                *before, (question, told) = conversation.turns
                asked = (*(text for turn in before for text in turn), question.rstrip("?.!"))
                assert answers.setdefault(asked, told) == told, conversation


def plainly(text: str) -> str:
    return re.sub(r"\{\w+\}", "{}", text.lower().rstrip(".?!"))


def all_of(lines: tuple[str, ...]) -> list[str]:
    return [text for line in lines for text in sentences(line)]


def test_every_kind_of_question_has_trained_and_held_out_wordings_and_none_is_both() -> None:
    trained = {plainly(text): task for task, wordings in WORDINGS.items() for text in all_of(wordings.trained)}
    for task, wordings in WORDINGS.items():
        assert len(set(all_of(wordings.trained))) >= 15, task
        assert len(wordings.held_out) >= 2, task
        assert len(set(wordings.trained)) == len(wordings.trained)
        for text in all_of(wordings.held_out):
            assert plainly(text) not in trained, f"{text} of {task} is trained in {trained[plainly(text)]}"


def test_held_out_questions_are_never_those_of_training() -> None:
    trained = {
        question.lower().rstrip(".?!")
        for conversation in conversations("split", 250, Asker())
        for question, _ in conversation.turns
    }
    # Whether a picture without text is asked to be read hangs on the picture; no exam has that kind.
    held_out = {
        question.lower().rstrip(".?!")
        for conversation in conversations("split", 250, Asker("held out"))
        if conversation.task != "off_topic"
        for question, _ in conversation.turns
    }
    assert len(trained) > 1000
    assert len(held_out) > 500
    assert not trained & held_out


def test_the_plainest_wording_is_the_first() -> None:
    rng = random.Random("plain")
    scene = Scene("shapes", "white", (Thing("red", "circle", (0.1, 0.1, 0.3, 0.3)),))
    wanted = {
        "bg": ("What color is the background?", "white"),
        "color": ("What color is the circle?", "red"),
        "shape": ("What shape is the red object?", "circle"),
        "count": ("How many objects are there?", "1"),
        "list": ("List the objects from left to right.", "red circle"),
        "caption": ("Describe the picture.", "1 object on a white background: red circle"),
        "box": ("Give the bounding box of the red circle.", '{"label":"red circle","bbox":[10,10,30,30]}'),
        "detect": ("Detect all objects as JSON.", '[{"label":"red circle","bbox":[10,10,30,30]}]'),
    }
    asker = Asker(plain=True)
    assert {task: asker.ask(rng, task, scene) for task in wanted} == {
        task: Conversation(task, (turn,)) for task, turn in wanted.items()
    }


def test_sloppy_questions_lack_capitals_or_the_last_character_or_have_a_slip_in_a_word() -> None:
    rng = random.Random("form")
    neat = {wording.format(a="red circle") for wording in all_of(WORDINGS["where"].trained)}
    assert {Asker().word(rng, "where", a="red circle") for _ in range(1500)} == neat
    half = [Asker(sloppy=0.5).word(rng, "where", a="red circle") for _ in range(400)]
    assert 120 < sum(text in neat for text in half) < 280
    slips = 0
    for _ in range(300):
        text = Asker(sloppy=1.0).word(rng, "where", a="red circle")
        assert "red circle" in text
        if text.lower().rstrip(".?!") not in {wording.lower().rstrip(".?!") for wording in neat}:
            slips += 1
            meant = max(neat, key=lambda wording: SequenceMatcher(None, wording, text).ratio())
            assert len(meant) - len(text) in (0, 1)
            assert sum((Counter(meant) - Counter(text)).values()) == len(meant) - len(text)
    assert 60 < slips < 140


def test_absent_things_and_items_of_held_out_lists_are_asked_about_in_their_split_only() -> None:
    said: dict[str, set[str]] = {}
    for split in ("trained", "held out"):
        # Any word may stand on a receipt, and be asked about there.
        asked = [c for c in conversations("absent", 250, ASKERS[split]) if "item" not in c.task and c.task != "turns"]
        texts = [turn[0] for c in asked for turn in c.turns]
        said[split] = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert said["trained"] & set(ABSENT)
    assert said["held out"] & set(HELD_OUT_ABSENT)
    assert not said["trained"] & set(HELD_OUT_ABSENT)
    assert said["held out"] & set(ABSENT) <= {item.lower() for item in words.ITEMS}
