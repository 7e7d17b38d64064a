"""A job that Slurm starts again under its number runs on the nodes where its ranks were killed."""

import signal
import sys
import time

import pytest
from lab.machines import slurm
from launch import HANG_SECONDS, ROOT, run

from hpcmoe.segments import SHARED_MEMORY, name_world

RANKS = 4
START = "; ".join(
    [
        "import sys, time",
        "from hpcmoe.segments import clear_way",
        "clear_way()",
        "from mpi4py import MPI",
        "print(MPI.COMM_WORLD.size, flush=True)",
        "time.sleep(int(sys.argv[1]))",
    ]
)
JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --requeue --open-mode=append
export PYTHONPATH={root}
srun --kill-on-bad-exit=1 {python} -c "{start}" $([ "$SLURM_RESTART_COUNT" ] && echo 0 || echo 600) || true
"""


@pytest.mark.slurm
def test_a_job_whose_ranks_were_killed_may_be_requeued(tmp_path):
    log, script = tmp_path / "log", tmp_path / "job.sh"
    script.write_text(JOB.format(root=ROOT, python=sys.executable, start=START))
    with slurm() as slurm_conf:
        number = run("sbatch", "--parsable", f"--output={log}", script, SLURM_CONF=slurm_conf).output.strip()
        left = f"mpich_shm_{name_world({'PMI_JOBID': f'{number}.0'}, 0):x}_*"

        def control(*words):
            return run("scontrol", *words, SLURM_CONF=slurm_conf).output

        # Kill the ranks of the first start, and see what they leave.
        wait_for(lambda: count_started(log) == RANKS)
        run("scancel", f"--signal={signal.SIGKILL.value}", f"{number}.0", SLURM_CONF=slurm_conf)
        wait_for(lambda: "JobState=COMPLETED" in control("show", "job", number))
        assert len(list(SHARED_MEMORY.glob(left))) == 2, "a segment of each node"

        # Slurm lets a requeued job wait for two minutes unless it is told otherwise.
        control("requeue", number)
        wait_for(lambda: (control("update", f"jobid={number}", "starttime=now"), count_started(log) > RANKS)[1])
        wait_for(lambda: "JobState=COMPLETED" in control("show", "job", number))
        assert count_started(log) == 2 * RANKS, log.read_text()
        assert list(SHARED_MEMORY.glob(left)) == []


def count_started(log):
    """Count the ranks that have told how many they are."""
    return log.read_text().splitlines().count(str(RANKS)) if log.exists() else 0


def wait_for(condition):
    """Wait until a condition holds."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
