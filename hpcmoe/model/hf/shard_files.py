"""Safetensors files written in place: the header first, then each tensor, or some rows of it, where it belongs.

A file is 8 bytes little-endian, the length of its header; the header, JSON {name: {dtype, shape, data_offsets}}; then
the tensors' bytes, without gaps. So no rank needs all tensors of a file at once.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hpcmoe.errors import CheckpointError, attempt
from hpcmoe.model.hf.tensor_files import DTYPE_OF_CODE
from hpcmoe.replacing import sync, system_errors

INDEX_NAME = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MOST_WRITTEN = 2**30  # bytes of one call


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file of a checkpoint, before anything of it is written."""

    name: str
    header: bytes  # its length too
    offset_of_tensor: dict[str, int]  # of the first byte in the file
    num_bytes: int


def split_into_files(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[ShardFile]:
    """Split tensors on meta into files of at most so many bytes of them, or one tensor each, as transformers does."""
    from transformers.modeling_utils import split_torch_state_dict_into_shards

    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_bytes)
    codes = {dtype: find_code(dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    return [
        make_shard_file(file, {name: tensors[name] for name in names}, codes)
        for file, names in split.filename_to_tensors.items()
    ]


def find_code(dtype: torch.dtype) -> str:
    """Return what safetensors calls a dtype. Raises CheckpointError where it has none."""
    for code, known in DTYPE_OF_CODE.items():
        if known == dtype:
            return code
    raise CheckpointError(f"{dtype}: safetensors holds no such numbers")


def make_shard_file(file: str, tensors: Mapping[str, Tensor], codes: Mapping[torch.dtype, str]) -> ShardFile:
    """Make the header of a file. Wide numbers come first, so that each tensor begins at a multiple of its width."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, begins = 0, {}
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        tensor = tensors[name]
        begins[name], end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": codes[tensor.dtype], "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    first = _LENGTH_BYTES + len(text)
    return ShardFile(
        name=file,
        header=len(text).to_bytes(_LENGTH_BYTES, "little") + text,
        offset_of_tensor={name: first + begin for name, begin in begins.items()},
        num_bytes=first + end,
    )


class ShardWriter:
    """The files that one rank writes. After an error nothing more is written, and finish() raises it."""

    def __init__(self, folder: Path, files: Iterable[ShardFile]) -> None:
        """Create the files in a folder."""
        self.folder, self.files = folder, list(files)
        self.error: Exception | None = None
        self.place_of_tensor = {
            name: (folder / file.name, offset) for file in self.files for name, offset in file.offset_of_tensor.items()
        }
        for file in self.files:
            path = folder / file.name
            self.attempt(path, partial(write_at, path, file.header, 0, os.O_CREAT | os.O_EXCL))

    def write(self, name: str, first_row: int, tensor: Tensor) -> None:
        """Write a tensor, or some of its rows, where it belongs; what is in another rank's files is left out."""
        if name in self.place_of_tensor and tensor.numel() > 0 and self.error is None:
            path, offset = self.place_of_tensor[name]
            data = list_bytes(tensor)
            row_bytes = len(data) // len(tensor) if tensor.dim() > 0 else 0
            self.attempt(path, partial(write_at, path, data, offset + first_row * row_bytes))

    def finish(self) -> None:
        """Wait until the files are on the disk. Raises CheckpointError."""
        for file in self.files:
            path = self.folder / file.name
            self.attempt(path, partial(finish_file, path, file.num_bytes))
        if self.error is not None:
            raise self.error

    def attempt(self, path: Path, act: Callable[[], None]) -> None:
        """Run an act on a file, unless there has been an error."""

        def run() -> None:
            """Run the act, its errors with the file's name."""
            with system_errors(path, "written"):
                act()

        if self.error is None:
            _, self.error = attempt(run)


def list_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_at(path: Path, data: bytes | memoryview, offset: int, flags: int = 0) -> None:
    """Write bytes at a place of a file."""
    handle, rest = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666), memoryview(data)
    try:
        while rest:
            written = os.pwrite(handle, rest[:_MOST_WRITTEN], offset)
            rest, offset = rest[written:], offset + written
    finally:
        os.close(handle)


def finish_file(path: Path, num_bytes: int) -> None:
    """Wait until a file is on the disk, with all its bytes."""
    sync(path)
    if (found := path.stat().st_size) != num_bytes:
        raise CheckpointError(f"{path}: is {found} bytes, {num_bytes} were to be written")


def make_index(files: Iterable[ShardFile]) -> str:
    """Make the text of the index, which names the file of each tensor."""
    files = list(files)
    total = sum(file.num_bytes - len(file.header) for file in files)
    shard_of_name = {name: file.name for file in files for name in file.offset_of_tensor}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": shard_of_name}, indent=2, sort_keys=True) + "\n"
