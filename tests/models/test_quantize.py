"""Quantizing as weights are read: logits are those of bitsandbytes' own weights, outliers included, and memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes_oracle import (
    SHAPES,
    TOLERANCE,
    cases_of,
    largest_difference,
    our_logits,
    quantize_linears,
    with_their_layers,
)
from live_bytes import LiveBytes
from oracle import CLIP_NORMALIZATION, load, make_case, reference_logits, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sightline_kernels.dispatch import REFERENCES
from sightline_kernels.int8_linear import on_cpu
from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.nf4_linear import reference as nf4
from sightline_models.config import CheckpointError, read_config
from sightline_models.layers import Linear
from sightline_models.quantization_config import Quantization
from sightline_models.quantize import Int8Linear, Nf4Linear, SideBySide
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm

CPU = torch.device("cpu")
# Their CPU code reads a wrong scale where blocks run over rows' ends.
ALIGNED = replace(SHAPES["plain"], text=SHAPES["plain"].text | {"intermediate_size": 128})
SCHEMES: tuple[Quantization, ...] = ("int8", "nf4")


@pytest.fixture(autouse=True, scope="module")
def _without_a_compiler() -> Iterator[None]:
    """bitsandbytes compiles what it does with odd shapes, for every shape anew."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_at_load_gives_bitsandbytes_logits(shape: str, scheme: Quantization, tmp_path: Path) -> None:
    theirs = save_random(SHAPES[shape], tmp_path)
    cases = cases_of(theirs)
    unquantized = [reference_logits(theirs, case) for case in cases]
    quantize_linears(theirs, scheme)
    expected = [reference_logits(theirs, case) for case in cases]
    vlm = load(tmp_path, quantize=scheme)
    ours = our_logits(vlm, cases)
    assert largest_difference(ours, expected) <= TOLERANCE
    assert largest_difference(ours, unquantized) > 100 * TOLERANCE, "nothing was quantized"
    kinds = {type(module) for module in vlm.decoder.modules()}
    assert {"int8": Int8Linear, "nf4": SideBySide if shape == "odd" else Nf4Linear}[scheme] in kinds
    assert not any(isinstance(module, Int8Linear | Nf4Linear) for module in (*vlm.vision.modules(), vlm.projector))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tower_and_projector_are_quantized_when_asked(shape: str, scheme: Quantization, tmp_path: Path) -> None:
    theirs = save_random(SHAPES[shape], tmp_path)
    cases = cases_of(theirs)
    decoder_alone = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    quantize_linears(decoder_alone, scheme)
    quantize_linears(theirs, scheme, vision=True)
    expected = [reference_logits(theirs, case) for case in cases]
    vlm = load(tmp_path, quantize=scheme, quantize_vision=True)
    ours = our_logits(vlm, cases)
    assert largest_difference(ours, expected) <= TOLERANCE
    unlike = [reference_logits(decoder_alone, case) for case in cases]
    assert largest_difference(ours[1:], unlike[1:]) > 100 * TOLERANCE, "pictures are encoded as without the setting"
    left = {name for name, module in vlm.named_modules() if isinstance(module, Linear)}
    assert left == {"vision.patch_embedding", "decoder.lm_head"}
    chosen = replace(REFERENCES, int8_linear=lambda *matrix: int8.int8_linear(*matrix))
    random = random_vlm(
        vlm.config,
        CLIP_NORMALIZATION,
        dtype=torch.float32,
        device=CPU,
        seed=1,
        kernels=chosen,
        quantize=scheme,
        quantize_vision=True,
    )
    assert {name for name, module in random.named_modules() if isinstance(module, Linear)} == left
    # What was chosen for the decoder's widths may not take the tower's.
    for name, module in random.named_modules():
        if isinstance(module, Int8Linear | Nf4Linear):
            is_int8 = isinstance(module, Int8Linear)
            has_chosen = module.multiply is chosen.int8_linear if is_int8 else module.kernels is chosen
            assert has_chosen == name.startswith("decoder."), name


def rescale_channels(model: LlavaForConditionalGeneration, factors: tuple[float, ...]) -> None:
    """Make a few channels' activations so many times as large, and their weights as much smaller: the same function."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for norm, linears in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                factors_D = torch.ones(norm.weight.numel())
                factors_D[torch.randperm(len(factors_D), generator=generator)[: len(factors)]] = torch.tensor(factors)
                norm.weight *= factors_D
                for linear in linears:
                    linear.weight /= factors_D


def divergence(of: list[Tensor], from_: list[Tensor]) -> float:
    """Mean over tokens of KL(from_ || of)."""
    ours_TV, theirs_TV = (torch.cat(logits).double().log_softmax(-1) for logits in (of, from_))
    return F.kl_div(ours_TV, theirs_TV, log_target=True, reduction="none").sum(-1).mean().item()


OUTLIERS = {"of activations": (300.0, 100.0, 30.0, 3.0), "of weights": (1 / 300, 1 / 100, 1 / 30, 1 / 3)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OUTLIERS)
def test_outlier_channels_cost_no_more_than_in_bitsandbytes_own_layers(kind: str, tmp_path: Path) -> None:
    """Both sides have float32 activations, but for what LLM.int8() itself makes of them."""
    model = save_random(ALIGNED, tmp_path / "even")
    # Theirs rounds activations too, which many tokens tell from chance.
    cases = [make_case(model, images=images, text=text, seed=images) for images, text in ((0, 500), (1, 300), (2, 200))]
    before = [reference_logits(model, case) for case in cases]
    rescale_channels(model, OUTLIERS[kind])
    model.save_pretrained(tmp_path / "outliers")
    exact = [reference_logits(model, case) for case in cases]
    assert largest_difference(exact, before) <= TOLERANCE, "the rescaling changed the function"
    unquantized = our_logits(load(tmp_path / "outliers"), cases)
    assert largest_difference(unquantized, exact) <= TOLERANCE
    assert largest_difference(unquantized, before) <= TOLERANCE
    ours, theirs = {}, {}
    for scheme in SCHEMES:
        twin = with_their_layers(tmp_path / "outliers", scheme)
        theirs[scheme] = [reference_logits(twin, case) for case in cases]
        ours[scheme] = our_logits(load(tmp_path / "outliers", quantize=scheme), cases)
        assert divergence(theirs[scheme], exact) > 1e-2, "the outliers cost nothing"
    assert divergence(ours["int8"], exact) <= divergence(theirs["int8"], exact)
    # Of NF4 theirs rounds weights alone, to the same numbers, so the logits themselves are equal.
    assert largest_difference(ours["nf4"], theirs["nf4"]) <= TOLERANCE
    assert divergence(ours["nf4"], exact) <= divergence(theirs["nf4"], exact) + 1e-6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", OUTLIERS)
def test_a_cpus_digits_give_bitsandbytes_logits_beside_outliers(
    kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_cpu.can_multiply(torch.zeros(1, 1, dtype=torch.int8)):
        pytest.skip("this CPU has no VNNI")
    # Matrices as small as these are otherwise multiplied whole.
    monkeypatch.setattr(on_cpu, "_SMALL_PRODUCTS", 0)
    monkeypatch.setattr(on_cpu, "_MOST_UNPACKED", 0 if packed else 2**21)
    model = save_random(SHAPES["plain"], tmp_path)
    cases = cases_of(model)
    rescale_channels(model, OUTLIERS[kind])
    model.save_pretrained(tmp_path)
    quantize_linears(model, "int8")
    vlm = load(tmp_path, quantize="int8")
    linears = [module for module in vlm.modules() if isinstance(module, Int8Linear)]
    assert {linear.codes_OI.is_mkldnn for linear in linears} == {packed}
    assert all(linear.scales is not None for linear in linears), "a linear isn't multiplied by its codes"
    assert largest_difference(our_logits(vlm, cases), [reference_logits(model, case) for case in cases]) <= TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_are_drawn_the_same_and_then_quantized(scheme: Quantization, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = read_config(tmp_path)

    def make(quantize: Quantization) -> Vlm:
        return random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=CPU, seed=3, quantize=quantize)

    plain, quantized = make("none"), make(scheme)
    down, replaced = plain.decoder.layers[1].feed_forward.down, quantized.decoder.layers[1].feed_forward.down
    # Packed weights multiply the identity to show themselves.
    weight = down(torch.eye(down.in_features)).T
    if scheme == "int8":
        back = int8.dequantize(*int8.quantize(weight.half()), torch.float32)
    else:
        back = nf4.dequantize(*nf4.quantize(weight), nf4.byte_pairs(CPU), (64, 128), torch.float32)
    torch.testing.assert_close(replaced(torch.eye(down.in_features)).T, back)
    assert torch.equal(plain.decoder.embed_tokens.weight, quantized.decoder.embed_tokens.weight)
    assert quantized.num_bytes < plain.num_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_peaks_at_the_quantized_weights_and_one_matrix(
    scheme: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, num_layers=8, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=4)
    largest = 128 * 256 * 4
    full = 8 * (4 * 128 * 128 + 3 * 128 * 256) * 4
    config = read_config(tmp_path)
    makers: tuple[Callable[[], Vlm], ...] = (
        lambda: load(tmp_path, quantize=scheme),
        lambda: random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=CPU, seed=1, quantize=scheme),
    )
    monkeypatch.setattr(Vlm, "pack_weights", lambda self: None)
    for make in makers:
        with LiveBytes() as memory:
            vlm = make()
        final = vlm.num_bytes
        # A fused matrix in full precision, and what quantizing it needs beside it.
        assert memory.peak > 0.9 * final, "what lives was not counted"
        assert memory.peak < final + 8 * largest, f"{memory.peak} for {final}"
        assert final + 8 * largest < full, "the weights in full precision would hide in the allowance"
        del vlm


def test_numbers_too_large_for_int8_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.language_model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, tmp_path / "model.safetensors")
    load(tmp_path, quantize="nf4")
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds numbers beyond 65504.*--quantize nf4"):
        load(tmp_path, quantize="int8")
    weights["model.language_model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    for scheme in SCHEMES:
        with pytest.raises(CheckpointError, match=r"up_proj.weight holds numbers that are not finite"):
            load(tmp_path, quantize=scheme)
