"""Safetensors files: headers checked before anything is allocated, tensors read by exactly their ranges of bytes.

A file is 8 bytes little-endian, the length of its header; the header, JSON {name: {dtype, shape, data_offsets}}; then
the tensors' bytes, without gaps.
"""

import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcmoe.errors import CheckpointError, ConfigError
from hpcmoe.messages import format_size, one_line, show_value
from hpcmoe.reading import parse_json

DTYPE_OF_CODE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
PIECE_BYTES = 2**23  # read at a time, where what is read is converted
_MOST_READ = 2**26  # bytes of one call, so that progress shows
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor's place in a file, one contiguous range."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        """Return the bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cut(self, begin: int, end: int) -> "StoredTensor":
        """Return the rows [begin, end) of the first dimension."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(end - begin, *self.shape[1:]), offset=self.offset + begin * row_bytes)

    def reshape(self, *shape: int) -> "StoredTensor":
        """Return the same bytes in another shape."""
        return replace(self, shape=shape)


class TensorReader:
    """Reads ranges of files, one file open at a time, and counts the bytes."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        """progress: called with the bytes read so far, after each read."""
        self.num_bytes, self.progress = 0, progress
        self._path, self._handle = "", -1

    def read(self, path: str, offset: int, memory: Tensor) -> None:
        """Read a range of a file into contiguous memory of the host. Raises CheckpointError."""
        target = memoryview(memory.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            handle = self._open(path)
            while target:
                got = os.preadv(handle, [target[:_MOST_READ]], offset)
                if got == 0:
                    raise CheckpointError(f"{one_line(path)}: has no byte {offset}: was cut while it was read")
                target, offset, self.num_bytes = target[got:], offset + got, self.num_bytes + got
                self.progress(self.num_bytes)
        except OSError as error:
            raise CheckpointError(f"{one_line(path)}: cannot be read: {error.strerror}") from None

    def read_tensor(self, stored: StoredTensor) -> Tensor:
        """Read a tensor into fresh memory. Raises CheckpointError."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read(stored.path, stored.offset, tensor)
        return tensor

    def fill(self, stored: StoredTensor, target: Tensor) -> None:
        """Read a tensor into a target of its shape: into the target's own memory, or by pieces that are converted."""
        if target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous():
            self.read(stored.path, stored.offset, target)
            return
        if target.is_contiguous():
            stored, target = stored.reshape(math.prod(stored.shape)), target.reshape(-1)
        for begin, end in list_pieces(stored):
            target[begin:end].copy_(self.read_tensor(stored.cut(begin, end)))

    def close(self) -> None:
        """Close the open file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._path, self._handle = "", -1

    def _open(self, path: str) -> int:
        """Open a file, unless it is open -> its descriptor."""
        if path != self._path:
            self.close()
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._path = path
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)  # else the system reads far ahead of each range
        return self._handle


def list_pieces(stored: StoredTensor, most: int = PIECE_BYTES, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of a tensor's rows, a multiple of some rows each, of at most so many bytes where they can be."""
    row_bytes = max(math.prod(stored.shape[1:]) * stored.dtype.itemsize, 1)
    step = max(most // row_bytes // multiple, 1) * multiple
    for begin in range(0, stored.shape[0], step):
        yield begin, min(begin + step, stored.shape[0])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a file -> its tensors by name. Raises CheckpointError in one line."""
    name = one_line(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{name}: is no regular file")
            text, first = read_header_text(name, handle, status.st_size)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        tree = parse_json(path, text)
    except ConfigError as error:
        raise CheckpointError(f"{error}") from None
    return check_entries(path, tree, first, status.st_size)


def read_header_text(name: str, handle: int, file_bytes: int) -> tuple[str, int]:
    """Read the header of an open file -> (its text, where the tensors begin). Refuses a long one before it is read."""
    length = int.from_bytes(os.pread(handle, _LENGTH_BYTES, 0), "little")
    if file_bytes < _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
        raise CheckpointError(
            f"{name}: no safetensors file, or cut: has {file_bytes} B, its header alone would be of {length} B"
        )
    if length > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{name}: header of {format_size(length)}: at most {format_size(_MOST_HEADER_BYTES)}")
    try:
        return os.pread(handle, length, _LENGTH_BYTES).decode(), _LENGTH_BYTES + length
    except UnicodeDecodeError:
        raise CheckpointError(f"{name}: no safetensors file: the header is not UTF-8") from None


def check_entries(path: Path, tree: Any, first: int, file_bytes: int) -> dict[str, StoredTensor]:
    """Check the entries of a header: they tile the bytes from first to the file's end -> the tensors by name."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"{one_line(path)}: the header is no JSON object")
    tensors = {name: check_entry(path, name, entry, first) for name, entry in tree.items() if name != "__metadata__"}
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            how = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{one_line(path)}: {one_line(name)}: data_offsets {how}")
        end += tensor.num_bytes
    if end != file_bytes:
        how = f"is cut at byte {file_bytes}" if end > file_bytes else f"goes on to byte {file_bytes}"
        raise CheckpointError(f"{one_line(path)}: {how}: by its header it ends at {end}")
    return tensors


def check_entry(path: Path, name: str, entry: Any, first: int) -> StoredTensor:
    """Check one entry of a header -> StoredTensor. Raises CheckpointError, which names file and tensor."""
    where = f"{one_line(path)}: {one_line(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have dtype, shape and data_offsets alone")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPE_OF_CODE:
        raise CheckpointError(f"{where}: dtype = {show_value(code)}: must be one of {', '.join(DTYPE_OF_CODE)}")
    if not is_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{where}: shape = {show_value(shape)}: must be up to {_MOST_DIMENSIONS} sizes")
    tensor = StoredTensor(path=str(path), dtype=DTYPE_OF_CODE[code], shape=tuple(shape), offset=first)
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != tensor.num_bytes:
        wanted = f"[begin, begin + {tensor.num_bytes}], for {code} {shape}"
        raise CheckpointError(f"{where}: data_offsets = {show_value(offsets)}: must be {wanted}")
    return replace(tensor, offset=first + offsets[0])


def is_sizes(value: Any) -> bool:
    """Return True if a value of JSON is a list of whole numbers, 0 to 2^63 - 1."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
