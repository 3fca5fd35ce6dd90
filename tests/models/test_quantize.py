"""Quantized models: logits are those of bitsandbytes' own weights, its files load as they lie, nothing stands twice.

The reference is transformers in float32 with every quantized matrix replaced by what bitsandbytes makes of it and back.
"""

import json
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import CLIP_NORMALIZATION, Case, PagedRun, Shape, load, make_case, reference_logits, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from sightline_kernels.int8_linear import reference as int8
from sightline_kernels.nf4_linear import reference as nf4
from sightline_models.config import CheckpointError, read_config
from sightline_models.quantization_config import Quantization
from sightline_models.quantize import Int8Linear, Nf4Linear, SideBySide
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bitsandbytes import functional as bnb
    from bitsandbytes import nn as bnb_nn
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

TOLERANCE = 1e-4
CPU = torch.device("cpu")
SCHEMES: tuple[Quantization, ...] = ("int8", "nf4")

PLAIN = Shape(
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"image_size": 16, "patch_size": 4},
    text={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 260},
)
# Biases, a tied head, and matrices that end within a block of NF4, so that fused ones can't share their blocks.
ODD = Shape(
    vision={"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 12, "patch_size": 6},
    text={"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"num_key_value_heads": 1, "vocab_size": 261, "attention_bias": True, "mlp_bias": True}
    | {"tie_word_embeddings": True},
)
SHAPES = {"plain": PLAIN, "odd": ODD}


@pytest.fixture(autouse=True, scope="module")
def _without_a_compiler() -> Iterator[None]:
    """bitsandbytes compiles what it does with odd shapes, for every shape anew."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def there_and_back(weight: Tensor, scheme: Quantization) -> Tensor:
    """What bitsandbytes' layer of this scheme would multiply with."""
    if scheme == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(codes, absmax)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    return dequantized(packed, state)


def dequantized(packed: Tensor, state: Any) -> Tensor:
    # Their portable code: their CPU kernel reads a wrong scale where blocks run over rows' ends.
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    found: Tensor = _dequantize_4bit_compute(
        packed.view(-1), absmax, state.code, state.blocksize, state.shape, torch.float32
    )
    return found


def quantize_decoder(model: LlavaForConditionalGeneration, scheme: Quantization) -> None:
    with torch.no_grad():
        for name, module in model.model.language_model.named_modules():
            if isinstance(module, nn.Linear):
                assert ".layers." in f".{name}"
                module.weight.copy_(there_and_back(module.weight, scheme))


def cases_of(model: LlavaForConditionalGeneration) -> list[Case]:
    return [
        make_case(model, images=images, text=text, seed=seed)
        for seed, (images, text) in enumerate([(0, 13), (1, 6), (2, 5)])
    ]


def our_logits(vlm: Vlm, cases: list[Case]) -> list[Tensor]:
    run = PagedRun(vlm, cases)
    run.finish(9)
    return [run.result(index) for index in range(len(cases))]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))


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


SAVED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    # One of three fused matrices in full precision, and a head that is quantized too.
    "int8 but some": {"load_in_8bit": True, "llm_int8_skip_modules": ["v_proj", "model.vision_tower", "gate_proj"]},
}


def save_quantized(source: Path, folder: Path, options: dict[str, Any]) -> LlavaForConditionalGeneration:
    """Have transformers quantize ``source`` and save it in ``folder``; return what bitsandbytes computes with."""
    quantized = LlavaForConditionalGeneration.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    quantized.save_pretrained(folder)
    plain = LlavaForConditionalGeneration.from_pretrained(source).eval()
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bnb_nn.Linear8bitLt):
                back = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            elif isinstance(module, bnb_nn.Linear4bit):
                back = dequantized(module.weight.data.view(torch.uint8), module.weight.quant_state)
            else:
                continue
            plain.get_submodule(name).weight.copy_(back)
    return plain


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
    assert read_config(tmp_path / "quantized").quantization == scheme
    cases = cases_of(theirs)
    expected = [reference_logits(theirs, case) for case in cases]
    vlm = load(tmp_path / "quantized")
    assert largest_difference(our_logits(vlm, cases), expected) <= TOLERANCE
    tower = [module for module in vlm.vision.modules() if isinstance(module, Int8Linear | Nf4Linear | SideBySide)]
    assert bool(tower) == ("some" not in kind)
    # Asked for by name, the same; asked for otherwise, refused.
    assert largest_difference(our_logits(load(tmp_path / "quantized", quantize=scheme), cases), expected) <= TOLERANCE
    other: Quantization = "nf4" if scheme == "int8" else "int8"
    with pytest.raises(CheckpointError, match=f"--quantize {other}.*already quantized, as {scheme}.*leave --quantize"):
        load(tmp_path / "quantized", quantize=other)


@pytest.mark.filterwarnings("ignore")
def test_int8_made_here_has_the_bytes_that_transformers_saves(tmp_path: Path) -> None:
    save_random(PLAIN, tmp_path / "plain")
    options = SAVED["int8"] | {
        "llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    }
    save_quantized(tmp_path / "plain", tmp_path / "quantized", options)
    made, saved = load(tmp_path / "plain", quantize="int8"), load(tmp_path / "quantized")
    ours, theirs = dict(made.named_buffers()), dict(saved.named_buffers())
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith("codes_OI") for name in ours) == 8
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    model = save_random(PLAIN, tmp_path / "even")
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not tensor.is_mkldnn:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


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
