"""The benches: `make bench`, or `make bench ARGS="placement"`; each is a file of this folder and of BENCHES.

A bench has measure(folder) -> a dict that JSON can hold, and make_table(figures) -> text. What it measured goes to
out/bench/NAME.json; what is worth keeping, to RESULTS.md.
"""

import json
import pathlib
import sys

import pytest
from bench import balance, cost, exchange, gpu, layer, machine, moving, overlap, peers, placement, sums

BENCHES = {
    "layer": layer,
    "exchange": exchange,
    "cost": cost,
    "peers": peers,
    "placement": placement,
    "moving": moving,
    "overlap": overlap,
    "balance": balance,
    "sums": sums,
    "gpu": gpu,
}
FOLDER = pathlib.Path("out/bench")


def main(names):
    """Run the benches of these names, or all -> exit status: 2 for a name that is none."""
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"bench: no bench called {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    for name in names or BENCHES:
        print(f"{name}: {BENCHES[name].__doc__.splitlines()[0]}", flush=True)
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            figures = {"machine": machine.describe(), **BENCHES[name].measure(folder)}
        except pytest.skip.Exception as skipped:
            print(f"{name}: skipped: {skipped.msg}\n", flush=True)
            continue
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"\n{BENCHES[name].make_table(figures)}\n\nwritten: {path}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
