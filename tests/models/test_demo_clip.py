"""The tiny CLIP: its folder as open_clip loads it, a start from another tower, a killed run, and its captions."""

import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from sightline_models.demo import captions, clip, scenes
from sightline_models.demo.batches import normalized, to_array
from sightline_models.demo.clip import CONTEXT, FOLDER, MODEL, SIDE, ClipSteps, export_clip, load_clip, train_clip
from sightline_models.demo.clip_evaluate import evaluate_clip, recall
from sightline_models.demo.text import BOS, EOS, PAD

LIMIT = 6_000_000
PLAIN = scenes.Look(sides=(96, 96), effects=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return clip.clip_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """Random, with weights that bfloat16 can hold."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = open_clip.CLIP(**MODEL).eval()
        for tensor in model.parameters():
            tensor.copy_(tensor.bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    export_clip(model, tokenizer, folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a run that saves after every step."""
    monkeypatch.setattr(clip, "clip_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(clip, "_SAVE_SECONDS", 0.0)
    return tmp_path / "run"


class Killed(BaseException):
    pass


class Kill:
    """An observer that ends the run after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def step(self, stage: str, progress: float, loss: float, pictures: int) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.steps:
            raise Killed

    def scores(self, stage: str, minutes: float, scores: dict[str, float]) -> None: ...


def red_circle() -> Image.Image:
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).ellipse((90, 40, 210, 160), fill=(220, 20, 40))
    return image


# ---- files --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_folder_gives_the_embeddings_that_were_exported(folder: Path, model: Any) -> None:
    loaded, preprocess, tokenize = load_clip(folder)
    pixels, tokens = preprocess(red_circle())[None], tokenize(["a red circle", "the word FISH"])
    assert all(torch.equal(tensor, loaded.get_parameter(name)) for name, tensor in model.named_parameters())
    # Not to the last bit: sums depend on where in memory a matrix lies.
    torch.testing.assert_close(loaded.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens), atol=1e-5, rtol=0)


def test_a_folder_is_small_and_readable_for_all(folder: Path) -> None:
    files = list(folder.iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMIT
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert {tensor.dtype for tensor in load_file(folder / "open_clip_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [(300, 200), (96, 96), (41, 190)])
def test_pictures_are_prepared_as_in_training(folder: Path, size: tuple[int, int]) -> None:
    image = red_circle().resize(size)
    ours = normalized(to_array(image, SIDE), torch.float32)
    torch.testing.assert_close(load_clip(folder)[1](image), ours, atol=1e-5, rtol=0)


def test_texts_are_padded_and_cut_and_always_end(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = load_clip(folder)[2](["a red circle", "FISH " * 40, ""])
    short, long, empty = tokens.tolist()
    assert tokens.shape == (3, CONTEXT)
    words = tokenizer.encode("a red circle", add_special_tokens=False).ids
    assert short == [BOS, *words, EOS, *[PAD] * (CONTEXT - 2 - len(words))]
    assert (long[0], long[-1]) == (BOS, EOS)
    assert PAD not in long
    assert empty == [BOS, EOS, *[PAD] * (CONTEXT - 2)]


@torch.inference_mode()
def test_what_follows_the_end_of_a_text_does_not_count(model: Any) -> None:
    tokens = torch.full((2, CONTEXT), PAD)
    tokens[:, :3] = torch.tensor([BOS, 300, EOS])
    tokens[1, 3:] = 17
    one, other = model.encode_text(tokens)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# ---- the tower ----------------------------------------------------------------------------------------------------


def write_tower(folder: Path, width: int = 192) -> Any:
    """A Hugging Face tower of five layers in ``folder``, none of its tensors at its usual start."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE,
        patch_size=8, hidden_act="quick_gelu", attn_implementation="eager",
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for tensor in tower.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    weights = {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return tower


@torch.inference_mode()
def test_a_tower_starts_as_the_first_layers_of_a_checkpoints(tmp_path: Path) -> None:
    theirs = write_tower(tmp_path)
    ours = open_clip.CLIP(**MODEL).eval()
    clip.load_tower(ours, tmp_path)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    hidden = theirs(pixels, output_hidden_states=True).hidden_states
    seen = ours.visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
    for index in range(4):
        prefix, patches = (seen[name][index] for name in ("image_intermediates_prefix", "image_intermediates"))
        torch.testing.assert_close(torch.cat([prefix, patches], 1), hidden[index + 1], atol=2e-4, rtol=1e-4)


def test_a_tower_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_tower(tmp_path, width=96)
    with pytest.raises(ValueError, match="Give the folder of a demo checkpoint"):
        clip.load_tower(open_clip.CLIP(**MODEL), tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"vision_tower.*Give the folder of a demo checkpoint"):
        clip.load_tower(open_clip.CLIP(**MODEL), tmp_path)


# ---- training -----------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_the_pictures_it_would_have_had(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = ClipSteps.__getitem__
    monkeypatch.setattr(ClipSteps, "__getitem__", lambda steps, step: drawn.append(step) or draw(steps, step))
    arguments: dict[str, Any] = {"rows": 4, "workers": 0, "target": run / "clip"}
    with pytest.raises(Killed):
        train_clip(10, run, observer=Kill(3), **arguments)
    saved = torch.load(run / "state.pt", weights_only=True)
    (run / "state.new").write_bytes(b"half a state")
    assert drawn == [0, 1, 2]
    assert saved["step"] == 3

    begun: list[dict[str, Tensor]] = []
    encode = open_clip.CLIP.encode_image

    def note(model: Any, *args: Any, **options: Any) -> Tensor:
        begun.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return encode(model, *args, **options)

    monkeypatch.setattr(open_clip.CLIP, "encode_image", note)
    with pytest.raises(Killed):
        train_clip(10, run, observer=Kill(1), **arguments)
    assert drawn == [0, 1, 2, 3]
    assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in begun[0].items())
    assert torch.load(run / "state.pt", weights_only=True)["seconds"] > saved["seconds"]
    with pytest.raises(ValueError, match="or another folder"):
        train_clip(10, run, seed=2, **arguments)


def test_a_step_is_the_same_whoever_draws_it() -> None:
    (one, told), (other, also_told), (next_one, _) = (ClipSteps(1, 3)[5], ClipSteps(1, 3)[5], ClipSteps(1, 3)[6])
    assert torch.equal(one, other)
    assert told == also_told
    assert len(told) == 6
    assert one.shape == (3, 3, SIDE, SIDE)
    assert not torch.equal(one, next_one)


def test_a_run_learns_writes_its_model_and_is_examined(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    write_tower(tmp_path)
    same = ClipSteps(1, 6)[0]
    monkeypatch.setattr(ClipSteps, "__getitem__", lambda steps, step: same)
    monkeypatch.setattr(clip, "_RISE", 1)
    watched = Kill(8)
    with pytest.raises(Killed):
        train_clip(10, run, rows=6, workers=0, tower=tmp_path, target=run / "clip", observer=watched)
    assert watched.losses[-1] < 0.7 * watched.losses[0], watched.losses

    target = train_clip(1e-9, run / "short", rows=2, workers=0, target=run / "clip")
    figures = evaluate_clip(target, count=8, singles=2, look=PLAIN)
    assert figures["text_to_image/all@5"].chance == 5 / 8
    assert figures["image_to_text/all@1"].count == 8
    assert (
        sum(figures[f"text_to_image/{kind}@1"].count for kind in scenes.KINDS if f"text_to_image/{kind}@1" in figures)
        == 8
    )
    assert figures["zero_shot/both"].chance == 1 / 84
    assert figures["zero_shot/shape"].count == 2


def test_recall_counts_queries_whose_answer_is_among_the_first() -> None:
    scores = torch.eye(12)
    scores[0, 1] = 2.0
    scores[1, 2:9] = 3.0
    figures = recall(scores, ["word"] * 2 + ["number"] * 10)
    assert figures["all@1"].share == 10 / 12
    assert figures["word@1"].share == 0
    assert figures["word@5"].share == 0.5
    assert figures["word@10"].share == 1
    assert figures["number@1"].count == 10
    assert "receipt@1" not in figures


# ---- captions -----------------------------------------------------------------------------------------------------


def test_captions_say_only_what_is_there() -> None:
    rng = random.Random("captions")
    for _ in range(300):
        _, scene = scenes.draw(rng, PLAIN)
        full, search = captions.full(rng, scene), captions.search(rng, scene)
        assert all(text.text in full for text in scene.texts)
        assert all(thing.color in full and thing.shape in full for thing in scene.things)
        there = {scene.background, scene.ink, *(thing.color for thing in scene.things)}
        for said in (full, search):
            words = {word.strip(",:") for word in said.split()}
            assert words & set(scenes.COLORS) <= there, said
            shapes = {word for word in scenes.SHAPES if word in words or f"{word}s" in words or f"{word}es" in words}
            assert shapes <= {thing.shape for thing in scene.things}, said
            assert {word for word in words if word.isupper() and len(word) > 1} <= {text.text for text in scene.texts}


def test_searches_tell_sides_and_numbers_truly() -> None:
    left = scenes.Thing("red", "circle", (0.0, 0.4, 0.2, 0.6))
    right = scenes.Thing("blue", "square", (0.8, 0.4, 1.0, 0.6))
    scene = scenes.Scene("shapes", "white", (left, right, scenes.Thing("blue", "ring", (0.8, 0.7, 1.0, 0.9))))
    rng = random.Random("sides")
    said = [captions.search(rng, scene) for _ in range(400)]
    assert any("a red circle left of a blue square" in text for text in said)
    assert not any("a red circle right of" in text or "a blue square left of a red" in text for text in said)
    assert any("a blue square above a blue ring" in text for text in said)
    assert any("blue objects" in text and ("two" in text or "2" in text) for text in said)
    assert any("a red circle on the left" in text for text in said)


# ---- the bundled one ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_bundled_one_tells_a_red_circle_from_a_blue_square() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LIMIT
    model, preprocess, tokenize = load_clip()
    image = model.encode_image(preprocess(red_circle())[None], normalize=True)
    red, blue = (image @ model.encode_text(tokenize(["red circle", "blue square"]), normalize=True).T)[0]
    assert red > blue
