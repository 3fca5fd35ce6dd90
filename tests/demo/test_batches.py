"""What a training step gets: tokens, the targets that follow from them, and the pictures they are about."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from sightline_models.config import read_config
from sightline_models.demo import scenes
from sightline_models.demo.batches import (
    LONG,
    NONE,
    ONE,
    PAIR,
    AnsweringSteps,
    Batch,
    Group,
    Layout,
    SeeingSteps,
    normalized,
    to_array,
)
from sightline_models.demo.labels import LABELS, label
from sightline_models.demo.questions import NO_PICTURE, TASKS, Asker
from sightline_models.demo.text import ASSISTANT, BOS, EOS, IMAGE, PAD, SYSTEM_PROMPTS, USER, Codec
from sightline_models.images import prepare, read_preprocess_config

SIDE, GRID, ROWS = 32, 4, 6


@pytest.fixture(scope="module")
def steps(codec: Codec) -> AnsweringSteps:
    return AnsweringSteps("seed", ROWS, SIDE, GRID, codec)


@pytest.fixture(scope="module")
def drawn(steps: AnsweringSteps) -> list[list[Batch]]:
    """Five steps: every layout there is."""
    return [steps[step] for step in range(5)]


def groups(drawn: list[list[Batch]]) -> list[Group]:
    return [group for step in drawn for batch in step for group in batch.groups]


def test_a_target_is_the_next_token_of_an_answer(codec: Codec, drawn: list[list[Batch]]) -> None:
    user, assistant = (codec.tokenizer.token_to_id(token) for token in (USER, ASSISTANT))
    seen = 0
    for group in groups(drawn):
        for tokens, targets in zip(
            group.tokens.flatten(0, 1).tolist(), group.targets.flatten(0, 1).tolist(), strict=True
        ):
            answering = False
            wanted = []
            for at, token in enumerate(tokens):
                answering = token == assistant or (answering and token != EOS)
                wanted.append(tokens[at + 1] if answering else -100)
            assert targets == wanted
            told = [token for token in targets if token != -100]
            if told:
                seen += 1
                assert told[-1] == EOS
                assert user not in told
                assert tokens.index(PAD) > tokens.index(EOS) if PAD in tokens else True
    assert seen > 200


def test_the_last_answer_is_marked_and_decodes_to_what_was_said(codec: Codec, drawn: list[list[Batch]]) -> None:
    boxes = counts = 0
    for group in groups(drawn):
        for row, tasks in enumerate(group.tasks):
            for slot, task in enumerate(tasks):
                asked = group.last[row, slot] & (group.targets[row, slot] != -100)
                answer = codec.tokenizer.decode(group.targets[row, slot][asked].tolist(), skip_special_tokens=False)
                if not task:
                    assert answer == ""
                    assert (group.tokens[row, slot] == PAD).all()
                    continue
                assert answer.endswith("</s>")
                assert answer.count("</s>") == 1
                answer = answer.removesuffix("</s>")
                if task == "box":
                    boxes += 1
                    assert len(json.loads(answer)["bbox"]) == 4
                if task == "count":
                    counts += 1
                    assert 1 <= int(answer) <= 6
                if task == "shape":
                    assert answer in scenes.SHAPES
    assert boxes > 5
    assert counts > 0


def test_an_answer_weighs_as_the_root_of_its_length(drawn: list[list[Batch]]) -> None:
    for group in groups(drawn):
        asked = group.targets != -100
        assert (group.weights[~asked] == 0).all()
        lengths = asked.sum(-1)
        assert torch.allclose(group.weights.sum(-1), lengths.float().sqrt())
        # All of a segment's targets weigh the same.
        shares = torch.where(asked, group.weights, torch.nan)
        assert torch.allclose(shares[asked], lengths.float().rsqrt()[..., None].expand_as(shares)[asked])


def test_every_layout_occurs_and_no_group_is_overfull(drawn: list[list[Batch]]) -> None:
    layouts = [tuple(batch.layout for batch in step) for step in drawn]
    assert layouts == [(LONG,), (ONE,), (PAIR, NONE), (ONE,), (ONE,)]
    for step in drawn:
        for batch in step:
            rows = len(batch.pixels)
            assert rows == {0: 1, 1: ROWS, 2: ROWS // 2}[batch.layout.pictures]
            for group, (count, size) in zip(batch.groups, batch.layout.groups, strict=True):
                for array in (group.tokens, group.targets, group.weights, group.last):
                    assert array.shape == (rows, count, size)
                assert [len(tasks) for tasks in group.tasks] == [count] * rows
                # What is longer than its place would have been cut off, with its end.
                filled = torch.tensor([[bool(task) for task in tasks] for tasks in group.tasks])
                assert ((group.targets == EOS).any(-1) == filled).all()


def test_places_are_mostly_taken(steps: AnsweringSteps) -> None:
    taken: dict[Layout, list[bool]] = {ONE: [], LONG: [], PAIR: [], NONE: []}
    for step in (0, 1, 2):
        for batch in steps[step]:
            taken[batch.layout] += [bool(task) for group in batch.groups for tasks in group.tasks for task in tasks]
    shares = {layout: sum(taken[layout]) / len(taken[layout]) for layout in taken}
    assert all(share > 0.8 for share in shares.values()), shares


def test_prefixes_hold_as_many_pictures_as_the_layout(codec: Codec, drawn: list[list[Batch]]) -> None:
    user = codec.tokenizer.token_to_id(USER)
    for step in drawn:
        for batch in step:
            assert batch.prefix.count(IMAGE) == batch.layout.pictures * GRID**2
            assert batch.prefix[0] == BOS
            assert batch.prefix.count(user) == 1
            assert batch.pixels.shape[1:] == (batch.layout.pictures, 3, SIDE, SIDE)
            assert batch.pixels.dtype == torch.uint8
            if batch.layout.pictures == 1:
                assert batch.classes.shape == (ROWS, LABELS, GRID**2)
                assert batch.boxes.shape == (ROWS, GRID**2, 4)
            else:
                assert batch.classes.numel() == batch.boxes.numel() == 0


def test_system_prompts_come_before_some_long_conversations(codec: Codec) -> None:
    steps = AnsweringSteps("system", 1, SIDE, GRID, codec)
    told = [codec.tokenizer.decode(steps[step][0].prefix) for step in range(0, 40, 5)]
    assert [any(text.startswith(prompt) for prompt in SYSTEM_PROMPTS) for text in told] == [True] * 4 + [False] * 4


def test_small_talk_comes_before_the_picture_of_some_long_conversations(codec: Codec) -> None:
    user = codec.tokenizer.token_to_id(USER)
    steps = AnsweringSteps("small talk", 1, SIDE, GRID, codec)
    prefixes = [steps[step][0].prefix for step in range(0, 40, 5)]
    assert [prefix.count(user) for prefix in prefixes] == [1, 1, 1, 1, 2, 2, 1, 1]
    assert all(prefix.index(EOS) < prefix.index(IMAGE) for prefix in prefixes[4:6])


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.prefix == b.prefix
        and torch.equal(a.pixels, b.pixels)
        and torch.equal(a.classes, b.classes)
        and torch.equal(a.boxes.nan_to_num(-1), b.boxes.nan_to_num(-1))
        and all(
            torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets) and x.tasks == y.tasks
            for x, y in zip(a.groups, b.groups, strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


def test_a_step_hangs_on_seed_and_number_only(codec: Codec) -> None:
    steps = AnsweringSteps("seed", 2, SIDE, GRID, codec)
    steps[6]
    after = steps[7]
    assert same(AnsweringSteps("seed", 2, SIDE, GRID, codec)[7], after)
    assert not same(AnsweringSteps("seed", 2, SIDE, GRID, codec)[12], after)
    assert not same(AnsweringSteps("other", 2, SIDE, GRID, codec)[7], after)


def test_a_step_of_seeing_hangs_on_seed_and_number_only() -> None:
    steps = SeeingSteps("seed", 3, SIDE, GRID)
    steps[6]
    after = steps[7]
    again = SeeingSteps("seed", 3, SIDE, GRID)[7]
    assert all(torch.equal(one.nan_to_num(-1), two.nan_to_num(-1)) for one, two in zip(again, after, strict=True))
    assert not torch.equal(SeeingSteps("other", 3, SIDE, GRID)[7][0], after[0])
    assert len({tuple(picture.flatten().tolist()) for picture in after[0]}) == 3


def test_a_step_of_seeing_has_the_labels_of_its_pictures() -> None:
    pixels, classes, boxes = SeeingSteps("seed", 4, SIDE, GRID)[3]
    assert pixels.dtype == torch.uint8
    for row in range(4):
        rng = random.Random(f"seed/3/{row}")
        image, scene = scenes.draw(rng, scenes.Look(weights=(0.46, 0.12, 0.14, 0.16, 0.12)))
        wanted = label(scene, GRID)
        assert torch.equal(pixels[row], to_array(image, SIDE))
        assert torch.equal(classes[row], torch.from_numpy(wanted.classes).long())
        assert np.array_equal(boxes[row].numpy(), wanted.boxes, equal_nan=True)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_pictures_are_prepared_as_the_server_and_transformers_prepare_them(small_checkpoint: Path, kind: str) -> None:
    image, _ = scenes.draw(random.Random(kind), scenes.TRAINED, kind)
    ours = to_array(image, SIDE)
    served = prepare(image, read_preprocess_config(small_checkpoint, read_config(small_checkpoint)))
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), served.pixels)
    processor = AutoImageProcessor.from_pretrained(small_checkpoint)
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    # A few steps of 255 at edges: torchvision resamples in another order than Pillow.
    away = (normalized(ours, torch.float32) - theirs).abs() * 255 * 0.27
    assert away.mean() < 0.5
    assert away.max() < 12


def test_conversations_without_a_picture_ask_for_one_or_add_numbers(drawn: list[list[Batch]], codec: Codec) -> None:
    (none,) = [batch for batch in drawn[2] if batch.layout is NONE]
    texts = [
        codec.tokenizer.decode(row[row >= 0].tolist()) for group in none.groups for row in group.targets.flatten(0, 1)
    ]
    assert any(text == NO_PICTURE for text in texts)
    assert any("=" in text for text in texts)


def test_every_answer_has_room_in_some_layout(codec: Codec) -> None:
    rng, asker, quick = random.Random("room"), Asker(), scenes.Look(sides=(48, 48), effects=False)
    longest = max(size for layout in (ONE, LONG) for _, size in layout.groups)
    turns = []
    for _ in range(150):
        _, scene = scenes.draw(rng, quick)
        for task in TASKS[scene.kind]:
            conversation = asker.ask(rng, task, scene)
            if conversation and task == "turns":
                turns.append(len(codec.segment(conversation).tokens) <= longest)
            elif conversation:
                assert len(codec.segment(conversation).tokens) <= longest, conversation
    # Two answers with every box in them are too long together.
    assert sum(turns) >= 0.95 * len(turns) > 50


def test_the_boxes_of_six_things_have_room(codec: Codec) -> None:
    rng, asker, quick = random.Random("six"), Asker(), scenes.Look(sides=(48, 48), effects=False)
    six = [scene for _ in range(200) if len((scene := scenes.draw(rng, quick, "shapes")[1]).things) == 6]
    asked = [asker.ask(rng, "detect", scene) for scene in six]
    lengths = [len(codec.segment(conversation).tokens) for conversation in asked if conversation]
    assert len(lengths) > 5
    assert max(lengths) <= max(size for _, size in LONG.groups)
