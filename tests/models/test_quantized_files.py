"""Checkpoints that bitsandbytes quantized and transformers saved: they load as they lie, or say what is amiss."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_oracle import SAVED, SHAPES, TOLERANCE, cases_of, largest_difference, our_logits, save_quantized
from oracle import load, reference_logits, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor

from sightline_kernels.nf4_linear.reference import CompressedScales
from sightline_models.config import CheckpointError, read_config
from sightline_models.quantization_config import Quantization
from sightline_models.quantize import Int8Linear, Nf4Linear, SideBySide

PLAIN = SHAPES["plain"]


@pytest.fixture(autouse=True, scope="module")
def _without_a_compiler() -> Iterator[None]:
    """bitsandbytes compiles what it does with odd shapes, for every shape anew."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_saved_by_transformers_load_as_they_lie(kind: str, shape: str, tmp_path: Path) -> None:
    save_random(SHAPES[shape], tmp_path / "plain")
    options = dict(SAVED[kind])
    if shape == "odd" and "llm_int8_skip_modules" in options:
        # Its head is tied to the embedding, which is none of bitsandbytes' layers.
        options["llm_int8_skip_modules"] = [*options["llm_int8_skip_modules"], "lm_head"]
    theirs = save_quantized(tmp_path / "plain", tmp_path / "quantized", options)
    scheme: Quantization = "int8" if "int8" in kind else "nf4"
    config = read_config(tmp_path / "quantized")
    assert (config.quantization, config.compressed_scales) == (scheme, "double" in kind)
    cases = cases_of(theirs)
    expected = [reference_logits(theirs, case) for case in cases]
    vlm = load(tmp_path / "quantized")
    assert largest_difference(our_logits(vlm, cases), expected) <= TOLERANCE
    for part in (vlm.vision, vlm.projector):
        quantized = [module for module in part.modules() if isinstance(module, Int8Linear | Nf4Linear | SideBySide)]
        # "Some" leaves out the tower alone.
        assert bool(quantized) == ("some" not in kind or part is vlm.projector)
    # Asked for by name, the same; asked for otherwise, refused.
    assert largest_difference(our_logits(load(tmp_path / "quantized", quantize=scheme), cases), expected) <= TOLERANCE
    other: Quantization = "nf4" if scheme == "int8" else "int8"
    with pytest.raises(CheckpointError, match=f"--quantize {other}.*already quantized, as {scheme}.*leave --quantize"):
        load(tmp_path / "quantized", quantize=other)
    with pytest.raises(CheckpointError, match=f"--quantize-vision.*already quantized, as {scheme}.*leave --quantize-v"):
        load(tmp_path / "quantized", quantize=scheme, quantize_vision=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vision", [False, True], ids=["decoder", "tower too"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_is_made_here_has_the_bytes_that_transformers_saves(
    scheme: Quantization, vision: bool, tmp_path: Path
) -> None:
    save_random(PLAIN, tmp_path / "plain")
    # Left to itself, transformers quantizes all but the head.
    skipped = {"llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]}
    save_quantized(tmp_path / "plain", tmp_path / "quantized", SAVED[scheme] | ({} if vision else skipped))
    made = load(tmp_path / "plain", quantize=scheme, quantize_vision=vision)
    saved = load(tmp_path / "quantized")
    ours, theirs = dict(made.named_buffers()), dict(saved.named_buffers())
    assert ours.keys() == theirs.keys()
    # Four layers of the decoder and of the tower have one matrix after fusing, and the projector has two.
    codes = sum(name.endswith("codes_OI" if scheme == "int8" else "packed_Q") for name in ours)
    assert codes == 4 * 2 + (4 * 2 + 2 if vision else 0)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Every matrix of the decoder has whole groups of scales, so that fused ones keep theirs compressed.
WHOLE_GROUPS = replace(
    PLAIN,
    text=PLAIN.text
    | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
)


@pytest.mark.filterwarnings("ignore")
def test_compressed_scales_stay_compressed(tmp_path: Path) -> None:
    save_random(WHOLE_GROUPS, tmp_path / "plain")
    theirs = save_quantized(tmp_path / "plain", tmp_path / "quantized", SAVED["nf4, double"])
    vlm, cases = load(tmp_path / "quantized"), cases_of(theirs)
    expected = [reference_logits(theirs, case) for case in cases]
    assert largest_difference(our_logits(vlm, cases), expected) <= TOLERANCE
    made = [module for module in vlm.decoder.modules() if isinstance(module, Nf4Linear)]
    assert len(made) == 4 * 2
    for linear in made:
        scales, weights = linear.scales, linear.out_features * linear.in_features
        assert isinstance(scales, CompressedScales)
        kept = (scales.codes_K, scales.absmax_C, scales.offset_C)
        assert linear.packed_Q.nbytes == weights // 2
        assert sum(tensor.nbytes for tensor in kept) == weights // 64 + 2 * 4 * weights // (64 * 256)
        assert not any(name == "absmax_K" for name, _ in linear.named_buffers())
    qkv = vlm.decoder.layers[0].get_submodule("attention.qkv")
    assert isinstance(qkv, Nf4Linear)
    assert isinstance(qkv.scales, CompressedScales)
    assert qkv.scales.offset_C.unique().numel() == 3, "three matrices have three means"


@pytest.mark.filterwarnings("ignore")
def test_scales_whose_groups_do_not_meet_are_made_whole(tmp_path: Path) -> None:
    save_random(PLAIN, tmp_path / "plain")
    save_quantized(tmp_path / "plain", tmp_path / "quantized", SAVED["nf4, double"])
    layer = load(tmp_path / "quantized").decoder.layers[0]
    qkv, o = layer.get_submodule("attention.qkv"), layer.get_submodule("attention.o")
    assert isinstance(qkv, Nf4Linear)
    assert isinstance(o, Nf4Linear)
    assert isinstance(qkv.scales, Tensor)
    assert isinstance(o.scales, CompressedScales)
    weights = load_file(tmp_path / "quantized" / "model.safetensors")
    whole = []
    for name in ("q_proj", "k_proj", "v_proj"):
        (base,) = [key for key in weights if key.endswith(f"layers.0.self_attn.{name}.weight") and "vision" not in key]
        state = json.loads(bytes(weights[f"{base}.quant_state.bitsandbytes__nf4"].tolist()))
        numbers = weights[f"{base}.nested_quant_map"][weights[f"{base}.absmax"].int()]
        whole.append(numbers * weights[f"{base}.nested_absmax"] + torch.tensor(state["nested_offset"]))
    assert torch.equal(qkv.scales, torch.cat(whole))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 and nf4 (its scales quantized too) as transformers saves them."""
    folder = tmp_path_factory.mktemp("saved")
    save_random(PLAIN, folder / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scheme, kind in (("int8", "int8"), ("nf4", "nf4, double")):
            save_quantized(folder / "plain", folder / scheme, SAVED[kind])
    return folder


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_was_loaded_does_not_change_with_the_file(scheme: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved / scheme, folder)
    vlm = load(folder)
    before = [tensor.clone() for tensor in (*vlm.parameters(), *vlm.buffers()) if not tensor.is_mkldnn]
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    after = [tensor for tensor in (*vlm.parameters(), *vlm.buffers()) if not tensor.is_mkldnn]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Tensor], str], None]:
    def edit(weights: dict[str, Tensor], base: str) -> None:
        name = f"{base}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(weights[name].tolist()))
        change(state)
        weights[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


DAMAGE: dict[str, tuple[Quantization, Callable[[dict[str, Tensor], str], object], str]] = {
    "no scales": ("int8", lambda w, n: w.pop(f"{n}.SCB"), "down_proj.weight has dtype I8|lacks its SCB"),
    "few scales": ("int8", lambda w, n: w.update({f"{n}.SCB": torch.ones(3)}), "scales .SCB. that are not 64"),
    "no numbers": (
        "int8",
        lambda w, n: w.update({f"{n}.SCB": torch.full((64,), float("nan"))}),
        "scales .SCB. that are not 64 finite",
    ),
    "reordered": (
        "int8",
        lambda w, n: w.update({f"{n}.weight_format": torch.tensor(2, dtype=torch.uint8)}),
        "weight_format is not 0",
    ),
    "shape": (
        "int8",
        lambda w, n: w.update({f"{n}.weight": torch.zeros(64, 95, dtype=torch.int8)}),
        r"is int8 \[64, 95\] instead of int8 \[64, 96\]",
    ),
    "no weight": ("int8", lambda w, n: w.pop(f"{n}.weight"), "down_proj.weight is missing"),
    "no state": (
        "nf4",
        lambda w, n: w.pop(f"{n}.weight.quant_state.bitsandbytes__nf4"),
        "down_proj.weight lacks its weight.quant_state.bitsandbytes__nf4",
    ),
    "not JSON": (
        "nf4",
        lambda w, n: w.update({f"{n}.weight.quant_state.bitsandbytes__nf4": torch.full((9,), 255, dtype=torch.uint8)}),
        "quant_state that is not JSON",
    ),
    "a list": (
        "nf4",
        lambda w, n: w.update({f"{n}.weight.quant_state.bitsandbytes__nf4": torch.tensor([91, 93]).to(torch.uint8)}),
        "not an object",
    ),
    "another shape": ("nf4", _state(lambda s: s.update(shape=[96, 64])), r"has shape \[96, 64\] instead of"),
    "block size": ("nf4", _state(lambda s: s.update(blocksize=63)), "has blocksize 63"),
    "other blocks": ("nf4", _state(lambda s: s.update(blocksize=128)), "scales .absmax. that are not 48"),
    "group": ("nf4", _state(lambda s: s.update(nested_blocksize=0)), "don't fit their nested_"),
    "large group": ("nf4", _state(lambda s: s.update(nested_blocksize=10**15)), "don't fit their nested_"),
    "offset": ("nf4", _state(lambda s: s.update(nested_offset=10**400)), "don't fit their nested_"),
    "wide codes": (
        "nf4",
        lambda w, n: w.update({f"{n}.weight.absmax": w[f"{n}.weight.absmax"].int()}),
        "don't fit their nested_",
    ),
    "no offset": ("nf4", _state(lambda s: s.pop("nested_offset")), "not all that nested_"),
    "other numbers": (
        "nf4",
        lambda w, n: w[f"{n}.weight.quant_map"].mul_(0.5),
        "quant_map that is not NF4's",
    ),
    "short": (
        "nf4",
        lambda w, n: w.update({f"{n}.weight": torch.zeros(5, 1, dtype=torch.uint8)}),
        "has 5 bytes instead of 3072",
    ),
    "fp4": (
        "nf4",
        lambda w, n: w.update(
            {f"{n}.weight.quant_state.bitsandbytes__fp4": w.pop(f"{n}.weight.quant_state.bitsandbytes__nf4")}
        ),
        "bitsandbytes__fp4 is unknown",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_quantized_tensors_that_do_not_fit_are_named(kind: str, saved: Path, tmp_path: Path) -> None:
    scheme, change, sentence = DAMAGE[kind]
    folder = tmp_path / "damaged"
    shutil.copytree(saved / scheme, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.down_proj.weight") and "vision" not in name]
    change(weights, name.removesuffix(".weight"))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        load(folder)
