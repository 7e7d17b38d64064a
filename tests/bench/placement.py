"""A step under the engine's placement against one under the contiguous placement, on four shaped hosts in two racks.

Sixteen ranks, whose tokens prefer experts by rack: most ask for one half of the experts in one rack, for the other
half in the other, and the contiguous placement, which knows nothing of it, has both halves in both racks. Steps of
the two placements take turns in one process group (bench/placement_run.py). Beside them stands the time of the
exchanges alone, as the placement predicts it from the measured topology and as it is.
"""

import statistics

from bench.hosts import run_on_hosts
from tabulate import tabulate

RANKS_A_HOST = 4


def measure(folder, pairs=7, sequences=256, ranks_a_host=RANKS_A_HOST):
    """Run the pairs of steps over the shaped hosts -> figures. Skips, with the reason, where they cannot be made."""
    return summarize(run_on_hosts("placement_run", folder, ranks_a_host, pairs, sequences))


def summarize(figures):
    """Add what the times say: medians, the ratio of each pair, and how far the prediction is off -> figures."""
    steps, exchanges, predicted = (figures[f"{name}_seconds"] for name in ("step", "exchange", "predicted"))
    ratios = [ours / theirs for ours, theirs in zip(steps["packed"], steps["contiguous"], strict=True)]
    measured = {method: statistics.median(seconds) for method, seconds in exchanges.items()}
    return figures | {
        "median_step_seconds": {method: statistics.median(seconds) for method, seconds in steps.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "median_exchange_seconds": measured,
        "prediction_error": {method: predicted[method] / measured[method] - 1 for method in measured},
    }


def make_table(figures):
    """Lay the figures out -> text."""
    low, high = figures["ratio_range"]
    rows = [
        (
            method,
            f"{figures['median_step_seconds'][method]:.3f}",
            f"{figures['predicted_seconds'][method]:.3f}",
            f"{figures['median_exchange_seconds'][method]:.3f}",
            f"{100 * figures['prediction_error'][method]:+.1f} %",
            f"{100 * figures['cross_rack_share'][method]:.0f} %",
        )
        for method in ("packed", "contiguous")
    ]
    headers = ("placement", "step, s", "exchange predicted, s", "measured, s", "error", "tokens between racks")
    pairs = len(figures["step_seconds"]["packed"])
    verdict = f"step, packed / contiguous: {figures['ratio']:.3f}, median of {pairs} pairs ({low:.3f} - {high:.3f})"
    return f"{tabulate(rows, headers=headers, disable_numparse=True)}\n\n{verdict}"
