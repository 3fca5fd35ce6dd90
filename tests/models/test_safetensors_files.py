"""Headers of safetensors files: read as the format says, refused by file and tensor before anything is mapped."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sightline_models.checkpoint_files import read_entries
from sightline_models.checkpoint_folder import CheckpointError
from sightline_models.safetensors_files import read_header

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}
EMPTY = {"dtype": "F32", "shape": [0, 7], "data_offsets": [16, 16]}


def write(file: Path, header: Any, data: bytes = bytes(22), *, claim: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if claim is None else claim).to_bytes(8, "little") + text + data)
    return file


def test_a_header_is_read_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": B, "a": A, "empty": EMPTY}
    entries = read_header(write(tmp_path / "x.safetensors", header))
    assert [(entry.name, entry.shape, entry.dtype, entry.num_bytes) for entry in entries] == [
        ("a", (2, 2), "F32", 16),
        ("empty", (0, 7), "F32", 0),
        ("b", (3,), "BF16", 6),
    ]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {"half": torch.ones(3, 5, dtype=torch.float16), "one": torch.tensor(1.0), "none": torch.empty(0, 4)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    read = {entry.name: entry.shape for entry in read_header(file)}
    assert read == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


NOT_WHOLE = {
    "a header of 2^63 bytes": (lambda file: write(file, {}, claim=2**63), "claims 9223372036854775808 bytes"),
    "a header of 2^64 - 1 bytes": (lambda file: write(file, {}, claim=2**64 - 1), "claims 18446744073709551615 bytes"),
    "a header longer than the file": (lambda file: write(file, {"a": A}, b"", claim=500), "claims 500 bytes"),
    "seven bytes": (lambda file: file.write_bytes(bytes(7)), "claims"),
    "no header": (lambda file: write(file, b""), "not an object"),
    "a list": (lambda file: write(file, [A]), "not an object"),
    "space in front": (lambda file: write(file, b" " + json.dumps({"a": A}).encode()), "not an object"),
    "UTF-16": (lambda file: write(file, json.dumps({"a": A}).encode("utf-16")), "not an object"),
    "bytes of no encoding": (lambda file: write(file, b'{"\xff": 1}'), "not JSON"),
    "two values": (lambda file: write(file, b"{}{}"), "not JSON"),
    "nested without end": (lambda file: write(file, b'{"a":' + b"[" * 200_000), "not JSON"),
    "a number of 5000 digits": (lambda file: write(file, b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a tensor twice": (
        lambda file: write(file, b'{"a":%b,"a":%b}' % (json.dumps(A).encode(), json.dumps(B).encode())),
        "says a twice",
    ),
    "a key twice": (
        lambda file: write(file, b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "says dtype twice",
    ),
    "metadata that is no text": (lambda file: write(file, {"__metadata__": {"format": {"x": 1}}, "a": A}), "metadata"),
    "metadata that is a list": (lambda file: write(file, {"__metadata__": [], "a": A}), "metadata"),
    "bytes nobody describes": (lambda file: write(file, {"a": A, "b": B}, bytes(23)), "describes 22 bytes .* 23 are"),
    "bytes that are missing": (lambda file: write(file, {"a": A, "b": B}, bytes(21)), "describes 22 bytes .* 21 are"),
    "offsets beyond the file": (
        lambda file: write(file, {"a": {**A, "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "describes 4398046511104 bytes",
    ),
    "tensors that overlap": (
        lambda file: write(file, {"a": A, "b": {**B, "data_offsets": [14, 20]}}),
        "of b overlap others",
    ),
    "two tensors in one place": (lambda file: write(file, {"a": A, "b": A}), "of b overlap others"),
    "a gap": (lambda file: write(file, {"a": A, "b": {**B, "data_offsets": [18, 24]}}), "of b leave a gap"),
    "a gap in front": (lambda file: write(file, {"b": B}), "of b leave a gap"),
    "offsets the wrong way round": (lambda file: write(file, {"a": {**A, "data_offsets": [16, 0]}}), "claims -16"),
    "a negative offset": (lambda file: write(file, {"a": {**A, "data_offsets": [-16, 0]}}), "line for a is malformed"),
    "a fraction": (lambda file: write(file, {"a": {**A, "data_offsets": [0, 16.0]}}), "line for a is malformed"),
    "true for one": (lambda file: write(file, {"a": {**A, "shape": [True, 4]}}), "line for a is malformed"),
    "a shape that is text": (lambda file: write(file, {"a": {**A, "shape": "22"}}), "line for a is malformed"),
    "a length of 2^64": (lambda file: write(file, {"a": {**A, "shape": [2**64, 0]}}), "line for a is malformed"),
    "three offsets": (lambda file: write(file, {"a": {**A, "data_offsets": [0, 8, 16]}}), "line for a is malformed"),
    "no dtype": (lambda file: write(file, {"a": {"shape": [4], "data_offsets": [0, 16]}}), "line for a is malformed"),
    "one key more": (lambda file: write(file, {"a": {**A, "strides": [1]}}), "line for a is malformed"),
    "a tensor that is a text": (lambda file: write(file, {"a": "F32"}), "line for a is malformed"),
    "a shape of other size": (lambda file: write(file, {"a": {**A, "shape": [2, 3]}}), "claims 16 bytes for shape"),
    "a dtype of other size": (lambda file: write(file, {"a": {**A, "dtype": "F16"}}), "claims 16 bytes for shape"),
    "a dtype nobody knows": (lambda file: write(file, {"a": {**A, "dtype": "F7"}}), "a has dtype F7"),
}


@pytest.mark.parametrize(("spoil", "sentence"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_E13_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    file = tmp_path / "model.safetensors"
    spoil(file)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_entries(tmp_path)
    assert str(file) in str(caught.value)


def test_E13_a_header_beyond_the_formats_bound_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="may have 100000000 at most"):
        read_entries(tmp_path)


def test_E12_E13_a_flipped_byte_of_the_header_never_changes_what_is_mapped_unseen(tmp_path: Path) -> None:
    """Whatever byte of the header flips: either the file is refused, or tensors lie where the library finds them."""
    file = tmp_path / "model.safetensors"
    save_file({f"layer.{index}.weight": torch.full((3, 4), float(index)) for index in range(8)}, file)
    whole = file.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(5)
    refused = 0
    for place in range(header_bytes):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << rng.randrange(8)
        file.write_bytes(spoiled)
        try:
            entries = read_header(file)
        except CheckpointError:
            refused += 1
            continue
        try:
            with safe_open(file, "pt") as opened:
                assert set(opened.keys()) == {entry.name for entry in entries}
                for entry in entries:
                    assert tuple(opened.get_slice(entry.name).get_shape()) == entry.shape
        except SafetensorError:
            # The library may be stricter, and refuses too.
            refused += 1
    assert refused > header_bytes // 3, f"{refused} of {header_bytes}"


def test_E13_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5, 7), "b": torch.ones(3)}, file)
    whole = file.read_bytes()
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_entries(tmp_path)


def shards(folder: Path, **weight_map: Any) -> None:
    write(folder / "one.safetensors", {"a": A}, bytes(16))
    write(folder / "two.safetensors", {"b": {**B, "data_offsets": [0, 6]}}, bytes(6))
    named = {"a": "one.safetensors", "b": "two.safetensors"} | weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    shards(tmp_path)
    assert [(entry.name, entry.file.name) for entry in read_entries(tmp_path)] == [
        ("a", "one.safetensors"),
        ("b", "two.safetensors"),
    ]


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"a": "../one.safetensors"}, "names '../one.safetensors'"),
        ({"a": "/etc/one.safetensors"}, "names '/etc/one.safetensors'"),
        ({"a": "sub/one.safetensors"}, "names 'sub/one.safetensors'"),
        ({"a": ".."}, r"names '\.\.'"),
        ({"a": "one.bin"}, "names 'one.bin'"),
        ({"a": "one\0.safetensors"}, "beside the index"),
        ({"a": ["one.safetensors"]}, "beside the index"),
        ({"a": None}, "names None"),
        ({"a": "two.safetensors"}, r"two\.safetensors lacks a, though"),
        ({"c": "one.safetensors"}, r"one\.safetensors lacks c, though"),
        ({"c": "three.safetensors"}, "three.safetensors is missing"),
    ],
)
def test_E13_an_index_names_whole_files_beside_it(tmp_path: Path, weight_map: dict[str, Any], sentence: str) -> None:
    shards(tmp_path, **weight_map)
    with pytest.raises(CheckpointError, match=sentence):
        read_entries(tmp_path)
