"""Segments of shared memory that dead ranks have left in the way of MPI's start, swept or named.

A program calls clear_segments() before it imports mpi4py, which starts MPI. Segments are named mpich_shm_WORLD_NODE
(MPICH 5, src/mpid/ch4/shm/posix/posix_init.c), WORLD being a hash of the launcher's name of the job. Slurm's PMI-2
names it JOB.STEP, and again so when the job is requeued; Hydra draws a name; a process alone takes its own number.
"""

import contextlib
import fcntl
import os
import pathlib
import sys
import time

from hpcmoe.output import DRAIN_SECONDS, EXIT_USER, print_to_stderr

SHM_FOLDER = pathlib.Path("/dev/shm")
PROCESSES = pathlib.Path("/proc")
PATTERN = "mpich_*"
FNV_BASIS, FNV_PRIME = 2166136261, 16777619  # FNV-1a of 32 bits
LOCK_SECONDS = 5.0  # how long another process may sweep


def clear_segments() -> None:
    """Sweep what is this user's; leave with one line where what is another's has the name that MPI will want."""
    remove_abandoned_segments()
    blocked = find_foreign_segment()
    if blocked is not None:
        exit_blocked(blocked)


def remove_abandoned_segments(folder=SHM_FOLDER, processes=PROCESSES, before=None):
    """Remove this user's segments of MPICH that no process holds any more -> their names.

    Only those from before a time, by default this process's start: what processes in other containers, which cannot be
    seen, make at this moment is spared.

    One process of the node at a time: none may remove, by what it saw before, what another has made anew since. A first
    look is free to all, so that ranks that find nothing to remove do not wait for each other.
    """
    if not find_abandoned(folder, processes, before):
        return []
    with locked(folder) as is_mine:
        abandoned = find_abandoned(folder, processes, before) if is_mine else []
        for segment in abandoned:
            with contextlib.suppress(OSError):
                segment.unlink()
    return [segment.name for segment in abandoned]


def list_segments(folder):
    """List the segments of MPICH that are this user's -> dict path: os.stat_result."""
    segments = {}
    for path in folder.glob(PATTERN):
        with contextlib.suppress(OSError):
            segments[path] = path.lstat()
    return {path: status for path, status in segments.items() if status.st_uid == os.geteuid()}


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a folder -> True, or False where it was not to be had in time."""
    descriptor, deadline, is_mine = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_SECONDS, False
    try:
        while not is_mine and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_mine = True
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield is_mine
    finally:
        os.close(descriptor)


def find_abandoned(folder, processes, before):
    """List the segments from before a time, or this process's start, that no process has open or mapped.

    Whoever makes one has it open until it is mapped: descriptors are looked at before maps, so that none is missed.
    """
    until = time.time() - read_age(processes) if before is None else before
    left = {status.st_ino: path for path, status in list_segments(folder).items() if status.st_mtime < until}
    for process in processes.glob("[0-9]*"):
        if not left:
            break
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.geteuid():
                for inode in (*find_open(process), *find_mapped(process)):
                    left.pop(inode, None)
    return list(left.values())


def read_age(processes):
    """Read for how many seconds this process has run, 0 where the system does not tell."""
    try:
        fields = (processes / "self" / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def find_open(process):
    """Yield the inodes that a process has open."""
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield descriptor.stat().st_ino


def find_mapped(process):
    """Yield the inodes of the segments of MPICH that a process has mapped."""
    with (process / "maps").open(errors="replace") as lines:
        for line in lines:
            if "/mpich_" in line:
                yield int(line.split()[4])


def find_foreign_segment(folder=SHM_FOLDER, environ=os.environ, process=None):
    """Find another user's segment that has the name this process's MPI will want -> its path, or None."""
    world = compute_world_number(environ, os.getpid() if process is None else process)
    for path in [] if world is None else folder.glob(f"mpich_shm_{world:x}_*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.geteuid():
                return path
    return None


def compute_world_number(environ, process):
    """Compute the number by which MPICH calls this process's world: its job's, its own if alone, None if drawn."""
    job = environ.get("PMI_JOBID", "")
    if not job:
        return None if "PMI_RANK" in environ or "PMIX_RANK" in environ else process
    number = FNV_BASIS
    for byte in job.encode():
        number = (number ^ byte) * FNV_PRIME % 2**32
    return number


def exit_blocked(path):
    """Say on the node's first process what is in the way and what to do, and leave."""
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        time.sleep(DRAIN_SECONDS)
        sys.exit(EXIT_USER)
    job = os.environ.get("PMI_JOBID")
    again = f"submit the job anew, which gives it another name than {job}" if job else "start again"
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    line = (
        f"hpcmoe: {node}: {path} of user {read_owner(path)}, left by an MPI program that was killed, has the name that "
        f"MPI needs: have its owner or root remove it, or {again}"
    )
    print_to_stderr([line])
    sys.exit(EXIT_USER)


def read_owner(path):
    """Read whose a file is, as a number."""
    try:
        return path.lstat().st_uid
    except OSError:
        return "unknown"
