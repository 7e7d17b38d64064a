"""A lock in a run's folder, so that two runs never write into one: who holds it, and when it no longer counts.

It is made by O_EXCL, which network file systems keep too. A holder on this machine is found by its process and that
one's start, which differs where the number is recycled. A holder elsewhere keeps a heartbeat: it renews the lock's time
of change, in the file server's clock. Without one for STALE_SECONDS the lock is removed.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pwd
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcmoe.environment import SUPERVISOR, find_job, read_setting
from hpcmoe.errors import ConfigError
from hpcmoe.reading import read_json

LOCK = "run.lock"
HEARTBEAT_SECONDS = 20.0  # between two
STALE_SECONDS = 180.0  # without one
READ_SECONDS = 1.0  # until a lock just made has its text
_MOST_BYTES = 2**16  # of a lock
_CLEAR_SECONDS = 0.05  # for another process to remove a stale lock
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A lock's holder."""

    token: str  # of this holder alone
    host: str
    machine: str  # the running kernel and its process namespace: in the same one, processes can be found
    process: int
    started: int  # when that process began, in ticks of that kernel
    user: str
    job: str  # Slurm's; empty elsewhere
    restarts: str  # of the job, which keeps its number when it is requeued
    since: str
    supervisor: str = ""  # the word of what starts the run's ranks anew after a fault

    def __str__(self):
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host} ({self.user}{job}, since {self.since})"


def make_holder() -> Holder:
    """Make a Holder of this process."""
    job, restarts = find_job()
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=name_machine(),
        process=os.getpid(),
        started=read_process_start(os.getpid()),
        user=name_user(),
        job=job,
        restarts=restarts,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        supervisor=read_setting(SUPERVISOR),
    )


def name_machine() -> str:
    """Name the running kernel and this process's process namespace; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def name_user() -> str:
    """Name the user, by number where the system has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def read_process_start(process: int) -> int:
    """Read when a process of this machine began, in ticks -> 0 where it is gone, or a zombie."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])


def acquire_lock(folder: Path, own: Holder) -> None:
    """Acquire the lock of a folder, in place of one that is stale. Not collective: rank 0 alone.

    Raises ConfigError that names the holder, OSError where the lock cannot be written.
    """
    path = folder / LOCK
    while True:
        try:
            return write_lock(path, own)
        except FileExistsError:
            if os.path.lexists(path) and not path.is_file():  # a link to nothing, which never goes away
                raise ConfigError(f"{path} is no file that a run has made: remove it") from None
            clear_stale(path, own)


def write_lock(path: Path, own: Holder) -> None:
    """Create the lock. Raises FileExistsError where there is one."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, json.dumps(dataclasses.asdict(own)).encode())
        os.fsync(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def clear_stale(path: Path, own: Holder) -> None:
    """Remove a stale lock. Raises ConfigError where it is not stale."""
    if explain_stale(path, read_lock(path), own) is None:
        return

    # One process at a time does so, and checks again: what a second one removes may be the first one's new lock.
    clearing = path.with_name(f"{path.name}.clearing")
    try:
        os.close(os.open(clearing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        time.sleep(_CLEAR_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            if measure_heartbeat_age(clearing) > STALE_SECONDS:  # killed midway
                clearing.unlink()
        return

    # Remove it.
    try:
        held = read_lock(path)
        why = explain_stale(path, held, own)
        if why is not None:
            path.unlink()
            log.warning("%s: cleared; it was of %s: %s", path, held or "a run that named nobody", why)
    finally:
        clearing.unlink(missing_ok=True)


def explain_stale(path: Path, held: Holder | None, own: Holder) -> str | None:
    """Return why a lock is stale, None where it is gone meanwhile. Raises ConfigError where it is not stale."""
    try:
        age_seconds, is_empty = measure_heartbeat_age(path), path.stat().st_size == 0
    except FileNotFoundError:
        return None

    # A lock without a holder may be that of a run killed as it made it.
    silent = f"no heartbeat for {age_seconds:.0f} s" if age_seconds > STALE_SECONDS else ""
    cure = f"wait for it or take another [run] name; if it is gone, remove {path}"
    if held is None:
        if is_empty and silent:
            return silent
        raise ConfigError(f"{path.parent} is in use by another run, which its lock does not name: {cure}")

    # Find the holder's process on this machine; elsewhere only its job and its heartbeat are known.
    if held.machine and held.machine == own.machine:
        if read_process_start(held.process) != held.started:
            return "that process is gone"
    elif held.job and held.job == own.job and held.restarts != own.restarts:
        return "the job was requeued"
    elif held.supervisor and held.supervisor == own.supervisor:
        return "its ranks were started anew"
    elif silent:
        return silent
    else:
        cure += f" (cleared by itself {STALE_SECONDS:.0f} s after its last heartbeat, {age_seconds:.0f} s ago)"
    raise ConfigError(f"{path.parent} is in use by {held}: {cure}")


def measure_heartbeat_age(path: Path) -> float:
    """Measure the time since a lock's last heartbeat, by the file server's clock."""
    with path.open("rb") as lock, tempfile.NamedTemporaryFile(dir=path.parent) as now:  # opening asks the server anew
        return os.fstat(now.fileno()).st_mtime - os.fstat(lock.fileno()).st_mtime


def read_lock(path: Path) -> Holder | None:
    """Read a lock -> its holder, or None where it names none within READ_SECONDS."""
    deadline = time.monotonic() + READ_SECONDS
    while True:
        with contextlib.suppress(OSError, ConfigError, ValueError, TypeError):
            if not path.is_file():  # a FIFO would be waited for
                return None
            return Holder(**read_json(path, _MOST_BYTES))
        if time.monotonic() > deadline:
            return None
        time.sleep(READ_SECONDS / 20)


def holds_lock(folder: Path, own: Holder) -> bool:
    """Return True if the lock of a folder is still this holder's."""
    return read_lock(folder / LOCK) == own


def release_lock(folder: Path, own: Holder) -> None:
    """Remove the lock of a folder if it is this holder's. Not collective: any rank of the run may."""
    with contextlib.suppress(OSError):
        if holds_lock(folder, own):
            (folder / LOCK).unlink()


@contextlib.contextmanager
def heartbeat(folder: Path, own: Holder) -> Iterator[None]:
    """Renew the lock in a thread within the block; end this process should another have taken the lock."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            held = read_lock(folder / LOCK)
            if held is not None and held != own:
                log.error("%s: taken by %s while this run stood still; it ends", folder / LOCK, held)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(READ_SECONDS)
                os.kill(os.getpid(), signal.SIGINT)  # the second ends it at once: no checkpoint into another's folder
                return
            with contextlib.suppress(OSError):
                os.utime(folder / LOCK)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(READ_SECONDS)
