"""How a rank fails: together with the others when all can know why, alone and loudly when only it knows."""

import os
import signal
import sys
import time
import traceback

from hpcmoe.interrupts import Interrupted, ignore_signals
from hpcmoe.output import EXIT_USER, HAND_ON_SECONDS, say
from hpcmoe.wait import barrier, broadcast, gather_to_all

EXIT_BUG = 1  # anything else, shown with its traceback
FAREWELL_SECONDS = 5.0  # how long a failing rank waits for the others before it aborts them
HEED_SECONDS = 3.0  # how long an interrupted rank waits for rank 0 to speak for all


class HpcmoeError(Exception):
    """A fault that the user or the machine can mend; its text is one line a fault, with the arithmetic."""

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
    result, fault = attempt(fn) if comm.rank == 0 else (None, None)
    result, fault = broadcast(comm, (result, fault))
    return raise_or_return(result, fault)


def keep_on_root(comm, fn):
    """Run fn on rank 0 -> its result there and None elsewhere, or its HpcmoeError on all. Collective over comm."""
    result, fault = attempt(fn) if comm.rank == 0 else (None, None)
    return raise_or_return(result, broadcast(comm, fault))


def on_all(comm, fn):
    """Run fn on every rank -> its result here; the lowest failing rank's HpcmoeError on all. Collective over comm."""
    result, fault = attempt(fn)
    faults = [(rank, other) for rank, other in enumerate(gather_to_all(comm, fault)) if other is not None]
    if faults:
        rank, fault = faults[0]
        fault = type(fault)(f"[rank {rank} of {comm.size}] {fault}")
    return raise_or_return(result, fault)


def attempt(fn):
    """Call fn -> (result, None) or (None, the HpcmoeError it raised); other exceptions pass."""
    try:
        return fn(), None
    except HpcmoeError as fault:
        return None, fault


def raise_or_return(result, fault):
    """Raise the fault that all ranks share, or return the result."""
    if fault is not None:
        fault.shared = True
        raise fault
    return result


def exit_with(comm, fault, host):
    """End this process because of fault: all together where every rank knows it, else by aborting the others."""
    if isinstance(fault, HpcmoeError) and fault.shared:
        if comm.rank == 0:
            say(f"hpcmoe: {line}" for line in str(fault).splitlines())
        if barrier(comm, FAREWELL_SECONDS):  # mpirun kills the job at the first exit: let rank 0's line out first
            sys.exit(EXIT_USER)
        abort(comm, EXIT_USER)

    # Ctrl-C reaches all ranks, and one line is enough; a signal may reach this one alone.
    ignore_signals()
    if isinstance(fault, KeyboardInterrupt):
        ending = fault if isinstance(fault, Interrupted) else Interrupted(signal.SIGINT)
        if comm.rank > 0:
            time.sleep(HEED_SECONDS)
        whose = f"[rank {comm.rank} of {comm.size}, {host}]" if comm.rank > 0 else "hpcmoe:"
        say([f"{whose} {ending}"])
        abort(comm, ending.status)

    # Only this rank knows: say who it is on each line, then take the others down.
    expected = isinstance(fault, HpcmoeError)
    lines = str(fault).splitlines() if expected else traceback_lines(fault)
    say(f"[rank {comm.rank} of {comm.size}, {host}] {line}" for line in lines)
    abort(comm, EXIT_USER if expected else EXIT_BUG)


def abort(comm, status):
    """Take all ranks down, once what was said has had time to come out."""
    time.sleep(HAND_ON_SECONDS)
    comm.Abort(status)
    os._exit(status)  # MPICH 5 comes back from it, and is ended by its launcher a moment later


def traceback_lines(fault):
    """Format an exception -> its traceback, line by line."""
    return "".join(traceback.format_exception(fault)).splitlines()
