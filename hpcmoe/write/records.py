"""The run's record, out/NAME/run.h5: metrics of every step and values of the whole run, which rank 0 alone writes."""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from mpi4py import MPI

from hpcmoe import __version__
from hpcmoe.errors import CheckpointError, on_root
from hpcmoe.write.hdf5 import Value, checkpoint_errors, find_errno, list_numbered, open_replacement, write_entry
from hpcmoe.write.scales import describe_dataset, detach_scales
from hpcmoe.write.trust import damage_errors, find_own

FORMAT_VERSION = 2  # of run.h5: 1 had neither scales nor descriptions
_MOST_OF_COMMAND = 4096  # characters of a command line that are kept
_CHUNK_ROWS = 256  # of a metric that is one number
_CHUNK_BYTES = 65536  # of a metric that is an array
_SAMPLED_BYTES = 4_000_000  # of a metric that is sampled, after which half as many steps are kept
_FLUSH_SECONDS = 1.0  # between two flushes
_FLUSH_SHARE = 0.02  # of a run's time may go into flushes, however large its file


@contextlib.contextmanager
def open_records(comm: MPI.Comm, folder: Path, keep_until_step: int | None = None) -> Iterator["Records | NullRecords"]:
    """Open folder/run.h5 -> Records, or NullRecords on ranks other than 0. Collective over comm.

    The file is new; or, with keep_until_step, the existing one without what came after that step. What is
    buffered is written at the end, whatever ends the block. Raises CheckpointError.
    """
    path = folder / "run.h5"
    on_root(comm, lambda: create_or_truncate(path, keep_until_step))
    records = (Records if comm.rank == 0 else NullRecords)(path)
    try:
        yield records
    except BaseException:
        with contextlib.suppress(CheckpointError):  # the error that ended the run matters more
            records.flush()
        raise
    on_root(comm, records.flush)


def create_or_truncate(path: Path, keep_until_step: int | None) -> None:
    """Create a new file, or truncate the old one to a step; one that cannot be read is kept under another name."""
    num_rows_of_metric = None if keep_until_step is None else count_rows_until(path, keep_until_step)
    with checkpoint_errors(path, "written"):
        if num_rows_of_metric is None and path.exists():
            path.rename(next(list_numbered(path)))
    with open_replacement(path) as file:
        describe_origin(file)
        for name, num_rows in (num_rows_of_metric or {}).items():
            file[name]["step"].resize(num_rows, axis=0)
            file[name]["value"].resize(num_rows, axis=0)


def count_rows_until(path: Path, step: int) -> dict[str, int] | None:
    """Count the rows up to a step -> {metric: its number of rows}, or None where the file is missing or damaged.

    Raises CheckpointError where the system keeps it from being read.
    """
    num_rows_of_metric = {}

    def visit(name: str, entry: h5py.Group | h5py.Dataset) -> None:
        if isinstance(entry, h5py.Group) and "step" in entry and "value" in entry:
            steps, values = (find_own(entry, part, path) for part in ("step", "value"))
            if steps is not None and values is not None:
                num_rows_of_metric[name] = int(np.searchsorted(steps[:], step, side="right"))

    # Visit every metric; an error that the system does not explain is the file's.
    if not path.exists():
        return None
    try:
        with damage_errors(path), h5py.File(path) as file:
            file.visititems(visit)
    except CheckpointError as error:
        if find_errno(error.__cause__) is not None:
            raise
        return None
    return num_rows_of_metric


class Records:
    """The record of a run: /chapter/name holds `step` [n] and `value` [n, ...] of a metric, or one value.

    Steps of a metric come in ascending order. Rows wait in memory until a flush, which replaces the file
    whole: it can be read at any time, and after any crash it holds all that was flushed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics: dict[tuple[str, str, str], tuple[list, list]] = {}  # (chapter, name, unit): steps, values
        self.values: dict[tuple[str, str], tuple[Value, str]] = {}  # (chapter, name): value, unit
        self.sampled_bytes: dict[tuple[str, str], int] = {}  # of each metric of sample()
        self.due = time.monotonic() + _FLUSH_SECONDS

    def append(self, step: int, chapter: str, name: str, value: np.ndarray | float, unit: str = "") -> None:
        """Append a step's value to a metric: a number, kept as float64, or an array, kept in its own dtype."""
        value = np.array(value)
        steps, values = self.metrics.setdefault((chapter, name, unit), ([], []))
        steps.append(step)
        values.append(value.astype(np.float64) if value.ndim == 0 else value)

    def sample(self, step: int, chapter: str, name: str, value: np.ndarray, unit: str = "") -> None:
        """Append an array as append() does: of every step at first, of every second one once there is much of it, ...

        The file then grows with the logarithm of the number of steps. A resumed run begins anew.
        """
        num_bytes = self.sampled_bytes.get((chapter, name), 0)
        if step % 2 ** (num_bytes // _SAMPLED_BYTES) == 0:
            self.append(step, chapter, name, value, unit)
            self.sampled_bytes[chapter, name] = num_bytes + value.nbytes

    def describe(self, chapter: str, name: str, value: Value, unit: str = "") -> None:
        """Record a value of the whole run; the last one of a name counts."""
        self.values[chapter, name] = (np.array(value) if isinstance(value, np.ndarray) else value, unit)

    def flush(self) -> None:
        """Write what is buffered; raises CheckpointError, and keeps the file as it was, where that fails."""
        started = time.monotonic()
        if self.metrics or self.values:
            # Replace values, append to metrics.
            with open_replacement(self.path) as file:
                for (chapter, name), (value, unit) in self.values.items():
                    group = file.require_group(chapter)
                    replace_entry(group, name, value, unit)
                for (chapter, name, unit), (steps, values) in self.metrics.items():
                    append_rows(file.require_group(chapter), name, unit, np.array(steps), np.stack(values))
            self.metrics.clear()
            self.values.clear()

        # Wait longer after a long flush.
        ended = time.monotonic()
        self.due = ended + max(_FLUSH_SECONDS, (ended - started) / _FLUSH_SHARE)

    def flush_if_due(self) -> None:
        """Flush about once a second, less often once that would take more than its share of the run."""
        if time.monotonic() >= self.due:
            self.flush()


class NullRecords(Records):
    """The record on ranks other than 0, which keeps nothing."""

    def append(self, *_: object, **__: object) -> None:
        """Ignore the call."""

    sample = describe = flush = flush_if_due = append


def describe_origin(file: h5py.File) -> None:
    """Write into the root's attributes what made a file, when, where and by which command."""
    file.attrs.update(
        format_version=FORMAT_VERSION,
        creator=f"hpcmoe {__version__}",
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        host=os.uname().nodename,
        command_line=shlex.join(sys.argv).encode("utf-8", "backslashreplace").decode()[:_MOST_OF_COMMAND],
        git_commit=read_commit(),
    )


@functools.cache
def read_commit() -> str:
    """Return the commit of the clone that this package lies in, as git tells it; an empty text where there is none."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists():
        return ""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=False).stdout.strip()
    return ""


def replace_entry(group: h5py.Group, name: str, value: Value, unit: str) -> None:
    """Write a value of the whole run in place of the last one; of a dict, each entry as an attribute too."""
    if name in group:
        detach_scales(group[name])
        del group[name]
    write_entry(group, name, value)
    describe_dataset(f"{group.name.lstrip('/')}/{name}", group[name], unit)
    if isinstance(value, dict):
        group[name].attrs.update({key: text for key, text in value.items() if key not in group[name].attrs})


def append_rows(group: h5py.Group, name: str, unit: str, steps: np.ndarray, values: np.ndarray) -> None:
    """Append rows, steps [n] and values [n, ...], to a metric of a chapter's group."""
    # Rename a metric whose rows differ in shape or dtype, as after a resume on other ranks.
    metric = group.get(name)
    if metric is not None:
        kept = metric["value"]
        if kept.shape[1:] != values.shape[1:] or kept.dtype != values.dtype:
            rename_or_delete(group, name)
            metric = None

    # Append to the metric, or to a new one.
    if metric is None:
        metric = make_metric(group, name, values)
    metric.attrs["unit"] = unit
    if "DIMENSION_LIST" not in metric["value"].attrs:  # new, or of a version that had none
        describe_dataset(metric.name.lstrip("/"), metric["value"], unit, metric["step"])
        metric.attrs["description"] = metric["value"].attrs["description"]
    for dataset, rows in ((metric["step"], steps), (metric["value"], values)):
        dataset.resize(len(dataset) + len(rows), axis=0)
        dataset[-len(rows) :] = rows


def rename_or_delete(group: h5py.Group, name: str) -> None:
    """Rename a metric to NAME_until_STEP; delete it where it is empty."""
    steps = group[name]["step"]
    if len(steps) == 0:
        detach_scales(group[name]["value"])
        del group[name]
        return
    kept = f"{name}_until_{steps[-1]}"
    while kept in group:  # of a shape that a resume had before
        kept += "_again"
    group.move(name, kept)


def make_metric(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Group:
    """Make an empty metric for rows like these."""
    metric = group.create_group(name)
    num_rows = min(_CHUNK_ROWS, max(1, _CHUNK_BYTES // max(1, values[0].nbytes)))
    chunks = (num_rows, *(max(1, extent) for extent in values.shape[1:]))
    metric.create_dataset("step", (0,), np.int64, maxshape=(None,), chunks=(_CHUNK_ROWS,))
    shape, largest = (0, *values.shape[1:]), (None, *values.shape[1:])
    metric.create_dataset("value", shape, values.dtype, maxshape=largest, chunks=chunks)
    return metric
