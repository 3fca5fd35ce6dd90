"""The model as it is trained computes what transformers computes for the exported checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sightline_models.demo import network
from sightline_models.demo.batches import LONG, NONE, ONE, PAIR, AnsweringSteps, Batch, normalized
from sightline_models.demo.network import Shape, Weights
from sightline_models.demo.text import IMAGE, Codec

TOLERANCE = 1e-4
STEPS = {"ONE": (ONE, 1, 0), "LONG": (LONG, 5, 0), "PAIR": (PAIR, 2, 0), "NONE": (NONE, 2, 1)}
"""Layout, and where a batch of it is: the step and the place in it."""

Batches = Callable[[str], Batch]


@pytest.fixture(scope="module")
def reference(small_checkpoint: Path) -> Any:
    model = LlavaForConditionalGeneration.from_pretrained(
        small_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def batches(codec: Codec, small: Shape) -> Batches:
    steps = AnsweringSteps("network", 2, small.image_size, small.image_size // small.patch_size, codec)

    def find(name: str) -> Batch:
        layout, step, place = STEPS[name]
        batch = steps[step][place]
        assert batch.layout is layout
        return batch

    return find


def inputs(weights: Weights, shape: Shape, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Embeddings of the prefix, pictures in place, and of the groups."""
    rows = len(batch.pixels)
    tokens = torch.tensor(batch.prefix)
    prefix = network.embed(weights, tokens).repeat(rows, 1, 1)
    if batch.layout.pictures:
        features = network.tower(weights, shape, normalized(batch.pixels.flatten(0, 1), torch.float32))
        prefix[:, tokens == IMAGE] = network.project(weights, features).view(rows, -1, shape.width)
    return prefix, [network.embed(weights, group.tokens) for group in batch.groups]


@pytest.mark.parametrize("name", STEPS)
def test_conversations_side_by_side_get_the_logits_each_has_alone(
    reference: Any, batches: Batches, small: Shape, small_weights: Weights, name: str
) -> None:
    batch = batches(name)
    with torch.inference_mode():
        hidden = network.decode(small_weights, small, *inputs(small_weights, small, batch))
        for group, states in zip(batch.groups, hidden, strict=True):
            ours = F.linear(states, small_weights["lm_head.weight"])
            for row, pictures in enumerate(batch.pixels):
                count = group.tokens.shape[1]
                alone = torch.cat([torch.tensor(batch.prefix).expand(count, -1), group.tokens[row]], dim=1)
                pixels = normalized(pictures, torch.float32).repeat(count, 1, 1, 1) if len(pictures) else None
                theirs = reference(input_ids=alone, attention_mask=torch.ones_like(alone), pixel_values=pixels).logits[
                    :, len(batch.prefix) :
                ]
                assert theirs.std() > 0.1
                assert (ours[row] - theirs).abs().max() < TOLERANCE


def test_a_picture_gets_the_features_that_transformers_gives_it(
    reference: Any, batches: Batches, small: Shape, small_weights: Weights
) -> None:
    pixels = normalized(batches("ONE").pixels[:, 0], torch.float32)
    with torch.inference_mode():
        ours = network.project(small_weights, network.tower(small_weights, small, pixels))
        found = reference.get_image_features(pixel_values=pixels)
        theirs = torch.stack(list(getattr(found, "pooler_output", found)))
    assert theirs.std() > 0.1
    assert (ours - theirs.view_as(ours)).abs().max() < TOLERANCE


def test_no_conversation_sees_another_or_its_own_future(batches: Batches, small: Shape, small_weights: Weights) -> None:
    prefix, groups = inputs(small_weights, small, batches("LONG"))
    with torch.inference_mode():
        before = network.decode(small_weights, small, prefix, groups)
        groups[0][:, 2, 9:] += 1.0
        after = network.decode(small_weights, small, prefix, groups)
    changed = [(one - other).abs().amax(-1) > 1e-5 for one, other in zip(before, after, strict=True)]
    assert changed[0][:, 2, 9:].all()
    changed[0][:, 2, 9:] = False
    assert not any(map(torch.any, changed))


def test_every_weight_but_the_unused_norm_is_trained(batches: Batches, small: Shape, small_weights: Weights) -> None:
    weights = {name: value.clone().requires_grad_() for name, value in small_weights.items()}
    batch = batches("ONE")
    hidden = network.decode(weights, small, *inputs(weights, small, batch))
    losses = []
    for group, states in zip(batch.groups, hidden, strict=True):
        logits = F.linear(states[group.targets != -100], weights["lm_head.weight"])
        losses.append(F.cross_entropy(logits, group.targets[group.targets != -100]))
    torch.autograd.backward(torch.stack(losses).sum())
    untrained = {name for name, value in weights.items() if value.grad is None or not value.grad.any()}
    assert untrained == {name for name in weights if "post_layernorm" in name}
    assert len(untrained) == 2
    assert all(value.grad.isfinite().all() for value in weights.values() if value.grad is not None)


def test_a_checkpoint_keeps_every_weight_under_its_published_name(reference: Any, small_weights: Weights) -> None:
    theirs = dict(reference.state_dict())
    unprefixed = {name.replace("vision_tower.vision_model.", "vision_tower."): name for name in small_weights}
    assert len(theirs) == len(small_weights)
    for name, value in theirs.items():
        ours = small_weights[name] if name in small_weights else small_weights[unprefixed[name]]
        assert torch.equal(ours, value), name
