"""A question that all ranks must answer with yes, put at every step and answered a step later: no step waits for it."""

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.wait import wait_all


class Vote:
    """A question to all ranks of a communicator: whether they have finished. Alone, a rank is answered at once."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.unfinished = np.zeros(1, np.int64)  # ranks, as of the last call
        self.request: MPI.Request | None = None  # of their sum

    def ask(self, is_finished: bool) -> bool:
        """Return True if all ranks had finished at the call before. Collective over comm.

        A rank that once has finished stays so. After True a new vote begins.
        """
        if self.comm.size == 1:
            return is_finished
        if self.close() and self.unfinished[0] == 0:
            return True
        self.unfinished[0] = not is_finished
        self.request = start_all_reduce(self.comm, self.unfinished)
        return False

    def close(self) -> bool:
        """Wait for the answer that is under way, which has come where ranks worked together since, if there is one."""
        if self.request is None:
            return False
        wait_all([self.request])
        self.request = None
        return True
