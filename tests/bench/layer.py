"""One MoE layer, forward and training, against its floor: the same GEMMs and the same bytes, and nothing else.

The floor (bench/floor.py) takes turns with the layer in the same processes, under the counts that the layer's own
router gives the same tokens. It carries its bytes by MPI's own wait or by the polite one, whichever is faster.
"""

import statistics

import torch
from bench import ranks
from bench.floor import Floor, count_rows
from bench.ours import open_layer
from bench.pairs import compare, show_milliseconds, show_ratio, take_turns
from bench.shapes import DECODE, DTYPES, MANY, MIDDLE, NARROW, WIDE, read_shapes
from tabulate import tabulate

BUDGET_SECONDS = 16.0  # a case
SHAPES = [
    shape.but(dtype=dtype, training=training)
    for shape in (WIDE, MIDDLE, NARROW, DECODE, MANY)
    for dtype in DTYPES
    for training in (False, True)
    if not (training and shape == DECODE)
]


def measure(folder, shapes=SHAPES, budget_seconds=BUDGET_SECONDS):
    """Run the shapes -> figures."""
    return {"cases": ranks.run_shapes(shapes, "layer", folder, budget_seconds)}


def work(comm, shapes, budget_seconds):
    """Measure the shapes -> {name: comparison}. Collective over comm."""
    torch.manual_seed(comm.rank)
    return {str(shape): measure_shape(comm, shape, float(budget_seconds)) for shape in read_shapes(shapes)}


def measure_shape(comm, shape, budget_seconds):
    """Let a layer and its floor take turns -> comparison. Collective over comm."""
    x, grad = torch.randn(shape.tokens, shape.hidden), torch.randn(shape.tokens, shape.hidden)
    with open_layer(comm, shape) as layer:
        floor = Floor(comm, shape, count_rows(comm, x, layer.router_weight, shape))
        step = floor.train if shape.training else floor.forward
        floors = take_turns(comm, {wait: lambda wait=wait: step(wait == "polite") for wait in ("polite", "MPI")}, 0)
        wait = min(floors, key=lambda wait: statistics.median(floors[wait]))
        calls = {
            "ours": lambda: layer.train(x, grad) if shape.training else layer.forward(x),
            "floor": lambda: step(wait == "polite"),
        }
        return compare(take_turns(comm, calls, budget_seconds), "ours", "floor") | {"wait": wait}


def make_table(figures):
    """Lay the figures out -> text."""
    rows = [
        (
            name,
            show_milliseconds(case["median_seconds"]["ours"]),
            show_milliseconds(case["median_seconds"]["floor"]),
            show_ratio(case),
            len(case["ratios"]),
        )
        for name, case in figures["cases"].items()
    ]
    headers = ("layer", "ours, ms", "floor, ms", "ours / floor (quartiles)", "pairs")
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    ranks.main(work)
