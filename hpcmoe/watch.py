"""Each node's watch over its ranks: started with them, dismissed when they end in order."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

from mpi4py import MPI

from hpcmoe.wait import broadcast, gather_to_all

WATCHER = pathlib.Path(__file__).with_name("watcher.py")


class Watch:
    """The process that watches this node's ranks."""

    def __init__(self, pid):
        self.pid = pid

    def dismiss(self):
        """End it, if it is still there, before this rank ends. Not collective: any rank of the node may."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def start_watch(comm, host):
    """Start a watcher on each node -> Watch, without effect where the system cannot watch. Collective over comm."""
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
