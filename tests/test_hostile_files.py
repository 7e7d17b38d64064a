"""Files that somebody else wrote, or put something else in place of: one line, at once, and little memory."""

import os
import resource

import h5py
import numpy as np
import pytest

from hpcmoe import reading
from hpcmoe.cluster.topology import load_topology
from hpcmoe.errors import HpcmoeError
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.files.formats import read_slots
from hpcmoe.write.checksums import CHECKSUMS, read_checksums
from hpcmoe.write.folder import MARK, is_written_by_run
from hpcmoe.write.lock import LOCK, read_lock
from hpcmoe.write.problem import read_last_placement, read_loads, read_run_problem
from hpcmoe.write.records import count_rows_until

MOST_KILOBYTES = 1_500_000  # that reading one may take, far below what the sparse file declares
SPARSE_BYTES = 2**36


def read_model(path):
    """Read a model's folder whose config.json leads to a path."""
    stored_model = pytest.importorskip("hpcmoe.model.hf.stored_model")
    folder = path.with_name("model")
    folder.mkdir()
    (folder / "config.json").symlink_to(path)
    return stored_model.read_stored_model(folder)


READERS = {
    "JSON": reading.read_json,
    "topology": load_topology,
    "case": lambda path: read_case(path, "step", False),
    "map": lambda path: read_slots(path, None),
    "model": read_model,
    "loads": read_loads,
    "problem": read_run_problem,
    "placement": read_last_placement,
}
HOSTILE = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "nowhere": lambda path: path.symlink_to("not/there"),
    "sparse": lambda path: (path.touch(), os.truncate(path, SPARSE_BYTES)),
    "empty": lambda path: path.touch(),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "deep": lambda path: path.write_text("[" * 1_000_000),
    "deep objects": lambda path: path.write_text('{"bytes_per_second":' * 200_000),
    "number": lambda path: path.write_text("9" * 100_000),
    "NaN": lambda path: path.write_text("NaN"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_one_line(tmp_path, monkeypatch, reader, hostile):
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.05)
    path = tmp_path / "file.json"
    HOSTILE[hostile](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reader == "JSON" and hostile == "NaN":  # a number, which those who know what it means refuse
        return
    with pytest.raises(HpcmoeError) as error:
        READERS[reader](path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000 + len(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_stands_in_a_runs_folder_neither_waits_nor_fills_memory(tmp_path, monkeypatch, hostile):
    """The lock, the mark and the record that others put there count as none; a list of checksums is one line."""
    monkeypatch.setattr("hpcmoe.write.lock.READ_SECONDS", 0.05)
    for name in (LOCK, MARK, "run.h5", "topology.json", "report.html", CHECKSUMS):
        HOSTILE[hostile](tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_lock(tmp_path / LOCK) is None
    assert not any(is_written_by_run(tmp_path / name) for name in (MARK, "run.h5", "topology.json", "report.html"))
    if hostile != "loop":  # the system's error, one line too
        assert count_rows_until(tmp_path / "run.h5", 1) is None
    if hostile != "empty":
        with pytest.raises(HpcmoeError):
            read_checksums(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES


def test_a_record_whose_metric_is_elsewhere_is_not_gone_on_with(tmp_path):
    """A resumed run truncates its metrics, which would cut another's."""
    for name, link in (("run.h5", True), ("other.h5", False)):
        with h5py.File(tmp_path / name, "w") as file:
            metric = file.create_group("train/loss")
            metric.create_dataset("value", data=np.ones(3), maxshape=(None,))
            if link:
                metric["step"] = h5py.ExternalLink("other.h5", "/train/loss/step")
            else:
                metric.create_dataset("step", data=np.arange(3), maxshape=(None,))
    assert count_rows_until(tmp_path / "other.h5", 1) == {"train/loss": 2}
    assert count_rows_until(tmp_path / "run.h5", 1) is None
