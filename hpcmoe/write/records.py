"""The run's record, out/NAME/run.h5: figures of every step and facts of the whole, which rank 0 alone writes."""

import contextlib
import time

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError, on_root
from hpcmoe.write.hdf5 import (
    HDF5_ERRORS,
    describe_os_error,
    free_name,
    is_system_error,
    open_replacement,
    raise_as_checkpoint_error,
    write_value,
)

CHUNK_ROWS = 256  # of a metric that is one number
CHUNK_BYTES = 65536  # of a metric that is an array
FLUSH_SECONDS = 1.0  # between two flushes
FLUSH_SHARE = 0.02  # of a run's time may go into flushes, however large its file


@contextlib.contextmanager
def open_records(comm, folder, keep_until_step=None):
    """Open folder/run.h5 -> Records, which on ranks other than 0 keep nothing. Collective over comm.

    The file is new; or, with keep_until_step, the existing one without what came after that step. What is
    buffered is written on the way out, whatever the way. Raises CheckpointError.
    """
    path = folder / "run.h5"
    on_root(comm, lambda: begin(path, keep_until_step))
    records = Records(path) if comm.rank == 0 else NullRecords()
    try:
        yield records
    except BaseException:
        with contextlib.suppress(CheckpointError):  # what ended the run is the better news
            records.flush()
        raise
    on_root(comm, records.flush)


def begin(path, keep_until_step):
    """Start a new file, or cut the old one back to a step; one that cannot be read is kept beside."""
    cuts = None if keep_until_step is None else count_rows_until(path, keep_until_step)
    with raise_as_checkpoint_error(path, "written"):
        if cuts is None and path.exists():
            path.rename(free_name(path))
    with open_replacement(path) as file:
        for name, num_rows in (cuts or {}).items():
            file[name]["step"].resize(num_rows, axis=0)
            file[name]["value"].resize(num_rows, axis=0)


def count_rows_until(path, step):
    """Count the entries up to a step -> {metric: its number of rows}, or None where the file is missing or damaged.

    Raises CheckpointError where the system keeps it from being read.
    """
    cuts = {}

    def visit(name, entry):
        if isinstance(entry, h5py.Group) and "step" in entry and "value" in entry:
            cuts[name] = int(np.searchsorted(entry["step"][:], step, side="right"))

    if not path.exists():
        return None
    try:
        with h5py.File(path) as file:
            file.visititems(visit)
    except HDF5_ERRORS as error:
        if is_system_error(error):
            raise CheckpointError(f"{path}: cannot be read: {describe_os_error(error)}") from error
        return None
    return cuts


class Records:
    """The record of a run: /chapter/name holds `step` [n] and `value` [n, ...] of a metric, or one fact.

    Steps of a metric come in ascending order. Entries wait in memory until a flush, which replaces the file
    whole: it can be read at any time, and after any crash it holds all that was flushed.
    """

    def __init__(self, path):
        self.path = path
        self.metrics = {}  # (chapter, name, unit) -> steps, values
        self.facts = {}  # (chapter, name) -> value, unit
        self.due = time.monotonic() + FLUSH_SECONDS

    def append(self, step, chapter, name, value, unit=""):
        """Note a metric of a step: a number, kept as float64, or an array, kept in its own dtype."""
        value = np.array(value)
        steps, values = self.metrics.setdefault((chapter, name, unit), ([], []))
        steps.append(step)
        values.append(value.astype(np.float64) if value.ndim == 0 else value)

    def describe(self, chapter, name, value, unit=""):
        """Note a fact of the whole run: an array, number, string, list or dict of strings; the last one counts."""
        self.facts[chapter, name] = (np.array(value) if isinstance(value, np.ndarray) else value, unit)

    def flush(self):
        """Write what is buffered; raises CheckpointError, and keeps the file as it was, where that fails."""
        started = time.monotonic()
        if self.metrics or self.facts:
            with open_replacement(self.path) as file:
                for (chapter, name), (value, unit) in self.facts.items():
                    replace_fact(file.require_group(chapter), name, value, unit)
                for (chapter, name, unit), (steps, values) in self.metrics.items():
                    append_rows(file.require_group(chapter), name, unit, np.array(steps), np.stack(values))
            self.metrics.clear()
            self.facts.clear()
        ended = time.monotonic()
        self.due = ended + max(FLUSH_SECONDS, (ended - started) / FLUSH_SHARE)

    def flush_if_due(self):
        """Flush about once a second, less often once that would take more than its share of the run."""
        if time.monotonic() >= self.due:
            self.flush()


class NullRecords:
    """The record as the other ranks see it: nothing to keep."""

    def append(self, step, chapter, name, value, unit=""):
        """Keep nothing."""

    def describe(self, chapter, name, value, unit=""):
        """Keep nothing."""

    def flush(self):
        """Write nothing."""

    def flush_if_due(self):
        """Write nothing."""


def replace_fact(group, name, value, unit):
    """Write a fact in place of the one of that name."""
    if name in group:
        del group[name]
    write_value(group, name, value, unit)


def append_rows(group, name, unit, steps, values):
    """Add rows, steps [n] and values [n, ...], to a metric of a chapter's group."""
    metric = group.get(name)
    if metric is not None and not takes(metric["value"], values):
        retire(group, name)
        metric = None
    if metric is None:
        metric = make_metric(group, name, values)
    metric.attrs["unit"] = unit
    for dataset, rows in ((metric["step"], steps), (metric["value"], values)):
        dataset.resize(len(dataset) + len(rows), axis=0)
        dataset[-len(rows) :] = rows


def takes(dataset, values):
    """Whether rows of these values fit a dataset; after a resume on other ranks they may not."""
    return dataset.shape[1:] == values.shape[1:] and dataset.dtype == values.dtype


def retire(group, name):
    """Leave a metric of another shape under a name of its own, NAME_until_STEP, unless it is empty."""
    steps = group[name]["step"]
    if len(steps) > 0:
        kept = f"{name}_until_{steps[-1]}"
        while kept in group:  # of a shape that a resume had before
            kept += "_again"
        group.move(name, kept)
    else:
        del group[name]


def make_metric(group, name, values):
    """Make an empty metric for rows like these."""
    metric = group.create_group(name)
    num_rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES // max(1, values[0].nbytes)))
    row_chunk = tuple(max(1, extent) for extent in values.shape[1:])
    metric.create_dataset("step", (0,), np.int64, maxshape=(None,), chunks=(CHUNK_ROWS,))
    metric.create_dataset(
        "value", (0, *values.shape[1:]), values.dtype, maxshape=(None, *values.shape[1:]), chunks=(num_rows, *row_chunk)
    )
    return metric
