"""What the header of one safetensors file says is in it, each claim held against the file.

Knows the format: eight bytes of length, a JSON object, then the tensors without gap or overlap. Reads no weights and
maps no file; imports no torch.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline_models.checkpoint_folder import CheckpointError

# The format's own bound.
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
# Their product is computed; no tensor of a model has more than five.
_MAX_DIMENSIONS = 8
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


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """The tensors of ``file`` in the order they lie there: nothing its header claims is believed.

    Raises CheckpointError, naming file and tensor, for a header that isn't strict JSON of the format's form, for types
    this release can't load, and for tensors whose bytes aren't those of type and shape, overlap, leave a gap or end
    elsewhere than the file.
    """
    header, data_bytes = _parse(file)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, f"its {_METADATA} holds more than texts")
    # A tensor without elements lies before the one that begins at the same byte.
    placed = sorted((_place(file, name, value) for name, value in header.items()), key=lambda place: place[:2])
    end = 0
    for start, stop, entry in placed:
        if start != end:
            raise _broken(file, f"the bytes of {entry.name} {'overlap others' if start < end else 'leave a gap'}")
        end = stop
    if end != data_bytes:
        raise _broken(file, f"its header describes {end} bytes of weights and {data_bytes} are there")
    return tuple(entry for _, _, entry in placed)


def _parse(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes follow it."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(file, f"its header claims {length} bytes and the file has {size}")
            if length > _MAX_HEADER_BYTES:
                raise _broken(file, f"its header claims {length} bytes and may have {_MAX_HEADER_BYTES} at most")
            data = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}; see to the file and its permissions") from error
    if not data.startswith(b"{"):
        raise _broken(file, "its header is not an object")
    try:
        # From bytes the parser would take other encodings, too.
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
    except _RepeatedError as error:
        raise _broken(file, f"its header says {error.name} twice") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, "its header is not JSON") from error
    return header, size - 8 - length


class _RepeatedError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _RepeatedError(next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1))
    return made


def _place(file: Path, name: str, value: Any) -> tuple[int, int, TensorEntry]:
    """Where a tensor's bytes start and stop, and what it is."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [start, stop, *shape]
        is_formed = (
            len(value) == 3
            and isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        )
    except (KeyError, TypeError, ValueError):
        is_formed = False
    if not is_formed:
        raise _broken(file, f"its header's line for {name} is malformed")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, which this release can't load; save it as BF16")
    num_bytes = _ITEM_BYTES[dtype]
    for length in shape:
        num_bytes *= length
    if stop - start != num_bytes:
        raise _broken(file, f"{name} claims {stop - start} bytes for shape {shape} of {dtype}")
    return start, stop, TensorEntry(name, file, tuple(shape), dtype, num_bytes)


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a whole safetensors file: {why}; download it again")
