"""kill -9 at any moment of a checkpoint: the newest whole one loads, to the last number, and none is torn."""

import os
import random
import signal
import sys
import time

import pytest
from launch import MPIRUN, ROOT, Running, run
from mpi4py import MPI

from hpcmoe.write.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from hpcmoe.write.pieces import Part

SAVER = ROOT / "tests" / "write" / "saver.py"
SOURCE = {"PYTHONPATH": str(ROOT)}
KILLS, KILLS_OF_RANKS = 50, 4
NUMBERS = 200_000  # as saver.py has them


def check_what_is_left(folder, num_ranks):
    """Each checkpoint has its checksums and its step's number all over -> (newest step, was one under way?)."""
    part = Part(name="w", shape=(num_ranks, NUMBERS), start=(0, 0), extent=(num_ranks, NUMBERS))
    found = list_checkpoints(folder)
    assert found, "there is none"
    for step, path in found.items():
        assert find_checkpoint(MPI.COMM_SELF, path) == path
        arrays, facts = load_checkpoint(MPI.COMM_SELF, path, [part])
        assert facts == {"step": step} and (arrays["w", (0, 0)] == step).all()
    assert find_checkpoint(MPI.COMM_SELF, folder) == found[max(found)]
    return max(found), any(folder.glob("checkpoint-*.partial"))


def test_fifty_kills_at_random_moments(tmp_path):
    ended = run(sys.executable, SAVER, tmp_path, KILLS, 7, timeout_seconds=240, **SOURCE)
    assert ended.status == 0, ended
    left = [check_what_is_left(tmp_path / str(number), 1) for number in range(KILLS)]
    assert len({newest for newest, _ in left}) > 3, left  # the moments are spread over checkpoints
    assert sum(under_way for _, under_way in left) > KILLS // 3, left


@pytest.mark.parametrize("number", range(KILLS_OF_RANKS))
def test_a_rank_is_killed_while_all_write(tmp_path, number):
    moments = random.Random(number)
    running = Running(MPIRUN, "-n", 3, sys.executable, SAVER, tmp_path, **SOURCE)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint-1").exists():
            assert time.monotonic() < deadline, "has not begun"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        victims = [p for p in running.processes() if "PMI_RANK" in p.environ() or "OMPI_COMM_WORLD_RANK" in p.environ()]
        os.kill(moments.choice(victims).pid, signal.SIGKILL)
        assert running.wait(30).status != 0
    finally:
        running.kill()
    check_what_is_left(tmp_path, 3)
