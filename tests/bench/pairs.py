"""Calls that take turns: what else the machine does falls on all of them alike, so the ratios of neighbours tell."""

import statistics
import time

import numpy as np

from hpcmoe.wait import broadcast, gather_to_all

AT_EASE_SECONDS = 2e-3  # between two looks whether others are done: those who wait must not slow those who work


def take_turns(comm, calls, budget_seconds, before=lambda: None, least=3, most=200):
    """Call each in turn, forth and back, for about so long -> {name: seconds of each}, the same on all ranks.

    calls: {name: a call without arguments, or None on ranks that have no part in it}. A call lasts from its first
    rank's start to its last rank's end, by the clock that the ranks of a machine share; before() comes ahead of each,
    and is not timed. The first round warms up and does not count. Collective over comm.
    """
    stamps = {name: [] for name in calls}
    rounds, deadline = 0, None
    while broadcast(comm, rounds <= least or (rounds <= most and time.perf_counter() < deadline)):
        for name in list(calls)[:: -1 if rounds % 2 else 1]:
            before()
            align(comm)
            stamps[name].append(clock(calls[name]))
        align(comm)  # here, and not in the broadcast, the others wait for the last call
        rounds += 1
        deadline = deadline or time.perf_counter() + budget_seconds
    return {name: spans(gather_to_all(comm, taken[1:])) for name, taken in stamps.items()}


def align(comm):
    """Let all ranks start together: at ease while one is at work, tight at the end. Collective over comm."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(AT_EASE_SECONDS)
    comm.Barrier()


def clock(call):
    """Call -> (begin, end) in seconds; not a number where there is nothing to call."""
    if call is None:
        return np.nan, np.nan
    begin = time.perf_counter()
    call()
    return begin, time.perf_counter()


def spans(stamps):
    """Find how long each call took over all ranks: stamps [ranks, calls, 2] -> list of seconds."""
    begin, end = np.moveaxis(np.array(stamps), 2, 0)
    return (np.nanmax(end, axis=0) - np.nanmin(begin, axis=0)).tolist()


def compare(seconds, name, other):
    """Compare two calls that took turns -> dict: the median of both, and name / other of every round, its quartiles."""
    ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True)]
    return {
        "median_seconds": {each: statistics.median(seconds[each]) for each in (name, other)},
        "quartiles": np.quantile(ratios, [0.25, 0.5, 0.75]).tolist(),
        "ratios": ratios,
    }


def show_ratio(comparison):
    """Say a ratio with its spread: the median, then the quartiles."""
    low, middle, high = comparison["quartiles"]
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def show_milliseconds(seconds):
    """Say a time in ms, with the digits that it deserves."""
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"
