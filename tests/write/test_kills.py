"""kill -9 at any moment of a checkpoint: the newest whole one loads, to the last number, and none is torn."""

import os
import random
import signal
import sys
import time

import pytest
from launch import HANG_SECONDS, MPIRUN, ROOT, Running, run
from mpi4py import MPI

from hpcmoe.write.boxes import PieceSpec
from hpcmoe.write.checkpoint import find_checkpoint
from hpcmoe.write.pieces import read_pieces
from hpcmoe.write.steps import list_checkpoints

SAVER = ROOT / "tests" / "write" / "saver.py"
SOURCE = {"PYTHONPATH": str(ROOT)}
FULL = pytest.mark.full
NUMBERS = 200_000  # as saver.py has them


def check_what_is_left(folder, num_ranks):
    """Each checkpoint has its checksums and its step's number all over -> (newest step, was one under way?)."""
    part = PieceSpec(name="w", shape=(num_ranks, NUMBERS), start=(0, 0), extent=(num_ranks, NUMBERS))
    found = list_checkpoints(folder)
    assert found, "there is none"
    for step, path in found.items():
        assert find_checkpoint(MPI.COMM_SELF, path) == path
        arrays, metadata = read_pieces(MPI.COMM_SELF, path, [part])
        assert metadata == {"step": step} and (arrays["w", (0, 0)] == step).all()
    assert find_checkpoint(MPI.COMM_SELF, folder) == found[max(found)]
    return max(found), any(folder.glob("checkpoint-*.partial"))


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=FULL)])
def test_kills_at_random_moments(tmp_path, kills):
    ended = run(sys.executable, SAVER, tmp_path, kills, 7, **SOURCE)
    assert ended.status == 0, ended
    left = [check_what_is_left(tmp_path / str(number), 1) for number in range(kills)]
    assert any(under_way for _, under_way in left), left


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=FULL) for number in (1, 2, 3))])
def test_a_rank_is_killed_while_all_write(tmp_path, number):
    moments = random.Random(number)
    running = Running(MPIRUN, "-n", 3, sys.executable, SAVER, tmp_path, **SOURCE)
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not (tmp_path / "checkpoint-1").exists():
            assert time.monotonic() < deadline, "has not begun"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        victims = [p for p in running.processes() if "PMI_RANK" in p.environ() or "OMPI_COMM_WORLD_RANK" in p.environ()]
        os.kill(moments.choice(victims).pid, signal.SIGKILL)
        assert running.wait().status != 0
    finally:
        running.kill()
    check_what_is_left(tmp_path, 3)
