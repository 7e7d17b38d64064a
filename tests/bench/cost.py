"""What a layer costs besides its experts' work: forward with experts 16 wide, against tokens, experts and ranks.

Beside the times stand the MPI calls that a forward pass makes on a rank, counted on its communicators.
"""

import statistics
from collections import Counter

import torch
from bench import ranks
from bench.ours import open_layer
from bench.pairs import show_milliseconds, take_turns
from bench.shapes import Shape
from mpi4py import MPI
from tabulate import tabulate

BUDGET_SECONDS = 2.0  # a case
RANKS, TOKENS, EXPERTS = (1, 2, 4, 16), (16, 256, 4096), (16, 64, 256)
SENDING = ("Isend", "Issend", "Send_init", "Ialltoall", "Ialltoallv", "Iallgather", "Iallreduce", "Ibarrier")
MAKING = ("Split", "Split_type", "Create_group")  # Dup keeps the class by itself


def measure(folder, rank_counts=RANKS, budget_seconds=BUDGET_SECONDS):
    """Run every size on every number of ranks -> figures."""
    return {"cases": [case for n in rank_counts for case in ranks.run_ranks(n, "cost", folder, budget_seconds)]}


def work(comm, budget_seconds):
    """Measure all sizes on these ranks -> list of cases. Collective over comm."""
    torch.manual_seed(comm.rank)
    shapes = [
        Shape(name="cost", ranks=comm.size, tokens=tokens, experts=experts, feed_forward=16)
        for tokens in TOKENS
        for experts in EXPERTS
    ]
    return [measure_shape(comm, shape, float(budget_seconds)) for shape in shapes]


def measure_shape(comm, shape, budget_seconds):
    """Time a layer and count its calls -> case. Collective over comm."""
    x = torch.randn(shape.tokens, shape.hidden)
    counting, calls = make_counting(comm)
    with open_layer(counting, shape) as layer:
        taken = take_turns(comm, {"ours": lambda: layer.forward(x)}, budget_seconds)["ours"]
        calls.clear()
        layer.forward(x)
        made = dict(calls)
    sizes = {"ranks": shape.ranks, "tokens": shape.tokens, "experts": shape.experts}
    return sizes | {"seconds": taken, "median_seconds": statistics.median(taken), "calls": made}


def make_counting(comm):
    """Make a communicator that counts the calls which send, as do all that are made from it -> (it, Counter)."""
    calls = Counter()

    def counted(name):
        def call(self, *arguments, **options):
            calls[name] += 1
            return getattr(MPI.Intracomm, name)(self, *arguments, **options)

        return call

    def making(name):
        return lambda self, *arguments: counting(getattr(MPI.Intracomm, name)(self, *arguments))

    methods = {name: counted(name) for name in SENDING} | {name: making(name) for name in MAKING}
    counting = type("Counting", (MPI.Intracomm,), methods)
    return counting(comm), calls


def make_table(figures):
    """Lay the figures out -> text."""
    median = {(case["ranks"], case["tokens"], case["experts"]): case["median_seconds"] for case in figures["cases"]}
    columns = sorted({num_ranks for num_ranks, _, _ in median})
    rows = [
        (tokens, experts, *(show_milliseconds(median[num_ranks, tokens, experts]) for num_ranks in columns))
        for tokens in TOKENS
        for experts in EXPERTS
    ]
    headers = ("tokens a rank", "experts", *(f"{num_ranks} ranks, ms" for num_ranks in columns))
    calls = {case["ranks"]: case["calls"] for case in figures["cases"]}
    counts = "; ".join(f"{n} ranks: {show_calls(made)}" for n, made in calls.items())
    return f"{tabulate(rows, headers=headers, disable_numparse=True)}\n\nMPI calls that send, a forward pass: {counts}"


def show_calls(made):
    """List calls and how often each was made."""
    return ", ".join(f"{name} {times}" for name, times in sorted(made.items())) or "none"


if __name__ == "__main__":
    ranks.main(work)
