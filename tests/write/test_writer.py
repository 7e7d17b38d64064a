"""A thread writes what was, while the steps go on; what fails in it is heard, by all ranks, with its rank and path."""

import os
import subprocess
import threading
import time

import numpy as np
import pytest

from hpcmoe.errors import CheckpointError, TrainingError, raise_or_return
from hpcmoe.write import pieces as pieces_module
from hpcmoe.write.boxes import Piece, PieceSpec
from hpcmoe.write.checkpoint import find_checkpoint
from hpcmoe.write.pieces import read_pieces
from hpcmoe.write.writer import open_writer

DEADLINE_SECONDS = 300.0


def make_pieces(comm, array):
    """This rank's row [1, n] of an array as large as there are ranks."""
    yield Piece(name="w", shape=(comm.size, array.shape[1]), start=(comm.rank, 0), array=array)


def load(comm, path, num_numbers=3):
    part = PieceSpec(name="w", shape=(comm.size, num_numbers), start=(0, 0), extent=(comm.size, num_numbers))
    arrays, metadata = read_pieces(comm, path, [part])
    assert (arrays["w", (0, 0)] == metadata["step"]).all()
    return metadata["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def poll_until(writer, condition):
    """Poll, as after each of many steps, until a condition holds on all ranks -> the number of polls."""
    deadline, polls = time.monotonic() + DEADLINE_SECONDS, 0
    while not condition():
        assert time.monotonic() < deadline
        writer.poll()
        polls += 1
    return polls


class Gate:
    """Holds the writing of ranks' files up until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.inner = threading.Event(), pieces_module.write_rank_file
        self.threads = []
        monkeypatch.setattr(pieces_module, "write_rank_file", self.write)

    def write(self, path, pieces):
        assert self.open.wait(DEADLINE_SECONDS)
        self.threads.append(threading.current_thread())
        return self.inner(path, pieces)


@pytest.mark.mpi
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_what_was(comm, shared, asynchronous):
    array = np.empty((1, 3), np.float32)
    with open_writer(comm, shared, 2, asynchronous) as writer:
        for step in range(1, 6):
            writer.poll()
            array[:] = step
            writer.save(step, make_pieces(comm, array), {"step": step})
            array[:] = -1
        assert writer.snapshot_bytes == (array.nbytes if asynchronous else 0)
    assert names(shared) == ["checkpoint-4", "checkpoint-5"]
    assert [load(comm, shared / name) for name in names(shared)] == [4, 5]
    assert find_checkpoint(comm, shared) == shared / "checkpoint-5"


@pytest.mark.mpi
def test_steps_go_on_while_one_rank_still_writes(comm, shared, monkeypatch):
    gate = Gate(monkeypatch)
    if comm.rank != comm.size - 1:
        gate.open.set()
    with open_writer(comm, shared, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
        for _ in range(50):
            writer.poll()
        assert names(shared) == ["checkpoint-1.partial"] and writer.under_way is not None
        comm.Barrier()
        gate.open.set()
        poll_until(writer, lambda: writer.under_way is None)
        assert names(shared) == ["checkpoint-1"] and load(comm, shared / "checkpoint-1") == 1
        assert gate.threads and threading.main_thread() not in gate.threads


@pytest.mark.mpi
def test_the_next_checkpoint_and_the_end_wait_for_the_one_under_way(comm, shared, monkeypatch):
    gate = Gate(monkeypatch)
    with open_writer(comm, shared, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
        opener = threading.Timer(0.3, gate.open.set)
        opener.start()
        writer.save(2, make_pieces(comm, np.full((1, 3), 2.0)), {"step": 2})
        assert gate.open.is_set() and (shared / "checkpoint-1").exists()
    assert names(shared) == ["checkpoint-1", "checkpoint-2"] and load(comm, shared / "checkpoint-2") == 2


@pytest.mark.mpi
def test_a_file_that_cannot_be_written_ends_all_ranks_with_its_line(comm, shared, file_size_limit, capfd):
    failing = comm.size - 1
    with file_size_limit(1 << 16 if comm.rank == failing else -1), pytest.raises(CheckpointError) as error:  # noqa: SIM117
        with open_writer(comm, shared, 2, True) as writer:
            writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
            writer.save(2, make_pieces(comm, np.full((1, 1 << 15), 2.0)), {"step": 2})
            poll_until(writer, lambda: False)
    path = shared / "checkpoint-2.partial" / f"rank{failing:04d}.h5"
    assert str(error.value) == f"[rank {failing} of {comm.size}] {path}: cannot be written: File too large"
    assert error.value.shared and names(shared) == ["checkpoint-1"] and load(comm, shared / "checkpoint-1") == 1
    assert capfd.readouterr().err == ""  # HDF5 has no more to say, in a thread either


@pytest.mark.mpi
def test_an_error_of_the_last_checkpoint_is_heard_at_the_end(comm, shared, file_size_limit):
    with file_size_limit(1 << 16), pytest.raises(CheckpointError, match=r"rank0000\.h5: cannot be written: File too"):  # noqa: SIM117
        with open_writer(comm, shared, 2, True) as writer:
            writer.save(2, make_pieces(comm, np.full((1, 1 << 15), 2.0)), {"step": 2})
    assert names(shared) == []


@pytest.mark.mpi
def test_an_error_that_all_ranks_share_loses_no_checkpoint(comm, shared, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(TrainingError, match="not finite"), open_writer(comm, shared, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
        writer.poll()
        threading.Timer(0.1, gate.open.set).start()
        raise_or_return(None, TrainingError("not finite"))
    assert names(shared) == ["checkpoint-1"] and load(comm, shared / "checkpoint-1") == 1


@pytest.mark.mpi
def test_an_error_that_all_ranks_share_does_not_hide_the_writers(comm, shared, file_size_limit):
    with file_size_limit(1 << 16), pytest.raises(TrainingError) as error:  # noqa: SIM117
        with open_writer(comm, shared, 2, True) as writer:
            writer.save(2, make_pieces(comm, np.full((1, 1 << 15), 2.0)), {"step": 2})
            raise_or_return(None, TrainingError("not finite"))
    first, second = str(error.value).splitlines()
    assert first == "not finite" and "rank0000.h5: cannot be written: File too large" in second and error.value.shared


def test_a_master_that_cannot_be_written_is_heard_too(comm, tmp_path, file_size_limit):
    with file_size_limit(1 << 17), pytest.raises(CheckpointError) as error:  # noqa: SIM117
        with open_writer(comm, tmp_path, 2, True) as writer:
            writer.save(1, make_pieces(comm, np.ones((1, 3))), {"step": 1, "table": np.ones(1 << 16)})
            poll_until(writer, lambda: False)
    path = tmp_path / "checkpoint-1.partial" / "master.h5"
    assert str(error.value) == f"[rank 0 of {comm.size}] {path}: cannot be written: File too large"
    assert names(tmp_path) == []


def test_a_mistake_in_the_thread_is_not_lost(comm, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "write_rank_file", lambda path, pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError), open_writer(comm, tmp_path, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.ones((1, 3))), {"step": 1})
        poll_until(writer, lambda: False)


def test_copies_are_kept_and_go_to_whatever_fits(comm, tmp_path):
    def save(step, name, width):
        piece = Piece(name=name, shape=(1, width), start=(0, 0), array=np.full((1, width), step, np.float64))
        writer.save(step, [piece], {"step": step})

    with open_writer(comm, tmp_path, 2, True) as writer:
        save(1, "w", 3)
        (first,) = writer.snapshots
        save(2, "an expert that came", 3)
        assert writer.snapshots[0] is first and writer.snapshot_bytes == 3 * 8
        save(3, "w", 4)
        assert writer.snapshots[0] is not first and writer.snapshot_bytes == 4 * 8


def test_full_disk_then_room_again(comm, small_disk):
    with pytest.raises(CheckpointError) as error, open_writer(comm, small_disk, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
        writer.save(2, make_pieces(comm, np.full((1, 1 << 18), 2.0)), {"step": 2})
    path = small_disk / "checkpoint-2.partial" / "rank0000.h5"
    assert str(error.value) == f"[rank 0 of {comm.size}] {path}: cannot be written: No space left on device"
    assert names(small_disk) == ["checkpoint-1"] and find_checkpoint(comm, small_disk).name == "checkpoint-1"


def test_a_folder_that_became_read_only(comm, small_disk):
    with pytest.raises(CheckpointError) as error, open_writer(comm, small_disk, 2, True) as writer:
        writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
        writer.finish()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        writer.save(2, make_pieces(comm, np.full((1, 3), 2.0)), {"step": 2})
    assert str(error.value) == f"{small_disk}/checkpoint-2.partial: cannot be written: Read-only file system"
    assert load(comm, find_checkpoint(comm, small_disk)) == 1


def test_a_folder_taken_away_under_the_thread(comm, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(CheckpointError, match=r"rank0000\.h5: cannot be written: No such file"):  # noqa: SIM117
        with open_writer(comm, tmp_path, 2, True) as writer:
            writer.save(1, make_pieces(comm, np.full((1, 3), 1.0)), {"step": 1})
            os.rename(tmp_path / "checkpoint-1.partial", tmp_path / "elsewhere")
            gate.open.set()
