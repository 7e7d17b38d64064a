"""Tensors out of a file of torch.save, without torch and without running what is pickled in it.

Such a file is a zip archive: NAME/data.pkl, a pickle that names the tensors' shapes, strides and storages, and a file
NAME/data/KEY with the numbers of each storage. Of the pickle only plain values and tensors are read, as torch.load does
with weights_only=True; whatever else it names is rejected before it is imported.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value

_MOST_FILES, _MOST_PICKLE_BYTES = 100_000, 2**24
MOST_NUMBERS = 2**26  # of a tensor, or of another array that is read
_DTYPES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": "<u2",
}  # fmt: skip
_WHAT_IS_READ = "only tensors, numbers, texts, lists and dicts are read: save the counts alone"


def read_torch(path: object, content: bytes) -> Any:
    """Read the content of a file of torch.save -> its values, each tensor an array. Raises ConfigError in one line."""
    where = one_line(path)
    if content.count(b"PK\x01\x02") > _MOST_FILES:
        raise ConfigError(f"{where}: is a zip archive of more than {_MOST_FILES} files, none of torch.save")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return TensorUnpickler(where, archive, len(content)).load()
    except ConfigError:
        raise
    except Exception as error:  # whatever a broken pickle or archive makes of Python's readers
        raise ConfigError(f"{where}: cannot be read as torch.save writes: {one_line(error)}") from None


class TensorUnpickler(pickle._Unpickler):  # Python's own: C's trusts a pickle's sizes
    """An unpickler that knows tensors and plain values alone."""

    stack: list[Any]  # of Python's own
    pop_mark: Callable[[], list[Any]]

    def __init__(self, where: str, archive: zipfile.ZipFile, most_bytes: int) -> None:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ConfigError(f"{where}: is a zip archive without the data.pkl of torch.save: save it as .npy or .json")
        self.where, self.archive, self.folder = where, archive, names[0].removesuffix("data.pkl")
        self.bytes_left, self.storages = most_bytes, dict[str, np.ndarray]()
        order = f"{self.folder}byteorder"
        if order in archive.namelist() and self.read_file("byteorder", 16) != b"little":
            raise ConfigError(f"{where}: its numbers are big-endian, which is not read: save it as .npy or .json")
        super().__init__(io.BytesIO(self.read_file("data.pkl", _MOST_PICKLE_BYTES)), encoding="utf-8")

    def set_items(self, pairs: list[Any]) -> None:
        """Set keys and values, one after the other, into the dict on top. Raises ConfigError for keys of other kinds.

        Tuples within tuples, of a hostile file, could take for ever to hash.
        """
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ConfigError(f"{self.where}: a dict has a key that is no text: {_WHAT_IS_READ}")
            self.stack[-1][key] = value

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        """Set some items of a dict."""
        self.set_items(self.pop_mark())

    def reject(self) -> None:
        """Raise ConfigError for an instruction that no dump of tensors has."""
        raise ConfigError(f"{self.where}: holds objects or sets: {_WHAT_IS_READ}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: reject,
        pickle.EMPTY_SET[0]: reject,
        pickle.ADDITEMS[0]: reject,
        pickle.FROZENSET[0]: reject,
    }

    def read_file(self, name: str, most_bytes: int) -> bytes:
        """Read a file of the archive, stored as it is. Raises ConfigError."""
        info = self.archive.getinfo(f"{self.folder}{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most_bytes:
            raise ConfigError(f"{self.where}: {one_line(name)} is compressed or larger than its file, not torch.save's")
        return self.archive.read(info)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle; nothing is imported. Raises ConfigError."""
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self.make_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): lambda: collections.OrderedDict[Any, Any](),
            ("torch", "device"): lambda *words: ":".join(map(str, words)),
            ("torch", "Size"): tuple,
        }
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in allowed:
            raise ConfigError(f"{self.where}: holds {one_line(f'{module}.{name}')}: {_WHAT_IS_READ}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Read a storage: pid = ("storage", dtype, key, place, numbers) -> [numbers]. Raises ConfigError."""
        _, dtype, key, _, count = pid
        if dtype not in _DTYPES.values() or not isinstance(key, str):
            raise ConfigError(f"{self.where}: holds numbers of a kind that is not read: {_WHAT_IS_READ}")
        if key not in self.storages:
            content = self.read_file(f"data/{key}", self.bytes_left)
            self.bytes_left -= len(content)
            numbers = np.frombuffer(content, dtype)
            self.storages[key] = widen(numbers) if dtype == "<u2" else numbers
        if len(self.storages[key]) != count:
            raise ConfigError(
                f"{self.where}: storage {one_line(key)} has {len(self.storages[key])} numbers, not {count}"
            )
        return self.storages[key]

    def make_tensor(self, storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: object) -> np.ndarray:
        """Return a view of a storage. Raises ConfigError where that is beyond the storage, or too large."""
        sizes = (offset, *shape, *strides)
        if not all(type(size) is int and size >= 0 for size in sizes) or len(shape) != len(strides):
            raise ConfigError(f"{self.where}: a tensor of shape {show_value(shape)} and strides {show_value(strides)}")
        count, last = math.prod(shape), offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count > MOST_NUMBERS:
            raise ConfigError(f"{self.where}: a tensor of {show_value(count)} numbers: must be at most {MOST_NUMBERS}")
        if count and last >= len(storage):
            raise ConfigError(
                f"{self.where}: a tensor of shape {show_value(shape)} ends at number {show_value(last)} of a storage "
                f"of {len(storage)}"
            )
        in_bytes = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)


def widen(numbers: np.ndarray) -> np.ndarray:
    """Convert bfloat16, uint16 [n] as read, to float32 [n]: their bits are its upper half."""
    return (numbers.astype(np.uint32) << 16).view(np.float32)
