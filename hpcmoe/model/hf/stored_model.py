"""A folder with a model as transformers keeps it: config.json, and safetensors in one file or in shards."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmoe.errors import CheckpointError, ConfigError
from hpcmoe.messages import format_more, one_line, show_value
from hpcmoe.model.hf.tensor_files import StoredTensor, read_header
from hpcmoe.paths import expand_path
from hpcmoe.reading import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """What a folder holds, read but for the tensors themselves."""

    folder: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]  # by their names in the files


def read_stored_model(path: str | os.PathLike) -> StoredModel:
    """Read a folder's config.json and the headers of its safetensors.

    Raises ConfigError where the path is no folder of a model, CheckpointError where its files are not what they must
    be; one line each.
    """
    folder = Path(expand_path(os.fspath(path), "hpcmoe.hf.load"))
    if not folder.is_dir():
        raise ConfigError(f"{one_line(folder)}: no such folder; a name on the Hub is not fetched: give a folder")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{one_line(folder)}: has no {CONFIG}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{one_line(folder / CONFIG)}: model_type is missing, or no string")
    return StoredModel(folder=str(folder), config=config, tensors=read_tensor_table(folder))


def read_tensor_table(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of all of a folder's safetensors -> the tensors by name. transformers looks in this order."""
    if (folder / WEIGHTS).is_file():
        return read_header(find_inside(folder, WEIGHTS, str(folder / WEIGHTS)))
    if (folder / INDEX).is_file():
        return read_shards(folder)
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _OTHER_FORMATS)
    found = f"; {one_line(others[0])}{format_more(len(others) - 1)} is no safetensors: convert it" if others else ""
    raise CheckpointError(f"{one_line(folder)}: has neither {WEIGHTS} nor {INDEX}{found}")


def read_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of the shards that an index lists. Each tensor is in the shard that the index names."""
    where = one_line(folder / INDEX)
    tree = read_json(folder / INDEX)
    shard_of_name = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(shard_of_name, dict) or not shard_of_name:
        raise CheckpointError(f"{where}: weight_map is missing or empty")
    for name, shard in shard_of_name.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where}: {one_line(name)}: {show_value(shard)}: must be a file's name")
    shards = sorted(set(shard_of_name.values()))
    tensors_of_shard = {shard: read_header(find_inside(folder, shard, where)) for shard in shards}
    for name, shard in shard_of_name.items():
        if name not in tensors_of_shard[shard]:
            raise CheckpointError(f"{where}: {one_line(name)}: is not in {one_line(folder / shard)}")
    return {name: tensors_of_shard[shard][name] for name, shard in shard_of_name.items()}


def find_inside(folder: Path, name: str, where: str) -> Path:
    """Find a file of a folder, by its name in the index -> its path.

    It must lie in the folder; links may lead to the blobs of the Hub's cache, where a folder is snapshots/REVISION.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{where}: {show_value(name)}: leaves the folder")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{where}: {show_value(name)}: no such file")
    target, home = path.resolve(), folder.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (home, home.parent.parent / "blobs")):
        raise CheckpointError(f"{where}: {show_value(name)}: is a link out of the folder, to {one_line(target)}")
    return path
