"""How a rank fails: together with the others when all can know why, alone and loudly when only it knows."""

import os
import signal
import sys
import time
import traceback

from hpcmoe.interrupts import Interrupted, ignore_signals
from hpcmoe.output import DRAIN_SECONDS, EXIT_USER, print_to_stderr
from hpcmoe.wait import barrier, broadcast, gather_to_all

EXIT_BUG = 1  # anything else, shown with its traceback
EXIT_BARRIER_SECONDS = 5.0  # how long a failing rank waits for the others before it aborts them
WAIT_FOR_ROOT_SECONDS = 3.0  # how long an interrupted rank waits for rank 0 to speak for all


class HpcmoeError(Exception):
    """An error that the user or the machine can mend; its text is one line per error, with the arithmetic."""

    shared = False  # True once every rank holds the same error


class ConfigError(HpcmoeError):
    """A key, value or file of the input is wrong."""


class ClusterError(HpcmoeError):
    """The ranks, nodes, links or launcher are not what the run needs."""


class PlacementError(HpcmoeError):
    """The experts do not fit on the ranks."""


class TrainingError(HpcmoeError):
    """Training has left the numbers: a loss or a gradient is not finite."""


class CheckpointError(HpcmoeError):
    """Something could not be written, or what was read back is not whole."""


def on_root(comm, fn):
    """Run fn on rank 0 and give every rank its result, or raise its HpcmoeError. Collective over comm."""
    result, error = attempt(fn) if comm.rank == 0 else (None, None)
    result, error = broadcast(comm, (result, error))
    return raise_or_return(result, error)


def keep_on_root(comm, fn):
    """Run fn on rank 0 -> its result there and None elsewhere, or its HpcmoeError on all. Collective over comm."""
    result, error = attempt(fn) if comm.rank == 0 else (None, None)
    return raise_or_return(result, broadcast(comm, error))


def on_all(comm, fn):
    """Run fn on every rank -> its result here; the lowest failing rank's HpcmoeError on all. Collective over comm."""
    result, error = attempt(fn)
    errors = [(rank, other) for rank, other in enumerate(gather_to_all(comm, error)) if other is not None]
    if errors:
        rank, error = errors[0]
        error = type(error)(f"[rank {rank} of {comm.size}] {error}")
    return raise_or_return(result, error)


def attempt(fn):
    """Call fn -> (result, None) or (None, the HpcmoeError it raised); other exceptions pass."""
    try:
        return fn(), None
    except HpcmoeError as error:
        return None, error


def raise_or_return(result, error):
    """Raise the error that all ranks share, or return the result."""
    if error is not None:
        error.shared = True
        raise error
    return result


def exit_with(comm, error, host):
    """End this process because of error: all together where every rank knows it, else by aborting the others."""
    if isinstance(error, HpcmoeError) and error.shared:
        if comm.rank == 0:
            print_to_stderr(f"hpcmoe: {line}" for line in str(error).splitlines())
        if barrier(comm, EXIT_BARRIER_SECONDS):  # mpirun kills the job at the first exit: let rank 0's line out first
            sys.exit(EXIT_USER)
        abort_ranks(comm, EXIT_USER)

    # Ctrl-C reaches all ranks, and one line is enough; a signal may reach this one alone.
    ignore_signals()
    if isinstance(error, KeyboardInterrupt):
        ending = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        if comm.rank > 0:
            time.sleep(WAIT_FOR_ROOT_SECONDS)
        whose = f"[rank {comm.rank} of {comm.size}, {host}]" if comm.rank > 0 else "hpcmoe:"
        print_to_stderr([f"{whose} {ending}"])
        abort_ranks(comm, ending.status)

    # Only this rank knows: say who it is on each line, then take the others down.
    expected = isinstance(error, HpcmoeError)
    lines = str(error).splitlines() if expected else format_traceback(error)
    print_to_stderr(f"[rank {comm.rank} of {comm.size}, {host}] {line}" for line in lines)
    abort_ranks(comm, EXIT_USER if expected else EXIT_BUG)


def abort_ranks(comm, status):
    """Take all ranks down, once what was said has had time to come out."""
    time.sleep(DRAIN_SECONDS)
    comm.Abort(status)
    os._exit(status)  # MPICH 5 comes back from it, and is ended by its launcher a moment later


def format_traceback(error):
    """Format an exception -> its traceback, line by line."""
    return "".join(traceback.format_exception(error)).splitlines()
