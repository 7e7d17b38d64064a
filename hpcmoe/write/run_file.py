"""A run's record read whole, for its report: every metric and value of its own, whatever version wrote it."""

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError
from hpcmoe.messages import one_line
from hpcmoe.write.hdf5 import read_entry
from hpcmoe.write.trust import check_stored, damage_errors, list_datasets

_MOST_BYTES = 2**26  # of a metric of arrays; of one that is larger, rows at even distances are read
_MOST_VALUE_BYTES = 2**31  # of a value of the whole run


class StoredMetric(NamedTuple):
    """A figure of many steps."""

    steps: np.ndarray  # [n]
    values: np.ndarray  # [n, ...]
    unit: str


def read_run_file(path: Path) -> tuple[dict[str, StoredMetric], dict[str, Any]]:
    """Read a run.h5 -> (metrics, values of the whole run), each by `chapter/name`.

    Raises CheckpointError in one line where the file cannot be read, is damaged or points elsewhere.
    """
    metrics: dict[str, StoredMetric] = {}
    values: dict[str, Any] = {}
    with damage_errors(path), h5py.File(path) as file:
        found = dict(list_datasets(file, path))
        for name, dataset in found.items():
            chapter, _, last = name.rpartition("/")
            if last in ("step", "value") and {f"{chapter}/step", f"{chapter}/value"} <= found.keys():
                if last == "value":
                    metrics[chapter] = read_metric(file, chapter, path)
            else:
                check_stored(name, dataset, path)
                if dataset.nbytes <= _MOST_VALUE_BYTES:
                    values[name] = read_entry(dataset)
    return metrics, values


def read_metric(file: h5py.File, name: str, path: Path) -> StoredMetric:
    """Read a metric -> StoredMetric; of a very large one rows at even distances, the last among them."""
    group = file[name]
    for part in ("step", "value"):
        check_stored(f"{name}/{part}", group[part], path)
    steps, values = group["step"], group["value"]
    if steps.ndim != 1 or values.ndim < 1 or len(steps) != len(values):
        shapes = f"{list(steps.shape)} steps, {list(values.shape)} values"
        raise CheckpointError(f"{path}: {one_line(name)} is damaged: {shapes}")

    # Read all rows, or as many as memory should hold.
    unit = one_line(group.attrs.get("unit", ""))
    num_rows = len(steps) if values.ndim == 1 else max(2, _MOST_BYTES * len(values) // max(values.nbytes, 1))
    if num_rows >= len(steps):
        return StoredMetric(steps[:], values[:], unit)
    rows = np.unique(np.linspace(0, len(steps) - 1, num_rows).astype(np.int64))
    return StoredMetric(steps[:][rows], np.stack([values[row] for row in rows]), unit)
