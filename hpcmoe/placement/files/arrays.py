"""Arrays of numbers in files of NumPy, with one line for whatever their headers may claim."""

import io
import os
import warnings

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line

NPY_MARK = b"\x93NUMPY"


def read_npy(path: str | os.PathLike, content: bytes, most_numbers: int, what: str) -> np.ndarray:
    """Read the content of a NumPy file -> its array. Raises ConfigError; what: of which numbers it must be."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on headers of Python 2
            array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # whatever its header makes of Python's parser
        broken = "its header is broken" if "malformed" in str(error) else one_line(error)
        reason = "it holds Python objects: save the numbers alone" if "pickle" in broken else broken
        raise ConfigError(f"{one_line(path)}: cannot be read: {reason}") from None
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise ConfigError(f"{one_line(path)}: the array must be of {what}, is of {one_line(array.dtype)}")
    if array.size > most_numbers:
        raise ConfigError(f"{one_line(path)}: the array has {array.size} entries: must be at most {most_numbers}")
    return array
