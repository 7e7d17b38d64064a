"""How a rank fails: together with the others where all can know why, alone and loudly where only it knows."""

import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hpcmoe.interrupts import Interrupted, ignore_signals
from hpcmoe.output import DRAIN_SECONDS, EXIT_USER, print_to_stderr
from hpcmoe.wait import barrier, broadcast, gather_to_all
from hpcmoe.watch import find_watch

if TYPE_CHECKING:
    from mpi4py import MPI

_EXIT_BUG = 1  # the status of any other error, shown with its traceback
EXIT_BARRIER_SECONDS = 5.0  # how long a failing rank waits for the others before it aborts them
WAIT_FOR_ROOT_SECONDS = 3.0  # how long an interrupted rank waits for rank 0 to speak for all

Result = TypeVar("Result")
AnyError = TypeVar("AnyError", bound="HpcmoeError")


class HpcmoeError(Exception):
    """An error that the user can correct; its text is one line per error, with the arithmetic."""

    shared = False  # True once every rank holds the same error


class ConfigError(HpcmoeError):
    """A wrong key, value or file of the input."""


class ClusterError(HpcmoeError):
    """Ranks, nodes, links or a launcher that are not what the run needs."""


class PlacementError(HpcmoeError):
    """Experts that do not fit on the ranks."""


class TrainingError(HpcmoeError):
    """A loss or a gradient that is not finite."""


class CheckpointError(HpcmoeError):
    """Something that could not be written, or was read back incomplete."""


class PeerError(HpcmoeError):
    """What made another rank of the group leave: this one can no longer meet it."""


def on_root(comm: "MPI.Comm", fn: Callable[[], Result]) -> Result:
    """Run fn on rank 0 -> its result, or its HpcmoeError, on every rank. Collective over comm."""
    result, error = attempt(fn) if comm.rank == 0 else (None, None)
    return raise_or_return(*broadcast(comm, (result, error)))


def keep_on_root(comm: "MPI.Comm", fn: Callable[[], Result]) -> Result | None:
    """Run fn on rank 0 -> its result there and None elsewhere, or its HpcmoeError on all. Collective over comm."""
    result, error = attempt(fn) if comm.rank == 0 else (None, None)
    return raise_or_return(result, broadcast(comm, error))


def on_all(comm: "MPI.Comm", fn: Callable[[], Result]) -> Result:
    """Run fn on every rank -> its result here; the lowest failing rank's HpcmoeError on all. Collective over comm."""
    result, error = attempt(fn)
    errors = [(rank, other) for rank, other in enumerate(gather_to_all(comm, error)) if other is not None]
    if errors:
        rank, error = errors[0]
        error = type(error)(f"[rank {rank} of {comm.size}] {error}")
    return raise_or_return(result, error)


def agree_on(comm: "MPI.Comm", where: str, fn: Callable[[], Result]) -> Result:
    """Run fn on every rank -> its result, a dataclass that must be the same on all ranks. Collective over comm.

    Raises the lowest failing rank's HpcmoeError on all, or a ConfigError that begins with `where` where fields differ.
    """
    own, error = attempt(fn)
    of_root = broadcast(comm, own)

    def compare() -> Result:
        made = raise_or_return(own, error)
        for field in dataclasses.fields(made) if of_root is not None else ():
            here, there = getattr(made, field.name), getattr(of_root, field.name)
            if here != there:
                raise ConfigError(f"{where}: {field.name} = {here!r}, {there!r} on rank 0: must be alike on all ranks")
        return made

    return on_all(comm, compare)


def attempt(fn: Callable[[], Result]) -> tuple[Any, HpcmoeError | None]:
    """Call fn -> (result, None) or (None, the HpcmoeError it raised); other exceptions pass."""
    try:
        return fn(), None
    except HpcmoeError as error:
        return None, error


def raise_or_return(result: Result, error: HpcmoeError | None) -> Result:
    """Raise the error that all ranks share, or return the result."""
    if error is not None:
        raise share(error)
    return result


def share(error: AnyError) -> AnyError:
    """Mark an error as one that every rank holds, and return it."""
    error.shared = True
    return error


def exit_with(comm: "MPI.Comm", error: BaseException, host: str) -> NoReturn:
    """End this process because of an error: all ranks together where each has it, else by aborting the others."""
    find_watch().end(error)

    # End together where every rank has the error.
    if isinstance(error, HpcmoeError) and error.shared:
        if comm.rank == 0:
            print_to_stderr(f"hpcmoe: {line}" for line in str(error).splitlines())
        if barrier(comm, EXIT_BARRIER_SECONDS):  # mpirun kills the job at the first exit: let rank 0's line out first
            sys.exit(EXIT_USER)
        abort_ranks(comm, EXIT_USER)

    # Print one line after Ctrl-C, which reaches all ranks; a signal may reach this one alone.
    ignore_signals()
    own = f"[rank {comm.rank} of {comm.size}, {host}]"
    if isinstance(error, KeyboardInterrupt):
        ending = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        if comm.rank > 0:
            time.sleep(WAIT_FOR_ROOT_SECONDS)
        print_to_stderr([f"{own if comm.rank > 0 else 'hpcmoe:'} {ending}"])
        abort_ranks(comm, ending.status)

    # Print what only this rank knows, with its name on each line, then abort the others.
    expected = isinstance(error, HpcmoeError)
    text = str(error) if expected else "".join(traceback.format_exception(error))
    print_to_stderr(f"{own} {line}" for line in text.splitlines())
    abort_ranks(comm, EXIT_USER if expected else _EXIT_BUG)


def abort_ranks(comm: "MPI.Comm", status: int) -> NoReturn:
    """Abort all ranks, once what was printed has had time to come out."""
    time.sleep(DRAIN_SECONDS)
    comm.Abort(status)
    os._exit(status)  # MPICH 5 comes back from it, and is ended by its launcher a moment later
