"""The same layer by hpcmoe and by what a user would pick instead, checked for the same outputs, then timed by turns.

Three groups of ranks share the machine and never work at once: one runs hpcmoe's layer, one a peer (bench/rivals.py)
as it comes, one the same peer with malloc told to keep its memory. `make bench-peers` installs the peers. Whole models
of Hugging Face come after the layers (bench/peers_models.py).
"""

import contextlib

import torch
from bench import machine, peers_models, ranks
from bench.ours import draw_expert, open_layer
from bench.pairs import compare, show_milliseconds, show_ratio, take_turns
from bench.rivals import RIVALS, keep_memory, open_gloo
from bench.shapes import DECODE, NARROW, WIDE, read_shapes, write_shapes
from tabulate import tabulate
from torch.nn import functional

from hpcmoe.gemm import WideGemm, choose_gemm
from hpcmoe.wait import broadcast, gather_to_all

BUDGET_SECONDS = 8.0  # a peer and case
SHAPES = [
    WIDE,
    WIDE.but(dtype="bfloat16"),
    NARROW,
    NARROW.but(dtype="bfloat16"),
    DECODE.but(dtype="bfloat16"),
    WIDE.but(dtype="bfloat16", training=True),
]
SIDES = ("ours", "as it comes", "malloc tuned")  # the groups of ranks
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of what the experts add, relative
CLEAR = {"float32": 1e-3, "bfloat16": 5e-2}  # by how much a token must prefer its choice: rounding turns a near tie
PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core")


def measure(folder, shapes=None, budget_seconds=BUDGET_SECONDS, models=peers_models.MODELS):
    """Run the shapes, all of one number of ranks a side, then the models -> figures."""
    shapes = shapes or choose_shapes(choose_gemm("cpu", torch.bfloat16))
    (num_ranks,) = {shape.ranks for shape in shapes}
    cases = ranks.run_ranks(len(SIDES) * num_ranks, "peers", folder, write_shapes(shapes), budget_seconds)
    of_models = peers_models.measure(folder, models) if models else []
    return {"versions": machine.read_versions(PACKAGES), "cases": cases, "models": of_models}


def choose_shapes(gemm):
    """Choose the shapes by who multiplies in bfloat16: torch.mm, where it emulates it, takes the peers minutes."""
    if isinstance(gemm, WideGemm):
        return list(dict.fromkeys(shape.but(dtype="float32") for shape in SHAPES))
    return SHAPES


def work(comm, shapes, budget_seconds):
    """Measure the shapes against every peer -> list of cases. Collective over comm."""
    shapes = read_shapes(shapes)
    side = SIDES[comm.rank // shapes[0].ranks]
    group = comm.Split(SIDES.index(side), comm.rank)
    torch.set_num_threads(1)
    if side == "malloc tuned":
        keep_memory()
    if side != "ours":
        open_gloo(group)
    return [case for shape in shapes for case in measure_shape(comm, group, side, shape, float(budget_seconds))]


def measure_shape(comm, group, side, shape, budget_seconds):
    """Measure a shape against every peer -> list of cases. Collective over comm."""
    cases = []
    with contextlib.ExitStack() as stack:
        layer = stack.enter_context(open_layer(group, shape)) if side == "ours" else None
        router_weight = broadcast(comm, layer and layer.router_weight)
        for rival in RIVALS:
            made = make_step(group, shape, layer, rival, router_weight)
            case = {"shape": str(shape), "peer": rival.name} | check(comm, side, shape, router_weight, made)
            if "skipped" not in case:
                case |= time_sides(comm, side, made[0], budget_seconds)
            cases.append(case)
    return cases


def make_step(group, shape, layer, kind, router_weight):
    """Open a peer of a kind, where layer is not ours -> (call that takes a step, None without a part; why not)."""
    mine = [group.rank]
    if layer is None:
        if kind.alone and group.rank > 0:
            return None, None
        mine = range(group.size) if kind.alone else mine
        layer, error = attempt(lambda: kind(shape, router_weight, lambda expert: draw_expert(shape, expert)))
        if error:
            return None, error
    x, grad = draw_tokens(shape, mine)
    return (lambda: layer.train(x, grad) if shape.training else layer.forward(x)), None


def attempt(call):
    """Call -> (result, None), or (None, what it raised, in a line): a peer that fails is left out, whatever ails it."""
    try:
        return call(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def draw_tokens(shape, ranks_of_tokens):
    """Draw the tokens of some ranks and the gradients of what becomes of them -> x, grad [n, H] float32."""
    draws = [
        torch.randn(2, shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank))
        for rank in ranks_of_tokens
    ]
    return torch.cat(draws, dim=1)


def check(comm, side, shape, router_weight, made):
    """Compare what the sides' first steps give -> case: their difference, or why the peer is skipped. Collective."""
    (step, error), output = made, None
    if not any(gather_to_all(comm, error)) and step:
        output, error = (step(), None) if side == "ours" else attempt(step)  # we have no excuse
    errors = [each for each in gather_to_all(comm, error) if each]
    if errors:
        return {"skipped": errors[0]}

    # Rank 0 looks at all of it.
    outputs = gather_to_all(comm, output)
    difference = broadcast(comm, find_difference(shape, router_weight, outputs) if comm.rank == 0 else None)
    allowed = TOLERANCE[shape.dtype]
    if not difference <= allowed:
        return {"difference": difference, "skipped": f"other outputs: off by {difference:.1e}, allowed {allowed:.0e}"}
    return {"difference": difference}


def find_difference(shape, router_weight, outputs):
    """Find how far the peers are from us: outputs of all ranks [T, H], None where idle -> relative, the larger one.

    Of outputs counts what the experts added to what passed by them, for tokens whose choice is clear.
    """
    x, grad = draw_tokens(shape, range(shape.ranks))
    best = functional.linear(x, router_weight).topk(shape.top_k + 1).values
    clear = best[:, -2] - best[:, -1] > CLEAR[shape.dtype]
    sides = [outputs[first : first + shape.ranks] for first in range(0, len(outputs), shape.ranks)]
    ours, *theirs = (torch.cat([rows for rows in side if rows is not None])[clear] for side in sides)
    added = ours - (grad if shape.training else x)[clear]
    return float(torch.stack([(rows - ours).norm() / added.norm() for rows in theirs]).max())


def time_sides(comm, side, step, budget_seconds):
    """Let the sides take turns with their steps -> case: how long each takes, and each peer / ours. Collective."""
    calls = {name: step if name == side else None for name in SIDES}
    seconds = take_turns(comm, calls, budget_seconds)
    return {name: compare(seconds, name, "ours") for name in SIDES[1:]}


def make_table(figures):
    """Lay the figures out, and say which peers are not among them -> text."""
    timed = [case for case in figures["cases"] if "skipped" not in case]
    headers = ("layer", "peer", "ours, ms", "peer, ms", "peer / ours (quartiles)", "malloc tuned, ms", "tuned / ours")
    rows = [(case["shape"], case["peer"], *show_sides(case)) for case in timed]
    shapes_of_reason = {}
    for case in figures["cases"]:
        if "skipped" in case:
            shapes_of_reason.setdefault(f"skipped: {case['peer']}: {case['skipped']}", []).append(case["shape"])
    skipped = [f"{reason} ({', '.join(shapes)})" for reason, shapes in shapes_of_reason.items()]
    table = tabulate(rows, headers=headers, disable_numparse=True)
    return "\n".join([table, "", *skipped, "", peers_models.make_table(figures.get("models", []))]).rstrip()


def show_sides(case):
    """Say a case's times and ratios."""
    cells = [show_milliseconds(case[SIDES[1]]["median_seconds"]["ours"])]
    for name in SIDES[1:]:
        cells += [show_milliseconds(case[name]["median_seconds"][name]), show_ratio(case[name])]
    return cells


if __name__ == "__main__":
    ranks.main(work)
