"""Random models of dense modules and layers of experts compute on any number of ranks what their dense twins do."""

import pytest
import torch
from dense_models import ROUTED, Case, Model, Part, Twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import make_topology
from twins import draw, gather_summed_grads, set_biases

import hpcmoe
from hpcmoe.wait import broadcast, gather_to_all

FEW, ALL = 10, 200  # models
EXACT, ROUNDED = 1e-6, 1e-2  # largest difference / largest entry
DENSE_KINDS = ("linear", "tied", "norm", "attention", "dropout")


def run_on_ranks(comm, case):
    """Take a case's micro-batches through its model on all ranks -> what this rank has found. Collective."""
    options = dict(case.group, links=make_topology(comm.size, min(case.num_nodes, comm.size)), threads=1)
    with hpcmoe.open(comm, **options) as group:
        model = Model(case, group)
        for layer in model.experts().values():
            set_biases(layer)
        twin = {dtype: Twin(case, model, dtype) for dtype in (torch.float32, torch.float64)}
        inputs = [case.draw_input(number, comm.rank) for number in range(len(case.tokens))]

        def step(number):
            case.seed_dropout(number, comm.rank)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                y = model(inputs[number], number)
            if y.requires_grad:  # alike on all ranks
                case.loss(y).backward()
            return y.detach()

        for count in (*case.earlier_steps, len(inputs)):
            model.zero_grad()
            for x in inputs:
                x.grad = None
            outputs = [*group.lanes(step, range(count), case.in_flight)] if case.lanes else [*map(step, range(count))]
            group.sum_gradients(model)
        found = {f"output {n}": y for n, y in enumerate(outputs)}
        found |= {f"gradient of input {n}": x.grad for n, x in enumerate(inputs) if case.wants_inputs}
        shared = {name: p.grad for name, p in model.steps.named_parameters()}
        shared |= {f"router {number}": weight.grad for number, weight in model.routers().items()}
        for number, layer in model.experts().items():
            grads = gather_summed_grads(comm, layer)
            shared |= {f"experts {number} {name}": grad for name, grad in grads.items()}
    return twin, found, shared, model.chosen


def run_twin(case, twin, chosen):
    """Take all ranks' tokens through a twin -> what each rank should find, and the gradients."""
    found = [{} for _ in case.tokens[0]]
    for number, tokens in enumerate(case.tokens):
        xs = [case.draw_input(number, rank).detach().to(twin.dtype).requires_grad_() for rank in range(len(tokens))]
        of_part = [[of_rank.get((n, number)) for of_rank in chosen] for n in range(len(case.parts))]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast and twin.dtype == torch.float32):
            ys, loss = twin(xs, number, of_part)
        (sum(case.loss(y) if twin.dtype == torch.float32 else exact_loss(case, y) for y in ys) + loss).backward()
        for rank, (x, y) in enumerate(zip(xs, ys, strict=True)):
            found[rank][f"output {number}"] = y.detach()
            if case.wants_inputs:
                found[rank][f"gradient of input {number}"] = x.grad
    grads = dict(twin.steps.named_parameters()) | {f"router {n}": w for n, (w, _) in twin.routers.items()}
    for number, experts in twin.experts.items():
        grads |= {f"experts {number} {name}": weight for name, weight in experts.weights.items()}
    return found, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in grads.items()}


def exact_loss(case, y):
    """Compute a case's loss in float64."""
    return (y * draw(1, case.hidden, seed=3).double()).sin().sum()


def measure_error(found, wanted, scale):
    """Return the largest difference, as a part of the largest entry."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / scale) if wanted.numel() else 0.0


def attempt(comm, case):
    """Compare a case with its twin -> lines about what differs, on rank 0. Collective."""
    twins, found, shared, chosen = run_on_ranks(comm, case)
    found, chosen = zip(*gather_to_all(comm, (found, chosen)), strict=True)
    if comm.rank > 0:
        return []
    exact, exact_grads = run_twin(case, twins[torch.float64], chosen)
    dense, dense_grads = run_twin(case, twins[torch.float32], chosen)
    triples = [
        (f"rank {rank} {name}", found[rank].get(name), of_rank[name], dense[rank][name])
        for rank, of_rank in enumerate(exact)
        for name in of_rank
    ]
    triples += [(name, shared[name], wanted, dense_grads[name]) for name, wanted in exact_grads.items()]
    return list(list_differences(case, triples))


def list_differences(case, triples):
    """List what differs from the exact twin by more than rounding makes the dense one differ."""
    scales = [max(float(wanted.abs().max()), 1e-3) if wanted.numel() else 1.0 for _, _, wanted, _ in triples]
    theirs = [measure_error(dense, wanted, s) for (_, _, wanted, dense), s in zip(triples, scales, strict=True)]
    for (name, found, wanted, _), scale, rounding in zip(triples, scales, theirs, strict=True):
        if found is None:
            found = torch.zeros_like(wanted)  # no gradient is a gradient of zero
        ours = measure_error(found, wanted, scale)
        if ours > (max(EXACT, 4 * rounding) if case.is_exact else max(ROUNDED, 4 * max(theirs))):
            yield f"{name}: {ours:.2e} of the largest entry, {scale:.2e}; the dense twin's own rounding: {rounding:.2e}"


@st.composite
def draw_layer(draw, kind, size, options):
    """Draw the arguments of a layer of experts, and its width."""
    groups = options.get("tensor_parallel", 1), options.get("data_parallel", 1)
    ranks = size // (groups[0] * groups[1])
    num_experts = draw(st.integers(1, 6))
    layer = {"num_experts": num_experts, "top_k": draw(st.integers(1, num_experts))}
    if options["rows"] == torch.bfloat16 and draw(st.booleans()):
        layer["dtype"] = torch.bfloat16
    if kind == "own":
        layer["max_tokens"] = 64
    else:
        rounded = options["rows"] == torch.bfloat16
        layer["kind"] = draw(st.sampled_from(("gelu", "swiglu") if rounded else ("gelu", "relu", "swiglu")))
        layer["feed_forward"] = 2 * draw(st.integers(1, 4))
        layer["bias"] = draw(st.booleans())
        layer["seed"] = draw(st.integers(0, 3))
        layer["max_tokens"] = draw(st.sampled_from([None, 1, 3, 5]))
    given = draw(st.sampled_from(["", "", "spare", "replicas", "placement"]))
    if given == "placement":
        slots = -(-num_experts // ranks) + draw(st.integers(0, 1))
        order = draw(st.permutations(range(ranks * slots)))
        layer["placement"] = [e if e < num_experts else -1 for e in order]
    elif given and kind != "own":
        layer |= {"spare_slots_per_rank": draw(st.integers(1, 2)), "replicate": given == "replicas"}
    if kind == "moe":
        layer["renormalize"] = draw(st.booleans())
        layer["aux_loss_weight"] = draw(st.sampled_from([0.0, 0.5]))
        layer["z_loss_weight"] = draw(st.sampled_from([0.0, 0.25]))
        layer["capacity_factor"] = draw(st.sampled_from([0.0, 0.0, 0.7, 1.5]))
    return layer


@st.composite
def draw_part(draw, size, options):
    """Draw a part of a model."""
    kind = draw(st.sampled_from(ROUTED + DENSE_KINDS))
    part = {
        "kind": kind,
        "again": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "frozen": draw(st.sampled_from([False, False, True])),
    }
    if kind in ROUTED:
        part["layer"] = draw(draw_layer(kind, size, options))
        part["width"] = draw(st.sampled_from([2, 4, 8]))
        part["top_k"] = draw(st.integers(1, part["layer"]["top_k"]))
    return Part(**part)


@st.composite
def draw_case(draw, size):
    """Draw a case for so many ranks."""
    group = {
        "schedule": draw(st.sampled_from(["serial", "overlap", "arrival"])),
        "deterministic": draw(st.booleans()),
        "in_flight": draw(st.integers(1, 3)),
        "max_tokens": draw(st.sampled_from([2, 4, 64])),
    }
    if size % 2 == 0:
        group |= draw(st.sampled_from([{}, {"tensor_parallel": 2}, {"data_parallel": 2}]))
    rows = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    options = group | {"rows": rows}
    micro_batches = draw(st.integers(1, 4))
    number = st.one_of(st.integers(0, 1), st.integers(0, 9))
    parts = draw(st.lists(draw_part(size, options), min_size=1, max_size=4))
    checkpoint = draw(st.sampled_from(["", "", "reentrant", "other"]))
    return Case(
        parts=tuple(parts),
        tokens=tuple(tuple(draw(number) for _ in range(size)) for _ in range(micro_batches)),
        group=group,
        num_nodes=draw(st.integers(1, size)),
        autocast=rows == torch.bfloat16 and draw(st.booleans()),
        lanes=draw(st.booleans()),
        in_flight=draw(st.sampled_from([None, None, 1])),
        earlier_steps=tuple(draw(st.lists(st.integers(1, micro_batches), max_size=2))),
        checkpoint=checkpoint,
        checkpointed=tuple(sorted(draw(st.integers(0, len(parts))) for _ in range(2))),
        wants_inputs=checkpoint == "reentrant" or draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.mpi
@pytest.mark.parametrize("examples", [FEW, pytest.param(ALL, marks=pytest.mark.full)])
def test_random_models_are_their_dense_twins(comm, examples):
    """Rank 0 draws; the others do what it says, so that it may shrink what fails."""
    if comm.rank > 0:
        while (case := broadcast(comm, None)) is not None:
            attempt(comm, case)
        return

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(draw_case(comm.size))
    def search(case):
        broadcast(comm, case)
        assert not attempt(comm, case)

    try:
        search()
    finally:
        broadcast(comm, None)
