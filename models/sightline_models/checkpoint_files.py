"""Which weight files a checkpoint folder holds, and every tensor in them.

Knows the shard index and the names of weight files. Reads no weights, imports no torch, and never opens a pickle.
"""

from collections.abc import Mapping
from pathlib import Path

from sightline_models.checkpoint_folder import CheckpointError, find_file, read_object
from sightline_models.safetensors_files import TensorEntry, read_header

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def read_entries(folder: Path) -> tuple[TensorEntry, ...]:
    """Every tensor of the folder's safetensors files, shard by shard in the order they lie on disk.

    Raises CheckpointError when there are no safetensors, a shard is missing, cut short, malformed or a link that leads
    out of the folder, or a tensor stands twice or not where the index says.
    """
    shards = _weight_files(folder)
    entries: dict[str, TensorEntry] = {}
    for file in shards:
        for entry in read_header(file):
            if entry.name in entries:
                raise CheckpointError(
                    f"{file} holds {entry.name}, and so does {entries[entry.name].file.name}; "
                    "delete the shards of an older download"
                )
            entries[entry.name] = entry
    for file, names in shards.items():
        for name in names:
            if name not in entries or entries[name].file != file:
                raise CheckpointError(f"{file} lacks {name}, though {_INDEX} says it is there; fetch both again")
    return tuple(entries.values())


def _weight_files(folder: Path) -> Mapping[Path, list[str]]:
    """The files to read, each with the names of tensors that an index promises in it."""
    if (index := find_file(folder, _INDEX)) is not None:
        return _indexed_files(folder, index)
    if (single := find_file(folder, _SINGLE)) is not None:
        return {single: []}
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


def _indexed_files(folder: Path, index: Path) -> Mapping[Path, list[str]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not a shard index (no weight_map of names); fetch it again")
    promised: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise CheckpointError(f"{index} names {name!r}; shards must be safetensors files beside the index")
        promised.setdefault(name, []).append(tensor)
    files = {}
    for name in sorted(promised):
        file = find_file(folder, name)
        if file is None:
            raise CheckpointError(f"{folder / name} is missing, though {_INDEX} names it; finish the download")
        files[file] = promised[name]
    return files
