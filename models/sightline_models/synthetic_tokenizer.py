"""A genuine byte-level BPE tokenizer of any size, made from nothing.

Every byte is a token, so any text encodes and decodes; the rest of the vocabulary are merges of common letters, so
that ids drawn at random read as pronounceable nonsense. Deterministic. Knows the ``tokenizer.json`` format; imports
the standard library alone.
"""

from collections.abc import Iterator
from itertools import islice, product
from typing import Any

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
"""Added tokens, in the order of their ids from 0."""
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256

# English letters, the common ones first.
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for exactly the ids below ``vocab_size``.

    Raises ValueError for a size below ``SMALLEST_VOCAB`` or beyond what the merges cover (about 37,000).
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone take {SMALLEST_VOCAB}")
    tokens = [*SPECIAL_TOKENS, *_byte_symbols()]
    merges = list(islice(_merges(), vocab_size - len(tokens)))
    tokens += [left + right for left, right in merges]
    if len(tokens) < vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}; the synthetic merges reach {len(tokens)}")
    bos = SPECIAL_TOKENS[1]
    sequence = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, content in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [SPECIAL_TOKENS.index(bos)], "tokens": [bos]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _byte_symbols() -> list[str]:
    """One printable character a byte: itself where it prints, else one from U+0100 on, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    """Merge rules, each of two tokens that stand before it: words' first letters, then two letters, then three."""
    space = _byte_symbols()[ord(" ")]
    pairs = _common_first(2)
    triples = _common_first(3)
    yield from ((space, letter) for letter in _LETTERS)
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((space + pair[0], pair[1]) for pair in pairs)
    yield from ((triple[:2], triple[2]) for triple in triples)
    yield from ((space + triple[:2], triple[2]) for triple in triples)


def _common_first(length: int) -> list[str]:
    """All strings of that many letters, those of common letters first."""
    ranked = sorted(product(range(len(_LETTERS)), repeat=length), key=lambda ranks: (sum(ranks), ranks))
    return ["".join(_LETTERS[rank] for rank in ranks) for ranks in ranked]
