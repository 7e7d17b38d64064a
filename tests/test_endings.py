"""How a run of the whole program ends when it is told to: in a line, by the signal's status, with nothing half done."""

import os
import signal
import socket
import sys
import time

import pytest
from launch import HANG_SECONDS, MPIRUN, Running, mpirun

SETTINGS = {
    "run.steps": "1000000",
    "model.sequence_length": "32",
    "data.batch_sequences": "16",
    "data.validation_sequences": "16",
    "write.checkpoint_every": "1",
    "write.asynchronous": "true",
    "placement.search_seconds": "0.05",
    "placement.seconds_per_token": "1e-6",
    "restart.grace_seconds": "0.001",  # no time for an end in order (test_ending.py)
}


def command(output):
    """Spell the arguments of a run that writes a checkpoint after each step."""
    chosen = {"run.output": str(output), **SETTINGS}
    return ["-m", "hpcmoe.main", "inputs/run.toml", *(w for k, v in chosen.items() for w in ("--set", f"{k}={v}"))]


def end_by(number, output, whom):
    """Start a run, try another of its name, and send whom it may be a signal at a checkpoint -> (how it ended, pid)."""
    running = Running(MPIRUN, "-n", 2, sys.executable, *command(output))
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not list((output / "run").glob("checkpoint-*/master.h5")):
            assert time.monotonic() < deadline and running.process.poll() is None
            time.sleep(0.05)
        second = mpirun(1, *command(output)) if whom == "launcher" else None
        victim = running.process.pid if whom == "launcher" else find_rank(running, "1").pid
        os.kill(victim, number)
        return running.wait(), victim, second
    finally:
        running.kill()


def find_rank(running, rank):
    """Find the process of a rank."""
    keys = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return next(p for p in running.processes() if any(p.environ().get(key) == rank for key in keys))


@pytest.mark.parametrize(
    "number, whom, status, said",
    [
        (signal.SIGINT, "launcher", 130, "hpcmoe: interrupted"),
        (signal.SIGTERM, "rank 1", 143, f"[rank 1 of 2, {socket.gethostname()}] ended by signal 15 (SIGTERM)"),
    ],
)
def test_a_run_that_is_told_to_end_says_so_in_a_line_and_leaves_nothing_half_done(tmp_path, number, whom, status, said):
    ended, _, second = end_by(number, tmp_path, whom)
    assert ended.status == status, ended
    own = [line for line in ended.errors.splitlines() if line.startswith(("hpcmoe:", "[rank"))]
    assert own == [said] and "Traceback" not in ended.errors, ended
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {name for name in left if not name.startswith("checkpoint-")} == {"hpcmoe.json", "run.h5", "topology.json"}
    assert not [name for name in left if name.endswith(".partial")]
    if second is not None:
        assert second.status == 2 and "is in use by process" in second.lines("hpcmoe:")[0], second
