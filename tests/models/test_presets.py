"""Named shapes and the folders made from them: whole but for weights, readable by transformers, text intact."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sightline_models.config import Normalization, read_config, read_generation_defaults
from sightline_models.presets import PRESETS, demo_checkpoint, write_preset
from sightline_models.synthetic_tokenizer import SMALLEST_VOCAB, SPECIAL_TOKENS, tokenizer_json
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm

PARAMETERS = {
    # Published: 7.06 and 13.35 billion, of which the tower's last layer and last norm are never run.
    "llava-1.5-7b": (7.04e9, 7.07e9),
    "llava-1.5-13b": (13.32e9, 13.36e9),
    "llava-110m": (105e6, 115e6),
    "llava-45m": (42e6, 47e6),
    "tiny": (0, 1e6),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_they_are_named_for(tmp_path: Path, name: str) -> None:
    write_preset(name, tmp_path)
    config = read_config(tmp_path)
    with torch.device("meta"):
        vlm = Vlm(config, Normalization((0.5,) * 3, (0.5,) * 3, 1 / 255))
    least, most = PARAMETERS[name]
    assert least <= sum(parameter.numel() for parameter in vlm.parameters()) <= most
    assert config.is_llava15
    assert config.num_image_tokens == json.loads((tmp_path / "config.json").read_text())["image_seq_length"]
    assert read_generation_defaults(tmp_path, config).temperature == 1.0
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", PRESETS)
def test_tokenizers_cover_the_vocabulary(tmp_path: Path, name: str) -> None:
    write_preset(name, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = PRESETS[name].vocab_size
    assert tokenizer.get_vocab_size() == size
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(size)]
    assert None not in tokens
    assert tuple(tokens[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS


TOKENIZER = Tokenizer.from_str(json.dumps(tokenizer_json(2000)))


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    specials = [token for token in SPECIAL_TOKENS if token in text]
    if not specials:
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_merges_are_used() -> None:
    encoding = TOKENIZER.encode(" there is another one", add_special_tokens=False)
    assert len(encoding.ids) < len(" there is another one") / 1.5
    assert TOKENIZER.encode("a").ids[0] == SPECIAL_TOKENS.index("<s>")


@pytest.mark.parametrize("size", [SMALLEST_VOCAB - 1, 40_000])
def test_impossible_vocabularies_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size is {size}"):
        tokenizer_json(size)


@pytest.mark.parametrize("names", ["new", "old"])
def test_transformers_answers_from_our_folders(tmp_path: Path, names: str) -> None:
    write_checkpoint(tmp_path, names=names)  # type: ignore[arg-type]
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A lamp."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is this? ASSISTANT: A lamp.</s>USER: Sure? ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (50, 40), (200, 3, 4)), text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == SPECIAL_TOKENS.index("<image>")).sum() == 16
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_preset("llava-9000b", tmp_path)
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, wings=2)


def test_the_demo_model_is_beside_the_code() -> None:
    assert (demo_checkpoint() / "config.json").is_file()
    assert (demo_checkpoint() / "model.safetensors").is_file()
