"""Checkpoints are whole or absent, the last few stay, and a kill at any moment leaves one to go on from."""

import numpy as np
import pytest
from mpi4py import MPI

from hpcmoe.errors import CheckpointError
from hpcmoe.write.boxes import Piece, PieceSpec
from hpcmoe.write.checkpoint import find_checkpoint, save_checkpoint
from hpcmoe.write.pieces import read_pieces, run_tasks
from hpcmoe.write.steps import newest_checkpoint

# Save step 1 and 2, then be killed at the named point of saving step 3 with one kept.
KILLED = """
import os, pathlib, signal, sys
import numpy as np
from mpi4py import MPI
from hpcmoe.write import boxes, checkpoint, pieces
folder, module, name, when = pathlib.Path(sys.argv[1]), *sys.argv[2:]
module = {"checkpoint": checkpoint, "pieces": pieces, "shutil": pieces.shutil}[module]
def save(step, keep):
    piece = boxes.Piece(name="w", shape=(4,), start=(0,), array=np.full(4, step))
    pieces.run_tasks(checkpoint.save_checkpoint(MPI.COMM_WORLD, folder, step, [piece], {"step": step}, keep))
save(1, 2)
save(2, 2)
inner = getattr(module, name)
def killed(*arguments, **more):
    if when == "after":
        inner(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, name, killed)
save(3, 1)
"""


def save(comm, folder, step, keep=2):
    """Save one array of as many rows as ranks, filled with the step."""
    piece = Piece(name="w", shape=(comm.size, 3), start=(comm.rank, 0), array=np.full((1, 3), step, np.float32))
    run_tasks(save_checkpoint(comm, folder, step, [piece], {"step": step}, keep))


def load(comm, path, num_rows):
    part = PieceSpec(name="w", shape=(num_rows, 3), start=(0, 0), extent=(num_rows, 3))
    arrays, metadata = read_pieces(comm, path, [part])
    assert (arrays["w", (0, 0)] == metadata["step"]).all()
    return metadata["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_two_are_kept_in_numeric_order(comm, tmp_path):
    for step in (8, 9, 10, 100):
        save(comm, tmp_path, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_saving_a_step_again_replaces_it(comm, tmp_path):
    save(comm, tmp_path, 5)
    (tmp_path / "checkpoint-5" / "old").write_text("")
    save(comm, tmp_path, 5)
    assert names(tmp_path / "checkpoint-5") == ["SHA256SUMS", "master.h5", "rank0000.h5"]
    assert load(comm, tmp_path / "checkpoint-5", 1) == 5


def test_after_a_resume_from_an_earlier_step_the_later_ones_go(comm, tmp_path):
    for step in (10, 20, 30):
        save(comm, tmp_path, step, keep=3)
    save(comm, tmp_path, 15, keep=3)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"]


def test_unfinished_checkpoints_are_ignored_then_removed(comm, tmp_path):
    save(comm, tmp_path, 1)
    for name in ("checkpoint-7.partial", "checkpoint-seven", "checkpoint-2.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank0001.h5").write_text("half a file")
    assert find_checkpoint(comm, tmp_path) == tmp_path / "checkpoint-1"
    save(comm, tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-seven"]
    assert names(tmp_path / "checkpoint-2") == ["SHA256SUMS", "master.h5", "rank0000.h5"]


def test_find_takes_a_run_or_a_checkpoint(comm, tmp_path, monkeypatch):
    save(comm, tmp_path, 3)
    save(comm, tmp_path, 4)
    assert find_checkpoint(comm, str(tmp_path)) == tmp_path / "checkpoint-4"
    assert find_checkpoint(comm, tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"
    monkeypatch.chdir(tmp_path / "checkpoint-3")
    assert load(comm, find_checkpoint(comm, "."), 1) == 3


def test_nothing_to_find(comm, tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-7.partial").mkdir()
    for where in (tmp_path, tmp_path / "checkpoint-7.partial"):
        with pytest.raises(CheckpointError, match="no checkpoint to resume"):
            find_checkpoint(comm, where)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(comm, tmp_path / "checkpoint-9")


def test_failed_save_leaves_the_earlier_ones(comm, tmp_path, file_size_limit):
    save(comm, tmp_path, 1)
    save(comm, tmp_path, 2)
    piece = Piece(name="w", shape=(1 << 17,), start=(0,), array=np.ones(1 << 17))
    with pytest.raises(CheckpointError, match=r"checkpoint-3\.partial/rank0000\.h5: cannot be written"):  # noqa: SIM117
        with file_size_limit(1 << 17):
            run_tasks(save_checkpoint(comm, tmp_path, 3, [piece], {}, keep=1))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert load(comm, find_checkpoint(comm, tmp_path), 1) == 2


@pytest.mark.parametrize(
    "module, name, when, newest",
    [
        ("pieces", "make_empty", "after", 2),
        ("pieces", "write_rank_file", "after", 2),
        ("pieces", "write_virtual", "after", 2),
        ("pieces", "publish", "before", 2),
        ("pieces", "publish", "after", 3),
        ("checkpoint", "prune", "before", 3),
        ("shutil", "rmtree", "before", 3),
        ("shutil", "rmtree", "after", 3),
    ],
)
def test_kill_leaves_a_checkpoint_and_the_next_save_cleans_up(tmp_path, run_until_killed, module, name, when, newest):
    run_until_killed(KILLED, tmp_path, module, name, when)
    found = find_checkpoint(MPI.COMM_SELF, tmp_path)
    wanted = [PieceSpec(name="w", shape=(4,), start=(0,), extent=(4,))]
    for step in range(2, newest + 1):
        path = tmp_path / f"checkpoint-{step}"
        if path.exists():
            arrays, metadata = read_pieces(MPI.COMM_SELF, path, wanted)
            assert metadata == {"step": step} and arrays["w", (0,)].tolist() == [step] * 4
    assert found == tmp_path / f"checkpoint-{newest}"

    save(MPI.COMM_SELF, tmp_path, 4, keep=1)
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.mpi
def test_two_kept_and_one_file_a_rank(comm, shared):
    for step in (9, 10, 11):
        save(comm, shared, step)
    found = find_checkpoint(comm, shared)
    assert found == shared / "checkpoint-11" and names(shared) == ["checkpoint-10", "checkpoint-11"]
    assert names(found) == ["SHA256SUMS", "master.h5", *(f"rank{rank:04d}.h5" for rank in range(comm.size))]
    assert load(comm, found, comm.size) == 11


@pytest.mark.mpi
def test_all_ranks_learn_which_file_is_missing(comm, shared):
    save(comm, shared, 1)
    path = shared / "checkpoint-1" / f"rank{comm.size - 1:04d}.h5"
    if comm.rank == 0:
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        load(comm, shared / "checkpoint-1", comm.size)
    assert error.value.shared and str(error.value) == f"{path} is missing"


@pytest.mark.mpi
def test_all_ranks_learn_that_there_is_none(comm, shared):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(comm, shared)
    assert error.value.shared
