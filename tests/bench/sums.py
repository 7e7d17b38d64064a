"""A training step of four data-parallel ranks on shaped hosts: gradients summed during the backward pass, or after it.

One rank a host, two racks. The same step by turns in the same processes, with buckets and with none.
"""

from bench.hosts import run_on_hosts
from bench.pairs import show_milliseconds, show_ratio
from tabulate import tabulate

BUDGET_SECONDS = 90.0
BESIDE, AFTER = "beside the backward pass", "after it"


def measure(folder, budget_seconds=BUDGET_SECONDS):
    """Run both over the shaped hosts -> figures. Skips, with the reason, where they cannot be made."""
    return run_on_hosts("sums_run", folder, 1, budget_seconds, send_buffer="64k")


def make_table(figures):
    """Lay the figures out -> text."""
    seconds = figures["median_seconds"]
    rows = [(show_milliseconds(seconds[BESIDE]), show_milliseconds(seconds[AFTER]), show_ratio(figures),
             f"{figures['gradient_bytes'] / 1e6:.1f}", len(figures["ratios"]))]  # fmt: skip
    headers = (f"step, sums {BESIDE}, ms", f"{AFTER}, ms", "ratio (quartiles)", "MB of gradients", "pairs")
    return tabulate(rows, headers=headers, disable_numparse=True)
