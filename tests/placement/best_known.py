"""The least that is known of every case that is kept: its best value and its highest bound, in best_known.json.

To search every case again, so many seconds a layer and objective, and keep what is better, in the repository's root:

    PYTHONPATH=tests python -m placement.best_known SECONDS [SEED]
"""

import itertools
import json
import pathlib
import sys

from placement.families import FAMILIES, SIZES, make_family
from tqdm import tqdm

from hpcmoe.placement.solve import make_placement

FILE = pathlib.Path(__file__).with_suffix(".json")
SEEDS = (0, 1)
DOWNWARDS = ("step", "ports", "links")  # each counts what the next one does, and more


def name_case(name, size, seed, objective):
    """Name a case in the file."""
    return f"{name} | {size} | seed {seed} | {objective}"


def read_best_known():
    """Read the file -> dict case: {"best_seconds", "bound_seconds"}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write_best_known(known):
    """Write the file, a case a line."""
    lines = [f"{json.dumps(case)}: {json.dumps(figures)}" for case, figures in sorted(known.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def keep(known, case, placement):
    """Update a case's value from a placement if it is below what is known, its bound if it is above; in place."""
    before = known.get(case, {"best_seconds": float("inf"), "bound_seconds": 0.0})
    best = min(before["best_seconds"], placement.objective_seconds)
    known[case] = {
        "best_seconds": best,
        "bound_seconds": min(max(before["bound_seconds"], placement.lower_bound_seconds), best),
    }


def renew(seconds, search_seed):
    """Search every case anew, each objective on from the layout of the one before, and write what is better."""
    for name, size, seed in tqdm(list(itertools.product(FAMILIES, SIZES, SEEDS))):
        known, start = read_best_known(), None
        for objective in DOWNWARDS:
            problem = make_family(name, size, seed, objective)
            time = seconds * problem.num_layers
            placement = make_placement(problem, seconds=time, seed=search_seed, start=start)
            keep(known, name_case(name, size, seed, objective), placement)
            start = placement.expert_of_replica
        write_best_known(known)


if __name__ == "__main__":
    renew(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
