"""Segments of shared memory that dead ranks have left in the way of MPI's start, removed or named.

A program calls clear_segments() before it imports mpi4py, which starts MPI. Segments are named mpich_shm_WORLD_NODE
(MPICH 5, src/mpid/ch4/shm/posix/posix_init.c), WORLD being a hash of the launcher's name of the job. Slurm's PMI-2
names it JOB.STEP, and again so when the job is requeued; Hydra draws a name; a process alone uses its own number.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from hpcmoe.output import exit_with_line

SHM_FOLDER = Path("/dev/shm")
PROCESSES = Path("/proc")
LOCK_SECONDS = 5.0  # how long another process may remove segments
_FNV_BASIS, _FNV_PRIME = 2166136261, 16777619  # FNV-1a of 32 bits


def clear_segments() -> None:
    """Remove this user's abandoned segments; exit with one line where another user's has the name that MPI needs."""
    remove_abandoned_segments()
    foreign = find_foreign_segment()
    if foreign is not None:
        exit_blocked(foreign)


def remove_abandoned_segments(
    folder: Path = SHM_FOLDER, processes: Path = PROCESSES, before: float | None = None
) -> list[str]:
    """Remove this user's segments of MPICH that no process holds any more -> their names.

    Only those from before a time, by default this process's start: what processes in other containers, which cannot be
    seen, make at this moment is kept.

    One process of the node does so at a time: none may remove, by an old listing, what another has created since. The
    first listing needs no lock, so that ranks that find nothing to remove do not wait for each other.
    """
    if not find_abandoned(folder, processes, before):
        return []
    with try_lock(folder) as is_locked:
        abandoned = find_abandoned(folder, processes, before) if is_locked else []
        for segment in abandoned:
            with contextlib.suppress(OSError):
                segment.unlink()
    return [segment.name for segment in abandoned]


def list_segments(folder: Path) -> dict[Path, os.stat_result]:
    """List the segments of MPICH that are this user's."""
    segments = {}
    for path in folder.glob("mpich_*"):
        with contextlib.suppress(OSError):
            segments[path] = path.lstat()
    return {path: status for path, status in segments.items() if status.st_uid == os.geteuid()}


@contextlib.contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for the block -> True, or False where the lock was not free within LOCK_SECONDS."""
    descriptor, deadline, is_locked = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_SECONDS, False
    try:
        while not is_locked and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield is_locked
    finally:
        os.close(descriptor)


def find_abandoned(folder: Path, processes: Path, before: float | None) -> list[Path]:
    """List the segments from before a time, or this process's start, that no process has open or mapped.

    Who creates one has it open until it is mapped: descriptors are listed before maps, so that none is missed.
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


def read_age(processes: Path) -> float:
    """Read for how many seconds this process has run, 0 where the system does not tell."""
    try:
        fields = (processes / "self" / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def find_open(process: Path) -> Iterator[int]:
    """Yield the inodes that a process has open."""
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield descriptor.stat().st_ino


def find_mapped(process: Path) -> Iterator[int]:
    """Yield the inodes of the segments of MPICH that a process has mapped."""
    with (process / "maps").open(errors="replace") as lines:
        for line in lines:
            if "/mpich_" in line:
                yield int(line.split()[4])


def find_foreign_segment(folder: Path = SHM_FOLDER, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Find another user's segment that has the name this process's MPI needs -> its path, or None."""
    world = compute_world_number(environ, os.getpid())
    for path in [] if world is None else folder.glob(f"mpich_shm_{world:x}_*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.geteuid():
                return path
    return None


def compute_world_number(environ: Mapping[str, str], process: int) -> int | None:
    """Compute MPICH's number of this process's world: its job's, its own if alone, None if Hydra drew it."""
    job = environ.get("PMI_JOBID", "")
    if not job:
        return None if "PMI_RANK" in environ or "PMIX_RANK" in environ else process
    number = _FNV_BASIS
    for byte in job.encode():
        number = (number ^ byte) * _FNV_PRIME % 2**32
    return number


def exit_blocked(path: Path) -> NoReturn:
    """Exit, and name on the node's first process the segment in the way and what to do."""
    job = os.environ.get("PMI_JOBID")
    again = f"submit the job anew, which gives it another name than {job}" if job else "start again"
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    try:
        owner = str(path.lstat().st_uid)
    except OSError:
        owner = "unknown"
    line = (
        f"{node}: {path} of user {owner}, left by an MPI program that was killed, has the name that "
        f"MPI needs: have its owner or root remove it, or {again}"
    )
    exit_with_line(line, is_first=os.environ.get("SLURM_LOCALID", "0") == "0")
