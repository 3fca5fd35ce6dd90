"""Checkpoint folders that hold a text side only, with tokenizers of every kind that LLaVA models come with.

Trained here, on a few sentences: the vocabularies are small but genuine, so that text becomes real merges and bytes.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sightline_models.presets import demo_checkpoint

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
SENTENCES = [
    "USER: What is in this picture? ASSISTANT: A red circle and a blue square.",
    "the quick brown fox jumps over the lazy dog\n\nhello  world",
    "Hallo Welt, wie geht's? naïve café [INST] Hi [/INST]",
    "你好世界 picture of a cat 你好",
] * 10
MORE_TOKENS = [
    AddedToken("<|user|>", special=True, normalized=False, rstrip=True),
    AddedToken("<|end|>", special=True, normalized=False, lstrip=True),
    AddedToken("ROLE:", special=False, normalized=True),
    AddedToken("zyx", special=False, normalized=False, single_word=True),
]
KINDS = ("byte level", "byte level with prefix space", "legacy Llama", "Llama", "Llama, always prefixed", "Unigram")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def tokenizer_json(kind: str) -> str:
    """The text of a ``tokenizer.json``."""
    if kind.startswith("byte level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        return _with_bos(tokenizer)
    if kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        return _with_bos(tokenizer)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    spec = json.loads(tokenizer.to_str())
    # Training wants the byte tokens as added ones; in a real vocabulary they are ordinary.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if kind != "legacy Llama":
        tokenizer.normalizer = None
        scheme = "always" if "always" in kind else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def _with_bos(tokenizer: Tokenizer) -> str:
    tokenizer.add_tokens(MORE_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def write_text_checkpoint(folder: Path, kind: str, *, template: str | None = TEMPLATE, **settings: Any) -> None:
    """The demo checkpoint's configs, made LLaVA-1.5's, with another tokenizer and template.

    ``settings`` go to tokenizer_config.json.
    """
    folder.mkdir(exist_ok=True)
    shutil.copy(demo_checkpoint() / "processor_config.json", folder / "processor_config.json")
    llava15 = json.loads((demo_checkpoint() / "config.json").read_text()) | {"vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps(llava15), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor", **named, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
