"""Logits equal transformers' on the same checkpoint: every shape, name generation, prompt kind and way to step."""

from pathlib import Path

import pytest
import torch
from oracle import Case, PagedRun, Shape, load, make_case, reference_logits, save_random
from transformers import LlavaForConditionalGeneration

from sightline_models.vlm import Vlm

TOLERANCE = 1e-4

SHAPES = {
    # Heads of 16, untied, one file.
    "heads16": Shape(
        vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"image_size": 16, "patch_size": 4},
        text={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 260},
    ),
    # Grouped queries of heads of 64, tied, shards, module names, every token of the tower kept.
    "grouped64": Shape(
        vision={"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 24, "patch_size": 8, "hidden_act": "gelu"},
        text={"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        llava={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        names="new",
        shard_size="100KB",
    ),
    # One key head, an odd head size of its own, biases, several feature layers, shards under the published names.
    "wide48": Shape(
        vision={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
        | {"image_size": 24, "patch_size": 6},
        text={"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"num_key_value_heads": 1, "head_dim": 48, "vocab_size": 333, "attention_bias": True, "mlp_bias": True},
        llava={"vision_feature_layer": [-2, 1, 4, 0], "projector_hidden_act": "quick_gelu"},
        names="published",
        shard_size="60KB",
    ),
    # Llama 3's stretched positions, heads of 32, a projector without bias, a patch that doesn't divide the image.
    "llama3rope": Shape(
        vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 18, "patch_size": 4},
        text={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "vocab_size": 270, "max_position_embeddings": 512}
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        llava={"multimodal_projector_bias": False, "vision_feature_layer": 1},
        names="published",
    ),
    # Linear position scaling and the last layer but two.
    "linearrope": Shape(
        vision={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1}
        | {"image_size": 16, "patch_size": 8},
        text={"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"vocab_size": 262, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
        llava={"vision_feature_layer": -3, "projector_hidden_act": "gelu_pytorch_tanh"},
        names="new",
    ),
}


class Both:
    """One checkpoint in transformers and in ours, with prompts and their reference logits."""

    def __init__(self, theirs: LlavaForConditionalGeneration, ours: Vlm) -> None:
        self.theirs, self.ours = theirs, ours
        self.cases = [
            make_case(theirs, images=images, text=text, seed=seed)
            for seed, (images, text) in enumerate([(0, 13), (1, 6), (3, 5), (0, 1), (1, 30), (2, 2)])
        ]
        self.expected = [reference_logits(theirs, case) for case in self.cases]

    def check(self, run: PagedRun) -> None:
        for index, expected in enumerate(self.expected):
            assert expected.std() > 1, "the reference's logits are too flat to tell anything"
            difference = (run.result(index) - expected).abs().max().item()
            assert difference <= TOLERANCE, f"case {index} is off by {difference}"


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs = save_random(SHAPES[request.param], folder)
    return Both(theirs, load(folder))


def test_whole_prompts_one_at_a_time(both: Both) -> None:
    for case, expected in zip(both.cases, both.expected, strict=True):
        run = PagedRun(both.ours, [case])
        run.step({0: len(case)})
        assert (run.result(0) - expected).abs().max() <= TOLERANCE


def test_whole_prompts_in_one_step(both: Both) -> None:
    run = PagedRun(both.ours, both.cases)
    run.step({index: len(case) for index, case in enumerate(both.cases)})
    both.check(run)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks(both: Both, chunk: int) -> None:
    run = PagedRun(both.ours, both.cases, block_size=16)
    run.finish(chunk)
    both.check(run)


def test_decodes_beside_chunks_of_late_comers(both: Both) -> None:
    run = PagedRun(both.ours, both.cases, seed=1)
    for newest in range(len(both.cases)):
        # Everyone who came before decodes; the newest computes a first chunk.
        step = {index: 1 for index in range(newest) if run.done[index] < len(both.cases[index])}
        run.step(step | {newest: min(9, len(both.cases[newest]) - 1)})
    run.finish(5)
    both.check(run)


def test_row_invariant_steps(both: Both) -> None:
    run = PagedRun(both.ours, both.cases)
    while any(run.done[index] < len(case) for index, case in enumerate(both.cases)):
        left = {index: len(case) - run.done[index] for index, case in enumerate(both.cases)}
        run.step({index: min(3, count) for index, count in left.items() if count}, row_invariant=True)
    both.check(run)


def test_half_precision_errs_no_more_than_transformers(both: Both, tmp_path: Path) -> None:
    both.theirs.save_pretrained(tmp_path)
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    run = PagedRun(load(tmp_path, torch.bfloat16), both.cases)
    run.finish(7)
    expected = torch.cat(both.expected)
    ours = torch.cat([run.result(index) for index in range(len(both.cases))]) - expected
    theirs = torch.cat([reference_logits(half, case) for case in both.cases]) - expected
    assert ours.square().mean() <= 1.5 * theirs.square().mean()


def test_pictures_matter_and_their_order_too(both: Both) -> None:
    case = both.cases[5]
    swapped = Case(case.token_ids, case.pixels_NYXC.flip(0))
    touched = Case(case.token_ids, case.pixels_NYXC.clone())
    touched.pixels_NYXC[0, :5, :5] ^= 0x40
    for changed in (swapped, touched):
        expected = reference_logits(both.theirs, changed)
        run = PagedRun(both.ours, [changed])
        run.finish(1000)
        assert (run.result(0) - expected).abs().max() <= TOLERANCE
        assert (expected - both.expected[5]).abs().max() > 10 * TOLERANCE


@pytest.mark.gpu
def test_a_gpu_computes_the_same(both: Both, tmp_path: Path) -> None:
    both.theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, device="cuda")
    for row_invariant in (False, True):
        run = PagedRun(ours, both.cases)
        while any(run.done[index] < len(case) for index, case in enumerate(both.cases)):
            left = {index: len(case) - run.done[index] for index, case in enumerate(both.cases)}
            run.step({index: min(7, count) for index, count in left.items() if count}, row_invariant=row_invariant)
        both.check(run)
