"""The watch over a node's ranks: a process that starts with them, and is stopped when they end in order."""

import atexit
import contextlib
import functools
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from hpcmoe.pulse import open_pulse
from hpcmoe.wait import broadcast, gather_to_all

if TYPE_CHECKING:
    from mpi4py import MPI

_ANSWER_SECONDS = 0.3  # more than the watcher waits for the dying
WATCHER = pathlib.Path(__file__).with_name("watcher.py")


class Watch:
    """The process that watches this node's ranks."""

    def __init__(self) -> None:
        self.is_on = False  # from its start to its stop, the same on all ranks
        self.pid: int | None = None  # None: nobody watches
        self.launcher: int | None = None  # what has started this rank, if anything

    def end(self, error: BaseException) -> None:
        """Stop it before an error ends this rank: one that all share in order, another may come of a death."""
        if getattr(error, "shared", False) or isinstance(error, KeyboardInterrupt):
            self.stop()
        else:
            self.report()

    def stop(self) -> None:
        """Stop it without a word, before the ranks end in order. Not collective: any rank of the node may."""
        self.send(signal.SIGTERM)
        self.pid, self.is_on = None, False

    def report(self) -> None:
        """Stop it, and have it name a rank that is dead or dying: this rank's error may come of that."""
        if self.pid is not None:
            self.send(signal.SIGUSR1)
            time.sleep(_ANSWER_SECONDS)
        self.pid, self.is_on = None, False

    def send(self, number: int) -> None:
        """Send the watcher a signal, if it is still there."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@functools.cache
def find_watch() -> Watch:
    """Return the watch over this process, one of nobody until it is started."""
    return Watch()


def start_watch(comm: "MPI.Comm", host: str, launcher: int | None = None) -> Watch:
    """Start a watcher on each node, unless one watches; none where the system cannot watch. Collective over comm.

    launcher: the process that has started this rank, whose end is to be that of the node's ranks; None: as before.
    """
    watch = find_watch()
    watch.launcher = launcher or watch.launcher
    if watch.is_on:
        return watch
    from mpi4py import MPI  # here, so that commands without ranks start without MPI

    # The first rank opens what tells of the others' ends, so that none is missed while the watcher starts.
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    ranks, pid = gather_to_all(node, (comm.rank, os.getpid(), open_pulse().file)), None
    if node.rank == 0 and hasattr(os, "pidfd_open"):  # Linux 5.3
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            files = Files(opened)
            words = [files.open_launcher(watch.launcher), *(files.open_rank(*rank) for rank in ranks)]
            pid = files.start_watcher(host, comm.size, words).pid
    watch.pid, watch.is_on = broadcast(node, pid), True
    node.Free()
    atexit.register(watch.stop)
    return watch


class Files:
    """Files that the watcher is to have, opened by the rank that starts it."""

    def __init__(self, opened: contextlib.ExitStack) -> None:
        """opened: at its end they are closed here."""
        self.opened, self.numbers = opened, list[int]()
        self.deaths = opened.enter_context(select.epoll())
        self.numbers.append(self.deaths.fileno())

    def start_watcher(self, host: str, size: int, words: list[str], **options: Any) -> subprocess.Popen:
        """Start the watcher of a node's ranks, words as it takes them, with options of Popen -> its process."""
        command = [sys.executable, "-S", str(WATCHER), host, str(size), str(self.deaths.fileno()), *words]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=self.numbers, **options
        )

    def open_launcher(self, pid: int | None) -> str:
        """Open the process that has started this rank -> PID:PIDFD, "" where there is none."""
        file = -1 if pid is None else self.open_process(pid)
        return f"{pid}:{file}" if file >= 0 else ""

    def open_rank(self, rank: int, pid: int, page: int | None) -> str:
        """Open the process of a rank and its page -> RANK:PID:PIDFD:PAGE."""
        file = self.open_process(pid)
        return f"{rank}:{pid}:{file}:{self.open_page(pid, page)}"

    def open_process(self, pid: int) -> int:
        """Open what tells of a process's end -> its number, -1 where there is no such process any more."""
        try:
            file = self.add(os.pidfd_open(pid))
        except ProcessLookupError:
            return -1
        self.deaths.register(file, select.EPOLLIN)  # from now on the order of the ends is kept
        return file

    def open_page(self, pid: int, page: int | None) -> int:
        """Open the page of a process's pulse -> its number, -1 where it cannot be read."""
        try:
            return -1 if page is None else self.add(os.open(f"/proc/{pid}/fd/{page}", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            return -1

    def add(self, file: int) -> int:
        """Add a file, and return its number."""
        self.opened.callback(os.close, file)
        self.numbers.append(file)
        return file
