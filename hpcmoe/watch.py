"""The watch over a node's ranks: a process that starts with them, and is stopped when they end in order."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from mpi4py import MPI

from hpcmoe.wait import broadcast, gather_to_all

_ANSWER_SECONDS = 0.3  # more than the watcher waits for the dying
WATCHER = pathlib.Path(__file__).with_name("watcher.py")


class Watch:
    """The process that watches this node's ranks."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid  # None: nobody watches

    def stop(self) -> None:
        """Stop it without a word, before the ranks end in order. Not collective: any rank of the node may."""
        self.send(signal.SIGTERM)

    def report(self) -> None:
        """Stop it, and have it name a rank that is dead or dying: this rank's error may come of that."""
        self.send(signal.SIGUSR1)
        time.sleep(_ANSWER_SECONDS)

    def send(self, number: int) -> None:
        """Send the watcher a signal, if it is still there."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start_watch(comm: MPI.Comm, host: str) -> Watch:
    """Start a watcher on each node, without effect where the system cannot watch. Collective over comm."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    ranks = gather_to_all(node, f"{comm.rank}:{os.getpid()}")
    pid = None
    if node.rank == 0 and hasattr(os, "pidfd_open"):  # Linux 5.3
        command = [sys.executable, "-S", str(WATCHER), host, str(comm.size), *ranks]
        with contextlib.suppress(OSError):
            pid = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True).pid
    watch = Watch(broadcast(node, pid))
    node.Free()
    return watch
