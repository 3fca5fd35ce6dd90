"""Loading: every tensor in its place or refused by name, no pickles, no code, memory for the weights once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import CLIP_NORMALIZATION, Case, PagedRun, load, reference_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sightline_models.checkpoint_files import read_entries
from sightline_models.config import CheckpointError, read_config
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import is_finite, load_vlm, random_vlm

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, names="old")
    return tmp_path


def bytes_on_disk(folder: Path) -> int:
    return sum(entry.num_bytes for entry in read_entries(folder))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def some_logits(vlm: Vlm) -> Tensor:
    config = vlm.config
    pixels = torch.arange(config.vision.image_size**2 * 3).remainder(251).to(torch.uint8)
    side = config.vision.image_size
    tokens = (1, 40, *[config.image_token_id] * config.num_image_tokens, 300, 301)
    run = PagedRun(vlm, [Case(tokens, pixels.view(1, side, side, 3))])
    run.finish(100)
    return run.result(0)


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_our_random_checkpoints_are_genuine(tmp_path: Path, names: str, shards: int, tied: bool) -> None:
    write_checkpoint(tmp_path, names=names, shards=shards, tie_word_embeddings=tied)  # type: ignore[arg-type]
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ours = load(tmp_path)
    tokens = (1, 40, *[4] * 16, 300, 301)
    case = Case(tokens, torch.arange(32 * 32 * 3).remainder(251).to(torch.uint8).view(1, 32, 32, 3))
    run = PagedRun(ours, [case])
    run.finish(100)
    expected = reference_logits(theirs.eval(), case)
    assert expected.std() > 1
    assert (run.result(0) - expected).abs().max() <= 1e-4


def test_seeds_and_dtypes_of_random_checkpoints(tmp_path: Path) -> None:
    results = []
    for name, seed, dtype in (("a", 1, "float32"), ("b", 1, "float32"), ("c", 2, "float32"), ("d", 1, "bfloat16")):
        write_checkpoint(tmp_path / name, seed=seed, dtype=dtype)  # type: ignore[arg-type]
        results.append(some_logits(load(tmp_path / name)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert read_config(tmp_path / "d").dtype == "bfloat16"
    assert bytes_on_disk(tmp_path / "d") * 2 == bytes_on_disk(tmp_path / "a")


def test_progress_grows_to_one(folder: Path) -> None:
    told: list[float] = []
    config = read_config(folder)
    load_vlm(
        folder,
        config,
        CLIP_NORMALIZATION,
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=told.append,
    )
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w: w.pop("language_model.model.layers.1.self_attn.k_proj.weight"),
            "layers.1.self_attn.k_proj.weight is",
        ),
        (lambda w: w.pop("language_model.lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda w: w.pop("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
            "layers.0.mlp.fc1.bias is missing",
        ),
        (lambda w: w.update({"image_newline": torch.zeros(3)}), "image_newline is unknown"),
        (
            lambda w: w.update({"language_model.model.layers.2.input_layernorm.weight": torch.ones(64)}),
            "layers.2.input_layernorm.weight is unknown",
        ),
        (
            lambda w: w.update({"vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias": torch.ones(64)}),
            "layers.3.mlp.fc1.bias is unknown",
        ),
        (
            lambda w: w.update({"language_model.model.norm.weight": torch.ones(63)}),
            r"model.norm.weight has shape \[63\] instead of \[64\]",
        ),
        (
            lambda w: w.update({"model.language_model.norm.weight": torch.ones(64)}),
            "model.language_model.norm.weight and .*are the same weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=sentence):
        load(folder)


def test_unused_weights_change_nothing(folder: Path) -> None:
    expected = some_logits(load(folder))

    def spoil(weights: dict[str, Tensor]) -> None:
        tower = "vision_tower.vision_model"
        for name in weights:
            if name.startswith((f"{tower}.encoder.layers.2.", f"{tower}.post_layernorm")):
                weights[name].fill_(float("nan"))
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(17)[None]
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(folder, spoil)
    assert torch.equal(some_logits(load(folder)), expected)


def test_without_its_unused_last_layer_a_tower_loads_too(folder: Path) -> None:
    expected = some_logits(load(folder))
    edit(folder, lambda w: [w.pop(name) for name in list(w) if "layers.2." in name or "post_layernorm" in name])
    assert torch.equal(some_logits(load(folder)), expected)


def test_a_head_saved_beside_its_tied_embedding_is_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = some_logits(load(tmp_path))
    edit(tmp_path, lambda w: w.update({"lm_head.weight": torch.full((512, 64), float("nan"))}))
    assert torch.equal(some_logits(load(tmp_path)), expected)


def test_E14_pickles_are_refused_unopened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    # Opening this would create the file named in it.
    canary = folder / "opened"
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model.bin\).*safetensors"):
        load(folder)
    assert not canary.exists()


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_entries(folder)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda content: b"", "claims"),
        (lambda content: content[:-1], "are there"),
        (lambda content: content + b"\0", "are there"),
        (lambda content: (2**63).to_bytes(8, "little") + content[8:], "claims"),
        (lambda content: content[:8] + b"[" + content[9:], "not an object"),
        (lambda content: content.replace(b'"F32"', b'"I32"', 1), "has dtype I32"),
        (lambda content: content.replace(b'"F32"', b'"Q99"', 1), "dtype Q99"),
        (lambda content: content.replace(b'"F32"', b'"F16"', 1), "claims .* bytes for shape"),
        (lambda content: content.replace(b'offsets":[0,', b'offsets":[4,', 1), "claims .* bytes for shape"),
        (lambda content: content.replace(b'"shape":[', b'"shape":[-', 1), "malformed"),
    ],
)
def test_E13_broken_files_are_named(folder: Path, spoil: Callable[[bytes], bytes], sentence: str) -> None:
    file = folder / WEIGHTS
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_E13_weights_that_are_not_numbers(folder: Path, number: float) -> None:
    edit(folder, lambda w: w["language_model.model.layers.0.mlp.up_proj.weight"].view(-1)[77:78].fill_(number))
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds .* not finite in float32"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_E13_one_number_that_is_none_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    for shape in ((1,), (67, 31), (1027,)):
        weights = torch.randn(shape, dtype=torch.float32).to(dtype)
        weights.view(-1)[0] = torch.finfo(dtype).max
        assert is_finite(weights)
        count = weights.numel()
        for place in {0, count - 1, *range(0, count, 101)}:
            for number in (float("nan"), float("inf"), float("-inf")):
                spoiled = weights.clone()
                spoiled.view(-1)[place] = number
                assert not is_finite(spoiled), (place, number)
                assert not is_finite(spoiled.expand(2, *shape).transpose(0, 1))


def test_weights_that_overflow_half_precision(folder: Path) -> None:
    edit(folder, lambda w: w["language_model.lm_head.weight"][3].fill_(1e5))
    load(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds .* not finite in float16.*--dtype"):
        load(folder, torch.float16)


def test_E13_shards_and_their_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    moved = tmp_path / "elsewhere"
    shard.rename(moved)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing.*download"):
        load(tmp_path)
    moved.rename(shard)
    index = tmp_path / INDEX
    content = json.loads(index.read_text())
    for name in ("../model.safetensors", "/etc/passwd", "model-00002-of-00003.bin"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"lm_head.weight": name}}))
        with pytest.raises(CheckpointError, match=r"names .* beside the index"):
            load(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index"):
        load(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        load(tmp_path)


def test_E13_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    first, second = (load_file(tmp_path / f"model-0000{i}-of-00002.safetensors") for i in (1, 2))
    name = next(iter(first))
    save_file(second | {name: first[name]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}, and so does model-00001"):
        load(tmp_path)


def test_memory_peaks_at_about_the_weights_once(tmp_path: Path) -> None:
    # 66 MB on disk in half precision, twice that loaded.
    write_checkpoint(
        tmp_path, dtype="bfloat16", vocab_size=16000, hidden_size=512, intermediate_size=2048, num_layers=4
    )
    code = """
import resource, sys, torch
from pathlib import Path
from sightline_models.config import Normalization, read_config
from sightline_models.weights import load_vlm
def load(folder):
    normalization = Normalization((0.5,) * 3, (0.5,) * 3, 1 / 255)
    config = read_config(folder)
    return load_vlm(folder, config, normalization, dtype=torch.float32, device=torch.device("cpu"))
load(Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vlm = load(Path(sys.argv[1]))
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(peak, sum(parameter.nbytes for parameter in vlm.parameters()))
"""
    write_checkpoint(tmp_path / "small")
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "small")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, weights = map(int, run.stdout.split())
    on_disk = bytes_on_disk(tmp_path)
    # Pages of the mapped file count as resident too; one matrix at a time may stand twice.
    assert peak < 1.3 * weights + on_disk, f"{peak} bytes for {weights} of weights and {on_disk} on disk"
    assert on_disk < 0.6 * weights, "a second copy of the weights would hide in the allowance"


def test_random_weights_sample_varied_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = read_config(tmp_path)

    def make(seed: int) -> Vlm:
        return random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=torch.device("cpu"), seed=seed)

    logits = some_logits(make(7))
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 4
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert entropy.min() > 3, "sampling would repeat a few tokens"
    assert torch.equal(some_logits(make(7)), logits)
    assert not torch.equal(some_logits(make(8)), logits)


def test_the_bundled_model_loads(demo_checkpoint_folder: Path) -> None:
    vlm = load(demo_checkpoint_folder)
    assert vlm.config.feature_layers == (-1,)
    assert some_logits(vlm).isfinite().all()
