"""A placement that moves: the hot experts of two racks change places in mid-run, on four shaped hosts.

Four ranks with four experts each, else as in the placement bench. For one interval tokens prefer experts as the
placement knew it; then the hottest experts of either rack are wanted by the other. One run may move its experts at the
end of each interval, the other may not; their steps take turns in one process group (bench/moving_run.py). A step that
begins with a search and a move counts them.
"""

import statistics

from bench.hosts import run_on_hosts
from tabulate import tabulate

RANKS_A_HOST = 1
SLOW = {"INTRA": "400mbit", "INTER": "40mbit"}  # a fifth of the placement bench's: links, not cores, tell the time


def measure(folder, every=4, sequences=64):
    """Run three intervals of so many steps -> figures. Skips, with the reason, where hosts cannot be made."""
    return summarize(run_on_hosts("moving_run", folder, RANKS_A_HOST, every, sequences, **SLOW))


def summarize(figures):
    """Add medians of each interval, and how much of the balanced step time is restored -> figures.

    Balanced is the first interval but its first step, which warms up; restored the third but the step that moves.
    """
    every = figures["every"]
    medians = {}
    for name in ("moves", "stays"):
        seconds = figures[name]["seconds"]
        parts = seconds[1:every], seconds[every : 2 * every], seconds[2 * every + 1 :]
        medians[name] = dict(zip(("balanced", "shifted", "after"), map(statistics.median, parts), strict=True))
    losses = zip(figures["moves"]["losses"], figures["stays"]["losses"], strict=True)
    return figures | {
        "median_seconds": medians,
        "restored": medians["moves"]["balanced"] / medians["moves"]["after"],
        "kept_without": medians["stays"]["balanced"] / medians["stays"]["after"],
        "moving_step_seconds": figures["moves"]["seconds"][2 * every],
        "largest_difference_of_losses": max(abs(one - other) for one, other in losses),
    }


def make_table(figures):
    """Lay the figures out -> text."""
    rows = [
        (name, *(f"{seconds:.3f}" for seconds in figures["median_seconds"][name].values()), f"{100 * share:.0f} %")
        for name, share in (("moves", figures["restored"]), ("stays", figures["kept_without"]))
    ]
    headers = ("median step, s", "balanced", "shifted", "next interval", "of the balanced pace")
    told = {name: value for name, (_, value) in figures["told"].items()}
    lines = [
        f"moved: {told['moved']} copies, {told['moved_bytes'] / 1e6:.2f} MB; {told['move_seconds']:.2f} s beside the "
        f"step's work, predicted {told['move_seconds_predicted']:.2f} s alone; the step that began with search and "
        f"move took {figures['moving_step_seconds']:.2f} s",
        f"losses of the two runs differ by {figures['largest_difference_of_losses']:.1e} at most",
    ]
    return "\n".join([tabulate(rows, headers=headers, disable_numparse=True), "", *lines])
