"""Configs read as transformers reads them, and whatever can't be run refused by the field's name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sightline_models.config import (
    CheckpointError,
    GenerationDefaults,
    RopeConfig,
    read_config,
    read_generation_defaults,
)

# config.json of llava-1.5-7b-hf, as published.
LLAVA_15_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(path: str, value: Any) -> dict[str, Any]:
    """A copy of the published config with one field, perhaps nested, set."""
    config: dict[str, Any] = json.loads(json.dumps(LLAVA_15_7B))
    *sections, name = path.split(".")
    target = config
    for section in sections:
        target = target[section]
    target[name] = value
    return config


def test_the_published_config(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLAVA_15_7B))
    assert (config.decoder.num_layers, config.decoder.hidden_size, config.decoder.head_dim) == (32, 4096, 128)
    assert config.decoder.intermediate_size == 11008
    assert config.decoder.rms_norm_eps == 1e-5
    assert config.vision.head_dim == 64
    assert config.vision.layer_norm_eps == 1e-5
    assert config.num_image_tokens == 576
    assert config.feature_depths == (23,)
    assert config.dtype == "float16"
    assert config.eos_token_ids == (2,)
    assert config.image_token_id == 32000
    assert config.is_llava15


SPELLINGS: dict[str, dict[str, Any]] = {
    "published": LLAVA_15_7B,
    "no vision config": {k: v for k, v in LLAVA_15_7B.items() if k != "vision_config"},
    "bare": {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 31999},
    "empty sections": changed("vision_config", {"model_type": "clip_vision_model"}),
    "tied by the text config": changed("text_config.tie_word_embeddings", True),
    "tied by the top level": changed("tie_word_embeddings", True),
    "old rope": changed("text_config.rope_theta", 500000.0),
    "old linear rope": changed("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
    "new rope": changed("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 25000.0}),
    "old llama 3 rope": changed(
        "text_config.rope_scaling",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 2048},
    ),
    "grouped": changed("text_config.num_key_value_heads", 8),
    "layer list": changed("vision_feature_layer", [-2, 3]),
    "full": changed("vision_feature_select_strategy", "full"),
    "image_token_id": changed("image_token_id", 31998),
    "no eos": changed("text_config.eos_token_id", None),
    "two eos": changed("text_config.eos_token_id", [2, 7]),
    "new dtype": {k: v for k, v in LLAVA_15_7B.items() if k != "torch_dtype"} | {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_reads_what_transformers_reads(tmp_path: Path, spelling: dict[str, Any]) -> None:
    ours = read_config(write(tmp_path, spelling))
    theirs = AutoConfig.from_pretrained(tmp_path)
    text, vision = theirs.text_config, theirs.vision_config
    layers = theirs.vision_feature_layer
    assert ours.decoder.vocab_size == text.vocab_size
    assert ours.decoder.hidden_size == text.hidden_size
    assert ours.decoder.intermediate_size == text.intermediate_size
    assert ours.decoder.num_layers == text.num_hidden_layers
    assert ours.decoder.num_heads == text.num_attention_heads
    assert ours.decoder.num_kv_heads == text.num_key_value_heads
    assert ours.decoder.head_dim == text.head_dim
    assert ours.decoder.rms_norm_eps == text.rms_norm_eps
    assert ours.decoder.max_position_embeddings == text.max_position_embeddings
    assert ours.decoder.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.decoder.rope.theta == text.rope_parameters["rope_theta"]
    assert ours.decoder.rope.type == text.rope_parameters["rope_type"]
    if ours.decoder.rope.type != "default":
        assert ours.decoder.rope.factor == text.rope_parameters["factor"]
    assert ours.vision.hidden_size == vision.hidden_size
    assert ours.vision.intermediate_size == vision.intermediate_size
    assert ours.vision.num_layers == vision.num_hidden_layers
    assert ours.vision.num_heads == vision.num_attention_heads
    assert ours.vision.image_size == vision.image_size
    assert ours.vision.patch_size == vision.patch_size
    assert ours.vision.hidden_act == vision.hidden_act
    assert ours.image_token_id == theirs.image_token_id
    assert ours.feature_layers == (tuple(layers) if isinstance(layers, list) else (layers,))
    assert ours.select_strategy == theirs.vision_feature_select_strategy
    eos = text.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))
    if theirs.dtype is not None:
        assert ours.dtype == str(theirs.dtype).removeprefix("torch.")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "code of its own": (changed("auto_map", {"AutoModel": "modeling.Evil"}), "auto_map.*run code of its own"),
    "nested code": (changed("text_config.auto_map", {"AutoModel": "x.Y"}), "text_config.auto_map"),
    "awq": (changed("quantization_config", {"quant_method": "awq"}), "quant_method is 'awq'.*unquantized.*--quantize"),
    "gptq": (changed("quantization_config", {"quant_method": "gptq", "bits": 4}), "quant_method is 'gptq'"),
    "no method": (changed("quantization_config", {"bits": 4}), "quant_method is None"),
    "fp4": (
        changed("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bnb_4bit_quant_type is 'fp4'.*--quantize nf4",
    ),
    "neither": (changed("quantization_config", {"quant_method": "bitsandbytes"}), "load_in_8bit and load_in_4bit"),
    "quantized inside": (
        changed("text_config.quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "text_config.quantization_config.*top level",
    ),
    "original repository": (changed("architectures", ["LlavaLlamaForCausalLM"]), "convert_llava_weights_to_hf"),
    "tiles": (changed("architectures", ["LlavaNextForConditionalGeneration"]), "LlavaNext.*tiles"),
    "text only": (changed("architectures", ["LlamaForCausalLM"]), "text model"),
    "anything else": (changed("architectures", ["Novel"]), "Novel is not served"),
    "mistral": (changed("text_config.model_type", "mistral"), "text_config.model_type is 'mistral'.*llama"),
    "siglip": (changed("vision_config.model_type", "siglip_vision_model"), "vision_config.model_type.*siglip"),
    "yarn": (changed("text_config.rope_scaling", {"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'"),
    "rope without factor": (changed("text_config.rope_scaling", {"type": "linear"}), "rope_scaling.factor"),
    "activation": (changed("text_config.hidden_act", "gelu"), "text_config.hidden_act is 'gelu'"),
    "odd heads": (changed("text_config.num_attention_heads", 33), "multiple of num_attention_heads"),
    "odd groups": (changed("text_config.num_key_value_heads", 5), "num_key_value_heads is 5.*divisor"),
    "oblong": (changed("vision_config.image_size", [336, 224]), "vision_config.image_size is \\[336, 224\\]"),
    "deep": (changed("vision_feature_layer", -26), "vision_feature_layer is -26.*24"),
    "strategy": (changed("vision_feature_select_strategy", "cls_patch"), "vision_feature_select_strategy"),
    "image token": (changed("image_token_index", 32064), "image_token_index is 32064.*32064"),
    "strings for numbers": (changed("text_config.hidden_size", "4096"), "hidden_size is '4096'.*whole number"),
    "a dtype": (changed("torch_dtype", "float8_e4m3fn"), "torch_dtype is 'float8_e4m3fn'"),
    "a section": (changed("text_config", "llama"), "text_config is 'llama'.*object"),
}


@pytest.mark.parametrize(("config", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_name_the_field(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_config(write(tmp_path, config))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "vision_config.hidden_act"],
)
def test_llava15_is_told_by_content(tmp_path: Path, path: str) -> None:
    value = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}.get(path, "silu")
    assert not read_config(write(tmp_path, changed(path, value))).is_llava15


def test_rope_defaults(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, LLAVA_15_7B)).decoder.rope == RopeConfig(theta=10000.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, GenerationDefaults(1.0, 1.0, 0, 1.0, (2,))),
        ({}, GenerationDefaults(0.0, 1.0, 0, 1.0, (2,))),
        ({"temperature": 0.9, "top_p": 0.6}, GenerationDefaults(0.0, 1.0, 0, 1.0, (2,))),
        ({"do_sample": False, "repetition_penalty": 1.2}, GenerationDefaults(0.0, 1.0, 0, 1.2, (2,))),
        ({"do_sample": True, "eos_token_id": [2, 5]}, GenerationDefaults(1.0, 1.0, 0, 1.0, (2, 5))),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.7, "top_k": 40},
            GenerationDefaults(0.2, 0.7, 40, 1.0, (2,)),
        ),
    ],
)
def test_generation_defaults(tmp_path: Path, content: dict[str, Any] | None, expected: GenerationDefaults) -> None:
    config = read_config(write(tmp_path, LLAVA_15_7B))
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_generation_defaults(tmp_path, config) == expected


def test_configs_and_presets_import_no_torch() -> None:
    code = (
        "import sys, sightline_models.config, sightline_models.checkpoint_files, sightline_models.presets\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
