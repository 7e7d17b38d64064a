"""What of the transfers is hidden behind the experts' work, on four shaped hosts in two racks, by schedule.

One rank a host, experts so wide that their work takes about as long as the transfers. The same micro-batches pass
whole; with experts that do nothing, which leaves the transfers; and as the experts' products alone, on as many rows.
What is hidden of the shorter of the two is 1 - (whole - longer) / shorter.
Then sixteen ranks, a token's four copies going to each node once, or once to each rank.
"""

import statistics

from bench.hosts import run_on_hosts
from tabulate import tabulate

LANES = ("serial", "overlap 4", "arrival 4", "arrival 8")
WAYS = ("on", "off")
PARTS = ("whole", "transfers", "work")


def measure(folder, rounds=3):
    """Run both over the shaped hosts -> figures. Skips, with the reason, where they cannot be made."""
    return {
        "schedules": run_on_hosts("overlap_run", folder, 1, "schedules", rounds, send_buffer="64k"),
        "once": run_on_hosts("overlap_run", folder, 4, "once", rounds),
    }


def hidden_share(whole, transfers, work):
    """How much of the shorter part is hidden behind the longer: 1 all of it, 0 nothing."""
    return 1 - (whole - max(transfers, work)) / min(transfers, work)


def make_table(figures):
    """Lay the figures out -> text."""
    rows = []
    for name, seconds in figures["schedules"].items():
        shares = [
            hidden_share(*parts) for parts in zip(seconds["whole"], seconds["transfers"], seconds["work"], strict=True)
        ]
        times = [f"{statistics.median(seconds[part]):.3f}" for part in ("whole", "transfers", "work")]
        rows.append((name, *times, f"{statistics.median(shares):.2f} ({min(shares):.2f} - {max(shares):.2f})"))
    once, width = figures["once"], figures["schedules"][LANES[0]]["feed_forward"]
    ratios = [on / off for on, off in zip(once["on"]["whole"], once["off"]["whole"], strict=True)]
    medians = {name: statistics.median(once[name]["whole"]) for name in WAYS}
    headers = ("schedule, in flight", "whole, s", "transfers, s", "work, s", "hidden of the shorter")
    return (
        f"{tabulate(rows, headers=headers, disable_numparse=True)}\n\n"
        f"experts are {width} wide\n"
        f"once per node: {medians['on']:.3f} s, {once['on']['rows_between_nodes']} rows between nodes; not so: "
        f"{medians['off']:.3f} s, {once['off']['rows_between_nodes']} rows; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} - {max(ratios):.3f})"
    )
