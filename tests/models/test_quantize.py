"""Quantizing as weights are read: logits are those of bitsandbytes' own weights, outliers included, and memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes_oracle import SHAPES, TOLERANCE, cases_of, largest_difference, our_logits, quantize_decoder
from live_bytes import LiveBytes
from oracle import CLIP_NORMALIZATION, load, reference_logits, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.nf4_linear import reference as nf4
from sightline_models.config import CheckpointError, read_config
from sightline_models.quantization_config import Quantization
from sightline_models.quantize import Int8Linear, Nf4Linear, SideBySide
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm

CPU = torch.device("cpu")
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
    quantize_decoder(theirs, scheme)
    expected = [reference_logits(theirs, case) for case in cases]
    vlm = load(tmp_path, quantize=scheme)
    ours = our_logits(vlm, cases)
    assert largest_difference(ours, expected) <= TOLERANCE
    assert largest_difference(ours, unquantized) > 100 * TOLERANCE, "nothing was quantized"
    kinds = {type(module) for module in vlm.decoder.modules()}
    assert {"int8": Int8Linear, "nf4": SideBySide if shape == "odd" else Nf4Linear}[scheme] in kinds
    assert not any(isinstance(module, Int8Linear | Nf4Linear) for module in (*vlm.vision.modules(), vlm.projector))


def rescale_channels(model: LlavaForConditionalGeneration) -> None:
    """Make a few channels up to 300 times as large between norm and matrix: the same function, with outliers."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for norm, linears in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                factors = torch.ones(norm.weight.numel())
                factors[torch.randperm(len(factors), generator=generator)[:4]] = torch.tensor([300.0, 100.0, 30.0, 3.0])
                norm.weight /= factors
                for linear in linears:
                    linear.weight *= factors


def divergence(of: list[Tensor], from_: list[Tensor]) -> float:
    """Mean over tokens of KL(from_ || of)."""
    pairs = zip(of, from_, strict=True)
    each = [
        F.kl_div(one.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for one, other in pairs
    ]
    return torch.cat(each).mean().item()


def test_outlier_channels_cost_no_more_than_they_cost_bitsandbytes(tmp_path: Path) -> None:
    model = save_random(SHAPES["plain"], tmp_path / "even")
    cases = cases_of(model)
    before = [reference_logits(model, case) for case in cases]
    rescale_channels(model)
    model.save_pretrained(tmp_path / "outliers")
    exact = [reference_logits(model, case) for case in cases]
    assert largest_difference(exact, before) < 1e-3, "the rescaling changed the function"
    assert largest_difference(our_logits(load(tmp_path / "outliers"), cases), exact) <= TOLERANCE
    for scheme in SCHEMES:
        twin = LlavaForConditionalGeneration.from_pretrained(tmp_path / "outliers").eval()
        quantize_decoder(twin, scheme)
        theirs = divergence([reference_logits(twin, case) for case in cases], exact)
        ours = divergence(our_logits(load(tmp_path / "outliers", quantize=scheme), cases), exact)
        assert theirs > 1e-6
        assert ours <= 1.001 * theirs + 1e-7, f"{scheme}: {ours} against {theirs}"


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
    assert sum(p.nbytes for p in (*quantized.parameters(), *quantized.buffers())) < sum(
        p.nbytes for p in (*plain.parameters(), *plain.buffers())
    )


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
        final = sum(tensor.nbytes for tensor in (*vlm.parameters(), *vlm.buffers()))
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
