"""Checkpoints at once, or by a thread while the steps go on; MPI stays with the main thread."""

import collections
import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmoe.errors import CheckpointError, HpcmoeError, raise_or_return
from hpcmoe.wait import barrier, wait_all
from hpcmoe.write.boxes import HeldPiece, Piece
from hpcmoe.write.checkpoint import save_checkpoint
from hpcmoe.write.hdf5 import Values
from hpcmoe.write.pieces import WriteTasks, run_tasks

Store = Callable[[MPI.Comm, Path, int, Sequence[HeldPiece], Values, int], WriteTasks]  # as save_checkpoint
log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_writer(
    comm: MPI.Comm, folder: Path, keep: int, asynchronous: bool, store: Store = save_checkpoint
) -> Iterator["Writer"]:
    """Open what saves the checkpoints of a run's folder and keeps the last `keep` -> Writer. Collective, both ends.

    The end waits for the checkpoint under way, also where an error that all ranks share ends the run.
    """
    # Duplicate the communicator, so that messages do not mix with those of the steps.
    barrier(comm)
    own = comm.Dup()
    writer = Writer(own, folder, keep, asynchronous, store)
    try:
        yield writer
    except HpcmoeError as error:
        if error.shared:
            try:
                writer.finish()
            except CheckpointError as another:
                raise_or_return(None, type(error)(f"{error}\n{another}"))
        raise

    # Wait for the checkpoint under way, then free the communicator.
    writer.finish()
    writer.pool.shutdown()
    barrier(own)
    own.Free()


class Writer:
    """What saves checkpoints, one at a time."""

    def __init__(self, comm: MPI.Comm, folder: Path, keep: int, asynchronous: bool, store: Store = save_checkpoint):
        self.comm, self.folder, self.keep, self.asynchronous, self.store = comm, folder, keep, asynchronous, store
        self.level = logging.INFO if store is save_checkpoint else logging.DEBUG  # of what the log tells
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")  # whose thread starts with the first task
        self.snapshots: list[np.ndarray] = []  # kept from one checkpoint to the next
        self.under_way: tuple[WriteTasks, concurrent.futures.Future[Any]] | None = None  # the checkpoint and its task
        self.vote: tuple[MPI.Request, np.ndarray] | None = None  # on whether all ranks' tasks are done

    @property
    def snapshot_bytes(self) -> int:
        """Return the size of the snapshots that the thread writes from."""
        return sum(array.nbytes for array in self.snapshots)

    def save(self, step: int, pieces: Iterable[HeldPiece], metadata: Values) -> None:
        """Save as save_checkpoint does; where a thread writes, return after a snapshot. Collective over comm.

        Wait first for the checkpoint under way. Raises its error, or this one's, on all ranks.
        """
        if not self.asynchronous:
            run_tasks(self.store(self.comm, self.folder, step, list(pieces), metadata, self.keep))
            return
        started = time.monotonic()
        if self.under_way is not None:
            self.finish()
            log.log(
                self.level, "step %d: waited %.2f s for the last checkpoint's writing", step, time.monotonic() - started
            )
        snapshot = self.take_snapshot(pieces)
        self.advance(self.store(self.comm, self.folder, step, snapshot, metadata, self.keep))
        log.log(self.level, "step %d: the checkpoint held the steps up for %.3f s", step, time.monotonic() - started)

    def poll(self) -> None:
        """Start the next task once the threads of all ranks are done. Collective over comm, once a step.

        The vote that one step starts is over by the next: nobody waits.
        """
        if self.under_way is not None and self.finish_vote():
            self.advance(*self.under_way)
        if self.under_way is not None:
            done = np.array([self.under_way[1].done()], dtype=np.int32)
            self.vote = self.comm.Iallreduce(MPI.IN_PLACE, done, MPI.MIN), done

    def finish(self) -> None:
        """Wait until the checkpoint under way is on disk. Collective over comm. Raises its CheckpointError."""
        while self.under_way is not None:
            self.finish_vote()
            concurrent.futures.wait([self.under_way[1]])
            self.advance(*self.under_way)

    def take_snapshot(self, pieces: Iterable[HeldPiece]) -> list[Piece]:
        """Copy pieces, into arrays of the last snapshot wherever one fits."""
        spare = collections.defaultdict(list)
        for array in self.snapshots:
            spare[array.shape, array.dtype].append(array)
        copied, self.snapshots = [], []
        for piece in pieces:
            spec, held = piece.spec, piece.array
            fitting = spare[held.shape, held.dtype]
            array = fitting.pop() if fitting else np.empty(held.shape, held.dtype)
            np.copyto(array, held)
            self.snapshots.append(array)
            copied.append(Piece(name=spec.name, shape=spec.shape, start=spec.start, array=array))
        return copied

    def finish_vote(self) -> bool:
        """Wait for the vote under way -> whether all ranks' tasks are done; False without a vote."""
        if self.vote is None:
            return False
        (request, done), self.vote = self.vote, None
        wait_all([request])
        return bool(done[0])

    def advance(self, tasks: WriteTasks, running: concurrent.futures.Future[Any] | None = None) -> None:
        """Send the tasks the last one's result, and start the next in the thread. Collective over comm."""
        self.under_way = None  # an error leaves nothing to wait for
        with contextlib.suppress(StopIteration):
            self.under_way = tasks, self.pool.submit(tasks.send(running and running.result))
