"""Dispatch and combine inside the program, with experts that do nothing, against MPI's Alltoallv of the same bytes.

Inside the program rows are gathered from the tokens, carried, laid down in the experts' order, and carried home; the
Alltoallv moves what lies there, there and back, by MPI's own wait or by the polite one, whichever is faster.
"""

import statistics

import torch
from bench import ranks
from bench.floor import RawExchange, count_bytes, count_rows
from bench.ours import open_layer
from bench.pairs import compare, show_milliseconds, show_ratio, take_turns
from bench.shapes import Shape, read_shapes
from tabulate import tabulate

BUDGET_SECONDS = 8.0  # a case
ROW_BYTES = 4096  # of 1024 float32
KB = 1024


def make_shape(num_ranks, bytes_of_pair, top_k=2):
    """Find the tokens a rank whose copies come to so many bytes for each of the ranks -> Shape."""
    tokens = bytes_of_pair // ROW_BYTES * num_ranks // top_k
    size = f"{bytes_of_pair // KB} KB" if bytes_of_pair < KB * KB else f"{bytes_of_pair // KB // KB} MB"
    return Shape(name=f"{num_ranks} ranks, {size} a pair", ranks=num_ranks, tokens=tokens, feed_forward=16, top_k=top_k)


SHAPES = [
    *(make_shape(2, size) for size in (64 * KB, KB * KB, 4 * KB * KB, 8 * KB * KB)),
    *(make_shape(16, size) for size in (64 * KB, KB * KB)),
]


def measure(folder, shapes=SHAPES, budget_seconds=BUDGET_SECONDS):
    """Run the sizes -> figures."""
    return {"cases": ranks.run_shapes(shapes, "exchange", folder, budget_seconds)}


def work(comm, shapes, budget_seconds):
    """Measure the shapes -> {name: comparison}. Collective over comm."""
    torch.manual_seed(comm.rank)
    return {shape.name: measure_shape(comm, shape, float(budget_seconds)) for shape in read_shapes(shapes)}


def measure_shape(comm, shape, budget_seconds):
    """Let the program's exchange and MPI's take turns -> comparison. Collective over comm."""
    x = torch.randn(shape.tokens, shape.hidden)
    with open_layer(comm, shape) as layer:
        raw = RawExchange(comm, count_bytes(shape, count_rows(comm, x, layer.router_weight, shape)))

        def there_and_back(polite):
            raw.carry(polite)
            raw.carry(polite, back=True)

        # Route ahead of each exchange of ours, out of the time; MPI's leaves what it finds for the next.
        contexts = []
        calls = {
            "ours": lambda: layer.carry(contexts.pop()),
            "MPI": lambda: there_and_back(False),
            "polite": lambda: there_and_back(True),
        }
        seconds = take_turns(comm, calls, budget_seconds, before=lambda: contexts or contexts.append(layer.route(x)))
        wait = min(("MPI", "polite"), key=lambda name: statistics.median(seconds[name]))
        return compare(seconds, wait, "ours") | {"wait": wait}


def make_table(figures):
    """Lay the figures out -> text."""
    rows = [
        (
            name,
            show_milliseconds(case["median_seconds"]["ours"]),
            show_milliseconds(case["median_seconds"][case["wait"]]),
            show_ratio(case),
            len(case["ratios"]),
        )
        for name, case in figures["cases"].items()
    ]
    headers = ("dispatch and combine", "ours, ms", "Alltoallv, ms", "Alltoallv / ours (quartiles)", "rounds")
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    ranks.main(work)
