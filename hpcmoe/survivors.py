"""Going on in the same job after ranks have died: where MPI survives it (ULFM), those left make a smaller world.

Open MPI does under `mpirun --with-ft ulfm`; MPICH's launcher ends the ranks that are left. A death shows as an error of
a call that needs the dead rank, or at a pause of any wait. Whoever sees it revokes the communicators, which ends the
calls of those who do not, and all meet in Shrink (MPI Forum, User-Level Failure Mitigation).
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, cast

import numpy as np
from mpi4py import MPI

from hpcmoe.environment import read_setting
from hpcmoe.messages import format_ranges
from hpcmoe.wait import call_at_pauses

_IS_ON = "OMPI_MCA_mpi_ft_enable"  # what --with-ft ulfm tells each rank
_CHECK_SECONDS = 0.05  # between two looks for deaths
_KNOWN_SECONDS = 2.0  # until a death that has broken a call is known as one


class Survivors(NamedTuple):
    """The ranks that work, and whom they have lost last."""

    comm: MPI.Intracomm
    who_died: str  # in words; empty at the start


class RankDied(Exception):
    """A rank of the run has died, and the others may go on."""


def survives_deaths() -> bool:
    """Return True if MPI lets the other ranks go on when one dies."""
    return read_setting(_IS_ON).lower() in ("1", "true")


def list_dead(comm: MPI.Intracomm) -> list[int]:
    """List the ranks of comm that this rank knows to be dead. Not collective; lets MPI hear of them and of Revoke."""
    with contextlib.suppress(MPI.Exception):  # which it raises once one of them is
        comm.Iprobe()
    dead, group = comm.Get_failed(), comm.Get_group()
    ranks = MPI.Group.Translate_ranks(dead, None, group)
    dead.Free()
    group.Free()
    return sorted(ranks)


@contextlib.contextmanager
def notice_deaths(comm: MPI.Intracomm) -> Iterator[None]:
    """Raise RankDied at a pause of this thread's waits in the block once a rank of comm is dead, if MPI survives it."""
    if not survives_deaths():
        yield
        return
    next_check = 0.0

    def check(_: float) -> None:
        nonlocal next_check
        now = time.monotonic()
        if now < next_check:
            return
        next_check = now + _CHECK_SECONDS
        if list_dead(comm) or comm.Is_revoked():
            raise RankDied

    with call_at_pauses(check):
        yield


@contextlib.contextmanager
def revoked_after_deaths(*comms: MPI.Comm) -> Iterator[None]:
    """Open a block whose communicators are revoked when an exception ends it, where MPI survives deaths.

    So no rank waits in them for ever.
    """
    try:
        yield
    except BaseException:
        if survives_deaths():
            for comm in comms:
                comm.Revoke()
        raise


def join_survivors(comm: MPI.Intracomm, error: BaseException) -> Survivors | None:
    """Make a communicator of the ranks left after a death -> Survivors, None where nobody has died.

    Collective over the ranks left, each of which comes with the error that ended its work: one that all ranks share,
    or an interrupt, is no death's.
    """
    if not survives_deaths() or isinstance(error, KeyboardInterrupt) or getattr(error, "shared", False):
        return None
    deadline = time.monotonic() + _KNOWN_SECONDS
    while not (list_dead(comm) or comm.Is_revoked()):
        if time.monotonic() > deadline:
            return None
        time.sleep(_CHECK_SECONDS)

    # Shrink again where another one dies meanwhile.
    while True:
        comm.Revoke()
        left = cast(MPI.Intracomm, comm.Shrink())
        try:
            present = find_present(left, comm)
            break
        except MPI.Exception:
            left.Revoke()

    # Name who is missing.
    gone = np.flatnonzero(~present).tolist()
    who = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {format_ranges(gone)} are"
    return Survivors(left, f"{who} gone, of {comm.size}")


def find_present(left: MPI.Intracomm, comm: MPI.Intracomm) -> np.ndarray:
    """Return which ranks of comm are in left -> [ranks of comm] bool. Collective over left."""
    present = np.zeros(comm.size, np.uint8)
    present[comm.rank] = 1
    left.Allreduce(MPI.IN_PLACE, present, MPI.MAX)
    return present > 0


def leave_without_dead(status: int) -> NoReturn:
    """End this process, which has lost others, with a status: MPI's own end would wait for them."""
    os._exit(status)
