"""Exams hold what they say, and answers are judged by what they say rather than by how it is written."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from sightline_models.demo import evaluate, fonts, words
from sightline_models.demo.evaluate import EXAMS, GREY, Exam, Item, Score, grade, iou, items, judge
from sightline_models.demo.questions import PAIR_TASKS, Asker, Conversation
from sightline_models.demo.scenes import Look, Scene, Thing

THINGS = (Thing("red", "circle", (0.1, 0.1, 0.3, 0.3)), Thing("blue", "star", (0.5, 0.4, 0.9, 0.8)))
SCENE = Scene("shapes", "white", THINGS)
DETECTED = '[{"label":"red circle","bbox":[10,10,30,30]},{"label":"blue star","bbox":[50,40,90,80]}]'
CAPTION = "2 objects on a white background: red circle, blue star"
SMALL = Look(sides=(48, 48), effects=False)


def item(task: str, truth: str) -> Item:
    image = Image.new("RGB", (40, 30), (1, 2, 3))
    return Item(Conversation(task, (("first?", "no"), ("asked?", truth))), (image,), (SCENE,))


@pytest.mark.parametrize(
    ("task", "truth", "right", "wrong"),
    [
        ("bg", "gray", ["gray", "Gray.", "  gray\n", "GRAY"], ["grey", "", "red", "gray gray"]),
        ("color", "red", ["Red", "red."], ["dark red", "orange"]),
        ("count", "3", ["3", "3.", " 3 "], ["three", "13", "3 4"]),
        ("where", "top left", ["Top left.", "top left"], ["left", "top", "top  left"]),
        ("further", "red circle", ["Red circle."], ["circle", "red", "blue star"]),
        ("missing", "There is no dog.", ["there is no dog", "There is no dog. "], ["There is no cat.", "brown"]),
        (
            "exist",
            "yes",
            ["yes", "Yes.", "Yes, there is.", "yes there is one", "YES!"],
            ["no", "", "Yesterday", "a yes"],
        ),
        ("rel", "no", ["No.", "no, it is not", "no"], ["yes", "not", "none", "."]),
        ("sum", "4+12=16", ["16", "4+12=16", "4 + 12 = 16.", "It is 16"], ["15", "4+12=15", "", "16+1", "no idea"]),
        ("sum3", "4+2+1=6+1=7", ["7", "4+2+1=7", "4+2+1=6+1=7"], ["4+2=6", "77"]),
        ("turns", "red circle", ["Red circle."], ["circle", "red"]),
        ("turns", "4+12=16", ["16", "4+12=16"], ["4+12=15"]),
        ("turns", "[]", ["[]"], ["", "[1]"]),
        ("turns", '{"label":"red circle","bbox":[10,10,30,30]}', ["[10,10,30,29]"], ["[10,10,20,20]", "red circle"]),
        (
            "turns",
            '[{"label":"red star","bbox":[1,1,9,9]}]',
            ['[{"label":"red star","bbox":[1,1,9,8]}]'],
            ["[1,1,9,9]"],
        ),
        ("fu_sum", "4+12=16", ["16"], ["28"]),
        ("text_sum", "0+0=0", ["0", "0+0=0"], ["", "00+1"]),
        ("total_added", "3+4=7", ["7", "The total is 7."], ["3+4"]),
        ("total", "16", ["16", "16."], ["9+7=16", "15"]),
        ("item", "7", ["7"], ["$8", "17"]),
        ("cmp_more", "the first", ["The first."], ["first", "the second"]),
        ("off_topic", "[]", ["[]", " [] "], ["[", "{}"]),
    ],
)
def test_a_short_answer_is_right_whatever_its_form(task: str, truth: str, right: list[str], wrong: list[str]) -> None:
    asked = item(task, truth)
    assert [said for said in right if judge(asked, said) != {task: 1.0}] == []
    assert [said for said in wrong if judge(asked, said) != {task: 0.0}] == []


@pytest.mark.parametrize(
    ("said", "marks"),
    [
        ('{"label":"red circle","bbox":[10,10,30,30]}', (1, 1, 1)),
        ("[10,10,30,30]", (0, 1, 1)),
        ("It is at [ 10, 10 , 30, 30 ], I think.", (0, 1, 1)),
        ('{"label":"red circle","bbox":[10,10,30,26]}', (0, 1, 1)),
        ('{"label":"red circle","bbox":[10,10,30,22]}', (0, 1, 0)),
        ('{"label":"red circle","bbox":[20,20,40,40]}', (0, 0, 0)),
        ('{"label":"red circle","bbox":[30,30,10,10]}', (0, 0, 0)),
        ('{"label":"red circle","bbox":[10,10,30', (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_a_box_counts_by_its_overlap(said: str, marks: tuple[int, ...]) -> None:
    truth = '{"label":"red circle","bbox":[10,10,30,30]}'
    assert tuple(judge(item("box", truth), said).values()) == marks
    assert list(judge(item("box", truth), said)) == ["box", "box@iou.5", "box@iou.7"]


def test_a_box_alone_is_the_right_answer_to_a_question_for_its_box() -> None:
    marks = judge(item("fu_box", "[10,10,30,30]"), "[10,10,30,30]")
    assert marks == {"fu_box": 1.0, "fu_box@iou.5": 1.0, "fu_box@iou.7": 1.0}


@pytest.mark.parametrize(
    ("said", "exact", "recall", "valid"),
    [
        (DETECTED, 1, 1.0, 1),
        ('[{"label":"blue star","bbox":[50,40,90,80]}, {"label":"red circle","bbox":[10,10,30,28]}]', 0, 1.0, 1),
        ('[{"label":"red circle","bbox":[10,10,30,30]}]', 0, 0.5, 1),
        ('[{"label":"red circle","bbox":[10,10,30,30]},{"label":"red circle","bbox":[10,10,30,30]}]', 0, 0.5, 1),
        ('[{"label":"red star","bbox":[50,40,90,80]},{"label":"red circle","bbox":[60,60,80,80]}]', 0, 0.0, 1),
        ("[]", 0, 0.0, 1),
        (DETECTED[:-5], 0, 0.0, 0),
        ('[{"label":"red circle","bbox":[10,10,30]}]', 0, 0.0, 0),
        ('[{"label":"red circle","bbox":[10,10,30,30,40]}]', 0, 0.0, 0),
        ('[{"label":"red circle","bbox":["a",10,30,30]}]', 0, 0.0, 0),
        ('[{"label":"red circle","bbox":null}]', 0, 0.0, 0),
        ('[{"bbox":[10,10,30,30]}]', 0, 0.0, 0),
        ('{"label":"red circle","bbox":[10,10,30,30]}', 0, 0.0, 0),
        ('["red circle"]', 0, 0.0, 0),
        ("[null]", 0, 0.0, 0),
        ("7", 0, 0.0, 0),
        ("null", 0, 0.0, 0),
        ("two objects", 0, 0.0, 0),
        ("", 0, 0.0, 0),
        ('[{"label":"red circle","bbox":[1e999,10,NaN,' + "9" * 400 + "]}]", 0, 0.0, 1),
    ],
)
def test_detection_counts_each_thing_once(said: str, exact: int, recall: float, valid: int) -> None:
    marks = judge(item("detect", DETECTED), said)
    assert marks == {"detect": exact, "detect_recall@.5": recall, "detect_validjson": valid}


@pytest.mark.parametrize(
    ("said", "exact", "count", "f1"),
    [
        (CAPTION, 1, 1, 1.0),
        (CAPTION.upper() + ".", 1, 1, 0.0),
        ("2 objects on a white background: blue star, red circle", 0, 1, 1.0),
        ("3 objects on a white background: red circle, blue star, blue star", 0, 0, 0.8),
        ("1 object on a white background: red circle", 0, 0, 2 / 3),
        ("a picture", 0, 0, 0.0),
        ("", 0, 0, 0.0),
    ],
)
def test_a_caption_is_judged_by_its_count_and_its_things(said: str, exact: int, count: int, f1: float) -> None:
    marks = judge(item("caption", CAPTION), said)
    assert marks["caption"] == exact
    assert marks["caption_count"] == count
    assert marks["caption_objF1"] == pytest.approx(f1)


def test_reading_is_judged_by_the_share_of_right_characters_too() -> None:
    asked = item("read_word", "PLANET")
    assert judge(asked, "PLANET") == {"read_word": 1.0, "read_word_charsim": 1.0}
    near = judge(asked, "PLANT")
    assert near["read_word"] == 0
    assert 0.8 < near["read_word_charsim"] < 1
    assert judge(asked, "")["read_word_charsim"] == 0


def test_the_first_measure_of_every_task_is_its_own() -> None:
    for exam in EXAMS.values():
        for asked in items(Exam("first", SMALL, exam.asker), 1, "first"):
            truth = asked.conversation.turns[-1][1]
            marks = judge(asked, truth)
            assert next(iter(marks)) == asked.task
            assert set(marks.values()) == {1.0}, asked.conversation


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),
        ((0, 0, 1, 1), (1, 1, 2, 2), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        (None, (0, 0, 1, 1), 0.0),
        (None, None, 0.0),
    ],
)
def test_overlap_is_the_shared_part_of_both(one: evaluate.Box | None, other: evaluate.Box | None, share: float) -> None:
    assert iou(one, other) == pytest.approx(share)
    assert iou(other, one) == pytest.approx(share)


def test_grey_items_ask_the_same_of_pictures_that_show_nothing() -> None:
    asked = item("bg", "white")
    grey = asked.grey()
    assert grey.conversation == asked.conversation
    assert [image.size for image in grey.images] == [image.size for image in asked.images]
    assert all(image.getcolors() == [(image.width * image.height, GREY)] for image in grey.images)
    assert asked.images[0].getpixel((0, 0)) == (1, 2, 3)


def test_grades_are_means_over_the_items_of_a_measure() -> None:
    asked = [item("bg", "red"), item("bg", "blue"), item("box", "[0,0,10,10]")]
    assert grade(asked, ["red", "red", "[0,0,10,6]"]) == {
        "bg": Score(0.5, 2),
        "box": Score(0.0, 1),
        "box@iou.5": Score(1.0, 1),
        "box@iou.7": Score(0.0, 1),
    }
    with pytest.raises(ValueError, match="shorter"):
        grade(asked, ["red"])


# Some kinds of question go by a finer name, which depends on what the picture has.
FINER = {
    "caption_text": "caption", "item_missing": "item", "total_added": "total", "sum3": "sum", "text_only": "chat",
    "text_sum": "chat", "read_number": "read", "read_numbers": "read", "read_word": "read", "read_receipt": "read",
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMS)
def test_an_exam_has_as_many_questions_of_each_kind_as_were_asked_for(name: str) -> None:
    exam = EXAMS[name]
    small = replace(exam, look=SMALL)
    made = items(small, 3, "count")
    counts = Counter((item.scenes[0].kind if item.scenes else "", FINER.get(item.task, item.task)) for item in made)
    assert set(counts.values()) == {3}
    kinds = {kind for kind, _ in counts}
    assert kinds == (
        {"number", "numbers", "word", "receipt"} if exam.writing_only else {"", "shapes", *evaluate._TEXT_TASKS}
    )
    if not exam.writing_only:
        tasks = {task for _, task in counts}
        assert tasks >= {*evaluate._SHAPE_TASKS, *PAIR_TASKS, "chat", "read", "sum", "item", "total"}
        assert all(len(item.images) == len(item.scenes) == 2 for item in made if item.task in PAIR_TASKS)


def test_an_exam_is_the_same_each_time_and_another_with_another_seed() -> None:
    exam = Exam("same", SMALL, Asker())
    one, two, other = (items(exam, 2, seed) for seed in ("a", "a", "b"))
    assert [(item.conversation, item.scenes) for item in one] == [(item.conversation, item.scenes) for item in two]
    assert [item.images[0].tobytes() for item in one if item.images] == [
        item.images[0].tobytes() for item in two if item.images
    ]
    shared = {scene for item in one for scene in item.scenes} & {scene for item in other for scene in item.scenes}
    assert not shared


def test_no_seed_of_an_exam_is_one_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's seeds begin with a whole number, the tokenizer's is a word."""
    seeds: list[str] = []
    dice = random.Random

    def note(seed: str) -> random.Random:
        seeds.append(seed)
        return dice(seed)

    monkeypatch.setattr(evaluate.random, "Random", note)
    for exam in EXAMS.values():
        items(replace(exam, look=SMALL), 1, "seed")
    assert len(seeds) == len(set(seeds)) > 100
    assert all(seed.startswith("held-out/") for seed in seeds)


def test_held_out_exams_show_what_no_training_showed() -> None:
    assert set(EXAMS["fonts"].look.fonts) == set(fonts.HELD_OUT)
    assert set(EXAMS["words"].look.words) == set(words.HELD_OUT)
    assert set(EXAMS["words"].look.items) == set(words.HELD_OUT_ITEMS)
    assert EXAMS["wordings"].asker.split == "held out"
    assert EXAMS["strangers"].asker.split == "strangers"
    assert EXAMS["plain"].asker.plain
    assert all(exam.look.made_up_words == 0 for exam in EXAMS.values())
    assert not any(exam.asker.sloppy for exam in EXAMS.values())
