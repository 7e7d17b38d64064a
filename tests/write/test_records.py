"""The record holds every flushed step whatever happens, at little cost, and is cut back where a run resumes."""

import fcntl
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.errors import CheckpointError
from hpcmoe.write.records import NullRecords, Records, open_records

# Write steps for ever, saying which are flushed.
WRITER = """
import pathlib, sys
from mpi4py import MPI
from hpcmoe.write.records import open_records
with open_records(MPI.COMM_WORLD, pathlib.Path(sys.argv[1])) as records:
    for step in range(10**9):
        for name in range(10):
            records.append(step, "train", f"metric{name}", step + name / 10)
        records.flush()
        print(step, flush=True)
"""


def read(path, chapter, name):
    """Read a metric -> steps, values."""
    with h5py.File(path) as file:
        return file[chapter][name]["step"][:], file[chapter][name]["value"][:]


def write_steps(comm, folder, steps, value_of_step=float, keep_until_step=None):
    with open_records(comm, folder, keep_until_step) as records:
        for step in steps:
            records.append(step, "train", "loss", value_of_step(step), "nats/byte")


def test_numbers_and_arrays_with_units(comm, tmp_path):
    with open_records(comm, tmp_path) as records:
        for step in (1, 2, 5):
            records.append(step, "train", "loss", step / 2, "nats/byte")
            records.append(step, "dispatch", "drops", 2**40 + step)
            records.append(step, "dispatch", "tokens_per_link", np.full((2, 3), step, np.int32), "tokens")
            records.flush()
    steps, loss = read(tmp_path / "run.h5", "train", "loss")
    assert steps.dtype == np.int64 and steps.tolist() == [1, 2, 5]
    assert loss.tolist() == [0.5, 1.0, 2.5]
    assert read(tmp_path / "run.h5", "dispatch", "drops")[1].tolist() == [2**40 + step for step in (1, 2, 5)]
    _, tokens = read(tmp_path / "run.h5", "dispatch", "tokens_per_link")
    assert tokens.dtype == np.int32 and tokens[:, 1, 2].tolist() == [1, 2, 5]
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["train/loss"].attrs["unit"] == "nats/byte"
        assert file["dispatch/drops"].attrs["unit"] == ""


def test_integer_first_keeps_later_fractions(comm, tmp_path):
    with open_records(comm, tmp_path) as records:
        records.append(0, "train", "loss", 5)
        records.flush()
        records.append(1, "train", "loss", np.float32(4.5))
    assert read(tmp_path / "run.h5", "train", "loss")[1].tolist() == [5.0, 4.5]


def test_buffered_array_is_a_copy(comm, tmp_path):
    with open_records(comm, tmp_path) as records:
        load = np.ones(3)
        records.append(0, "dispatch", "load", load)
        records.describe("cluster", "memory", load, "bytes")
        load[:] = 7
    assert read(tmp_path / "run.h5", "dispatch", "load")[1].tolist() == [[1, 1, 1]]
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["cluster/memory"][:].tolist() == [1, 1, 1]


def test_describe_replaces(comm, tmp_path):
    with open_records(comm, tmp_path) as records:
        records.describe("run", "config", "[run]\nname = 'a'")
        records.flush()
        records.describe("run", "config", "[run]\nname = 'b'")
        records.describe("run", "versions", {"numpy": "2"})
        records.describe("cluster", "latency", 1e-6, "seconds")
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["run/config"].asstr()[()] == "[run]\nname = 'b'"
        assert dict(file["run/versions"].asstr()[:]) == {"numpy": "2"}
        assert file["cluster/latency"].attrs["unit"] == "seconds"


def test_without_resume_the_file_is_new(comm, tmp_path):
    write_steps(comm, tmp_path, range(5))
    write_steps(comm, tmp_path, range(2))
    assert read(tmp_path / "run.h5", "train", "loss")[0].tolist() == [0, 1]


@given(flushes=st.lists(st.integers(0, 40), max_size=5), keep=st.integers(-1, 60))
def test_resume_cuts_and_appends(tmp_path_factory, flushes, keep):
    from mpi4py import MPI

    folder = tmp_path_factory.mktemp("run")
    with open_records(MPI.COMM_SELF, folder) as records:
        for step in range(sum(flushes)):
            records.append(step, "train", "loss", step)
            if step in np.cumsum(flushes):
                records.flush()
    write_steps(MPI.COMM_SELF, folder, range(keep + 1, keep + 4), lambda step: -step, keep_until_step=keep)
    steps, loss = read(folder / "run.h5", "train", "loss")
    old = [step for step in range(sum(flushes)) if step <= keep]
    new = [keep + 1, keep + 2, keep + 3]
    assert steps.tolist() == old + new
    assert loss.tolist() == old + [-step for step in new]


def test_resume_without_a_file_starts_one(comm, tmp_path):
    write_steps(comm, tmp_path, [7], keep_until_step=6)
    assert read(tmp_path / "run.h5", "train", "loss")[0].tolist() == [7]


def test_resume_from_a_torn_file_starts_one_and_keeps_the_torn(comm, tmp_path):
    write_steps(comm, tmp_path, range(5))
    path = tmp_path / "run.h5"
    torn = path.read_bytes()[:900]
    path.write_bytes(torn)
    write_steps(comm, tmp_path, [7], keep_until_step=6)
    assert read(path, "train", "loss")[0].tolist() == [7]
    assert (tmp_path / "run.h5.1").read_bytes() == torn
    path.write_bytes(torn[:700])
    write_steps(comm, tmp_path, [7], keep_until_step=6)
    assert (tmp_path / "run.h5.1").read_bytes() == torn and (tmp_path / "run.h5.2").read_bytes() == torn[:700]


def test_resume_of_a_record_that_another_process_holds_is_one_line_and_leaves_it(comm, tmp_path):
    write_steps(comm, tmp_path, range(5))
    with (tmp_path / "run.h5").open() as viewer:
        fcntl.flock(viewer, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"run\.h5: cannot be read: another process.*LOCKING=FALSE"):
            write_steps(comm, tmp_path, [7], keep_until_step=6)
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]
    assert read(tmp_path / "run.h5", "train", "loss")[0].tolist() == [0, 1, 2, 3, 4]


def test_resume_on_other_ranks_keeps_the_old_shape_under_its_own_name(comm, tmp_path):
    write_steps(comm, tmp_path, range(3), lambda step: np.zeros(16))
    write_steps(comm, tmp_path, [3, 4], lambda step: np.ones(4), keep_until_step=2)
    assert read(tmp_path / "run.h5", "train", "loss_until_2")[1].shape == (3, 16)
    assert read(tmp_path / "run.h5", "train", "loss")[1].shape == (2, 4)

    # Cut back to nothing, the shape is free.
    write_steps(comm, tmp_path, [0], lambda step: np.ones(5), keep_until_step=-1)
    assert read(tmp_path / "run.h5", "train", "loss")[1].shape == (1, 5)


def test_buffer_is_written_when_the_run_fails(comm, tmp_path):
    with pytest.raises(ZeroDivisionError), open_records(comm, tmp_path) as records:
        records.append(3, "train", "loss", 1.5)
        _ = 1 / 0
    assert read(tmp_path / "run.h5", "train", "loss")[0].tolist() == [3]


def test_flush_when_due_waits_its_second(tmp_path):
    records = Records(tmp_path / "run.h5")
    records.append(0, "train", "loss", 1.0)
    records.flush_if_due()
    assert not records.path.exists()
    records.due = time.monotonic()
    records.flush_if_due()
    assert records.path.exists() and records.due > time.monotonic() + 0.5


def test_a_step_costs_little(tmp_path):
    """In the best of some rounds, steps of 25 metrics take less than three times what h5py needs for their rows."""
    ratios = []
    for attempt in range(5):
        records, started = Records(tmp_path / f"run{attempt}.h5"), time.process_time()
        for step in range(100):
            for name in range(25):
                records.append(step, "train", f"metric{name}", float(step))
            if step % 10 == 9:
                records.flush()
        ended = time.process_time()
        for _ in range(10):
            extend_by_hand(records.path, 10)
        ratios.append((ended - started) / (time.process_time() - ended))
    assert min(ratios) < 3, ratios


def extend_by_hand(path, num_rows):
    """Add rows to all metrics of a file, as one does who asks for nothing else."""
    with h5py.File(path, "r+") as file:
        for metric in file["train"].values():
            for dataset in metric.values():
                dataset.resize(len(dataset) + num_rows, axis=0)
                dataset[-num_rows:] = np.zeros(num_rows)


def test_killed_writer_leaves_all_flushed_steps(tmp_path):
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            flushed = [int(writer.stdout.readline()) for _ in range(5)]
            for _ in range(20):  # whoever looks in while it is written sees it whole
                steps, loss = read(folder / "run.h5", "train", "metric3")
                assert len(steps) >= 5 and np.array_equal(loss, steps + 0.3)
            time.sleep(0.003 * attempt)
            writer.send_signal(signal.SIGKILL)
            flushed += [int(line) for line in writer.stdout if line.endswith("\n")]
        for name in range(10):
            steps, values = read(folder / "run.h5", "train", f"metric{name}")
            assert len(steps) >= len(flushed)
            assert np.array_equal(steps, np.arange(len(steps))) and np.array_equal(values, steps + name / 10)


def test_full_disk_is_one_line_and_loses_nothing(small_disk):
    records = Records(small_disk / "run.h5")
    records.append(0, "train", "loss", 1.0)
    records.flush()
    records.append(1, "train", "load", np.zeros(1 << 18))
    with pytest.raises(CheckpointError) as error:
        records.flush()
    assert str(error.value) == f"{small_disk}/run.h5: cannot be written: No space left on device"
    assert read(small_disk / "run.h5", "train", "loss")[0].tolist() == [0]
    assert [path.name for path in small_disk.iterdir()] == ["run.h5"]


def test_file_size_limit_at_the_end_is_one_line(comm, tmp_path, file_size_limit):
    with pytest.raises(CheckpointError, match=r"run\.h5: cannot be written: File too large") as error:  # noqa: SIM117
        with file_size_limit(1 << 16), open_records(comm, tmp_path) as records:
            records.append(0, "train", "load", np.ones(1 << 16))
    assert "\n" not in str(error.value)


def test_what_ended_the_run_outweighs_a_full_disk(comm, tmp_path, file_size_limit):
    with pytest.raises(ZeroDivisionError), file_size_limit(1 << 16), open_records(comm, tmp_path) as records:
        records.append(0, "train", "load", np.ones(1 << 16))
        _ = 1 / 0


@pytest.mark.mpi
def test_only_rank_0_writes(comm, shared):
    with open_records(comm, shared) as records:
        assert isinstance(records, Records if comm.rank == 0 else NullRecords)
        records.append(0, "train", "rank", comm.rank)
        records.describe("cluster", "rank", comm.rank)
        records.flush_if_due()
        records.flush()
    steps, ranks = read(shared / "run.h5", "train", "rank")
    assert steps.tolist() == [0] and ranks.tolist() == [0]
    comm.Barrier()


@pytest.mark.mpi
def test_all_ranks_learn_that_the_record_cannot_be_written(comm, shared, file_size_limit):
    with pytest.raises(CheckpointError) as error, file_size_limit(1 << 16), open_records(comm, shared) as records:
        records.append(0, "train", "load", np.ones(1 << 16))
    assert error.value.shared and "File too large" in str(error.value)


@pytest.mark.mpi
def test_one_rank_that_fails_alone_does_not_wait_for_the_others(comm, shared):
    def fail_alone():
        with open_records(comm.Split(0 if comm.rank == 0 else 1), shared / str(comm.rank != 0)) as records:
            records.append(0, "train", "loss", 0.0)
            raise ZeroDivisionError

    if comm.rank == 0:
        for name in ("True", "False"):
            (shared / name).mkdir()
    comm.Barrier()
    with pytest.raises(ZeroDivisionError):
        fail_alone()
