"""Which weight files a checkpoint folder holds, and what their headers say is in them.

Knows the safetensors header and the shard index. Reads no weights, imports no torch, and never opens a pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline_models.config import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file, as its header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling, such as ``BF16``."""
    num_bytes: int


def read_entries(folder: Path) -> tuple[TensorEntry, ...]:
    """Every tensor of the folder's safetensors files, shard by shard in the order they lie on disk.

    Raises CheckpointError when there are no safetensors, a shard is missing, cut short or malformed, or a tensor
    stands twice.
    """
    entries: dict[str, TensorEntry] = {}
    for file in _weight_files(folder):
        for entry in _read_header(file):
            if entry.name in entries:
                raise CheckpointError(
                    f"{file} holds {entry.name}, and so does {entries[entry.name].file.name}; "
                    "delete the shards of an older download"
                )
            entries[entry.name] = entry
    return tuple(entries.values())


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        return _indexed_files(folder, index)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds safetensors files but neither {_SINGLE} nor {_INDEX}; fetch the missing one"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when it is opened; convert them "
            "to safetensors (in a place you trust: load with transformers, then save_pretrained) and serve that folder"
        )
    raise CheckpointError(f"{folder} holds no weights: {_SINGLE}, or {_INDEX} with its shards, must be there")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a shard index (no weight_map of names); fetch it again") from error
    files = []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; shards must be safetensors files beside the index")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, though {_INDEX} names it; finish the download")
        files.append(folder / name)
    return files


def _read_header(file: Path) -> list[TensorEntry]:
    """Parse one header, checking every length against the file: nothing it claims is believed."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _broken(file, f"its header claims {length} bytes and the file has {size}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _broken(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not an object")
    data_bytes = size - 8 - length
    entries = [_entry(file, name, value) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda pair: pair[0])
    expected_start = 0
    for start, entry in entries:
        if start != expected_start:
            raise _broken(file, f"the bytes of {entry.name} overlap others or leave a gap")
        expected_start = start + entry.num_bytes
    if expected_start != data_bytes:
        raise _broken(file, f"its header describes {expected_start} bytes of weights and {data_bytes} are there")
    return [entry for _, entry in entries]


def _entry(file: Path, name: str, value: Any) -> tuple[int, TensorEntry]:
    """One header line and where its bytes start."""
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [start, stop, *shape]
        well_formed = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in numbers)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise _broken(file, f"its header's line for {name} is malformed")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, which this release can't load; save it as BF16")
    count = 1
    for length in shape:
        count *= length
    if stop - start != count * _ITEM_BYTES[dtype]:
        raise _broken(file, f"{name} claims {stop - start} bytes for shape {list(shape)} of {dtype}")
    return start, TensorEntry(name, file, shape, dtype, stop - start)


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file: {why}; download it again")
