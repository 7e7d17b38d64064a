"""Clusters on this one machine for as long as a test needs them: a Slurm, and shaped hosts in two racks."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

import pytest
from launch import HANG_SECONDS, MPIRUN

from hpcmoe.segments import remove_abandoned_segments

LAB = pathlib.Path(__file__).parent
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where daemons lie; an ordinary PATH may lack it


def require(*commands):
    """Skip without root or one of the commands, or what else the lab needs."""
    missing = [command for command in commands if not shutil.which(command, path=SYSTEM_PATH)]
    reason = "needs root" if os.geteuid() else f"not installed: {', '.join(missing)}" if missing else ""
    if "HYDRA" not in subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout:
        reason = "only MPICH takes its nodes from the launcher, and not from the one machine's name"
    if reason:
        skip(reason)


def skip(reason):
    """Skip a test for what a user's machine may lack; under HPCMOE_REQUIRE_LAB=1 fail instead."""
    if os.environ.get("HPCMOE_REQUIRE_LAB") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def script(name, *arguments, **variables):
    """Run one of the lab's scripts, silent unless it fails."""
    command = [LAB / name, *map(str, arguments)]
    environment = {**os.environ, "PATH": SYSTEM_PATH, **variables}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"


@contextlib.contextmanager
def slurm():
    """Start a Slurm of four nodes in two racks -> path of its slurm.conf. Waits for another that is there."""
    require("slurmctld", "slurmd", "munged", "sbatch")
    with alone("slurm"):  # every Slurm numbers its jobs from 1, by which MPICH names its segments
        remove_abandoned_segments(before=time.time())
        folder = tempfile.mkdtemp(prefix="hpcmoe-slurm-")
        try:
            script("slurm.sh", "up", folder, free_ports(5))
            yield f"{folder}/slurm.conf"
        finally:
            script("slurm.sh", "down", folder)
            shutil.rmtree(folder)


@contextlib.contextmanager
def alone(what):
    """Be the only process of this machine inside, for as long as it lasts."""
    with open(pathlib.Path(tempfile.gettempdir(), f"hpcmoe-{what}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_ports(count):
    """Find a run of free TCP ports -> its first, below those that the system itself hands out."""
    for first in range(16000 + os.getpid() % 1000, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise AssertionError(f"no {count} free ports in a row")


@contextlib.contextmanager
def racks(**shape):
    """Make four hosts in two racks, 2 Gbit/s to each and 200 Mbit/s between the racks -> the hosts' names.

    shape gives other values to the variables of racks.sh.
    """
    require("ip", "tc", "unshare")
    name = f"r{os.getpid()}n"
    try:
        script("racks.sh", "up", name, **shape)
        yield [f"{name}{number}" for number in range(4)]
    finally:
        script("racks.sh", "down", name)
