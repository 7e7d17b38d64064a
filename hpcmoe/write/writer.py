"""Checkpoints at once, or by a thread while the steps go on; what is MPI's stays with the main thread."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import time

import numpy as np
from mpi4py import MPI

from hpcmoe.errors import CheckpointError, HpcmoeError, raise_or_return
from hpcmoe.wait import barrier, wait_all
from hpcmoe.write.checkpoint import save_checkpoint, save_in_tasks

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_writer(comm, folder, keep, asynchronous):
    """Open what saves the checkpoints of a run's folder and keeps the last `keep` -> Writer. Collective, both ends.

    The end waits for the checkpoint that is being written, also where an error that all ranks share ends the run.
    """
    barrier(comm)
    own = comm.Dup()
    pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
    writer = Writer(own, folder, keep, pool)
    try:
        yield writer
    except HpcmoeError as error:
        if error.shared:
            try:
                writer.finish()
            except CheckpointError as another:
                raise_or_return(None, type(error)(f"{error}\n{another}"))
        raise
    writer.finish()
    if pool is not None:
        pool.shutdown()
    barrier(own)
    own.Free()


class Writer:
    """Saves checkpoints, one at a time."""

    def __init__(self, comm, folder, keep, pool):
        self.comm, self.folder, self.keep = comm, folder, keep
        self.pool = pool  # a thread; None: checkpoints are written at once
        self.copies = []  # arrays, kept from one checkpoint to the next
        self.turns = None  # of the checkpoint that is being written
        self.work = None  # this rank's part of the turn, a future
        self.question = None  # whether all ranks' threads are done: (request, array)

    @property
    def snapshot_bytes(self):
        """What the copies take, for the thread to write from."""
        return sum(array.nbytes for array in self.copies)

    def save(self, step, pieces, facts):
        """Save as save_checkpoint does; where a thread writes, return once the pieces are copied. Collective over comm.

        A checkpoint that is still being written is waited for. Raises its error, or this one's, on all ranks.
        """
        if self.pool is None:
            save_checkpoint(self.comm, self.folder, step, list(pieces), facts, self.keep)
            return
        started = time.monotonic()
        if self.turns is not None:
            self.finish()
            log.info("step %d: waited %.2f s for the last checkpoint's writing", step, time.monotonic() - started)
        copied = self.copy(pieces)
        self.turns = save_in_tasks(self.comm, self.folder, step, copied, facts, self.keep)
        self.go_on(None)
        log.info("step %d: the checkpoint held the steps up for %.3f s", step, time.monotonic() - started)

    def poll(self):
        """Go on with what the threads of all ranks have done. Collective over comm, once a step.

        Whether all have is asked at one step and answered by the next: nobody waits.
        """
        if self.hear():
            self.go_on(self.work.result)
        if self.turns is not None:
            self.ask()

    def finish(self):
        """Wait until all of the checkpoint under way is on disk. Collective over comm. Raises its CheckpointError."""
        while self.turns is not None:
            self.hear()
            concurrent.futures.wait([self.work])
            self.go_on(self.work.result)

    def copy(self, pieces):
        """Copy pieces, into arrays of the last time wherever one fits -> pieces."""
        spare = collections.defaultdict(list)
        for array in self.copies:
            spare[array.shape, array.dtype].append(array)
        copied, self.copies = [], []
        for piece in pieces:
            fitting = spare[piece.array.shape, piece.array.dtype]
            array = fitting.pop() if fitting else np.empty(piece.array.shape, piece.array.dtype)
            np.copyto(array, piece.array)
            self.copies.append(array)
            copied.append(dataclasses.replace(piece, array=array))
        return copied

    def ask(self):
        """Start to ask whether all ranks' threads are done. Collective over comm."""
        done = np.array([self.work.done()], dtype=np.int32)
        self.question = self.comm.Iallreduce(MPI.IN_PLACE, done, MPI.MIN), done

    def hear(self):
        """Take the answer, alike on all ranks, of what was asked -> whether all are done; False if nothing was."""
        if self.question is None:
            return False
        (request, done), self.question = self.question, None
        wait_all([request])
        return bool(done[0])

    def go_on(self, ended):
        """Tell the turns how their last work ended, and give the thread its next. Collective over comm."""
        turns, self.turns = self.turns, None  # an error leaves nothing to wait for
        with contextlib.suppress(StopIteration):
            self.work = self.pool.submit(turns.send(ended))
            self.turns = turns
