"""bitsandbytes as the reference for quantized models: what its layers multiply with, and the checkpoints it leaves.

The logits to reach are transformers' in float32, with every quantized matrix replaced by what bitsandbytes makes of it
and back. Knows nothing of our own quantizing.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from oracle import Case, PagedRun, Shape, make_case
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bitsandbytes import functional as bnb
    from bitsandbytes import nn as bnb_nn
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

TOLERANCE = 1e-4

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


def quantize_linears(model: LlavaForConditionalGeneration, scheme: Quantization, *, vision: bool = False) -> None:
    parts = [model.model.language_model.layers]
    if vision:
        parts += [model.model.vision_tower, model.model.multi_modal_projector]
    with torch.no_grad():
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Linear):
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


SAVED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    # One of three fused matrices in full precision, and a head that is quantized too.
    "int8 but some": {"load_in_8bit": True, "llm_int8_skip_modules": ["v_proj", "model.vision_tower", "gate_proj"]},
}


def with_their_layers(folder: Path, scheme: Quantization) -> LlavaForConditionalGeneration:
    """transformers' model of ``folder`` with bitsandbytes' own layers in its decoder, activations in float32."""
    options = SAVED[scheme] | {
        "llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    }
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    ).eval()
    layers = [module for module in model.modules() if isinstance(module, bnb_nn.Linear4bit | bnb_nn.Linear8bitLt)]
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers
    for layer in layers:
        if isinstance(layer, bnb_nn.Linear4bit):
            # Where a CPU has bfloat16 it would multiply in that.
            layer.support_avx512bf16_for_cpu = False
    return model


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
