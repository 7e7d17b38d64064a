"""The same training gives the same bits each time, and a token the same output on whichever rank it is."""

import pytest
import torch
from dense_models import Case, Model, Part
from small import make_topology
from twins import draw

import hpcmoe
from hpcmoe.wait import gather_to_all

PARTS = tuple(
    Part(kind=kind, width=8, layer={"num_experts": 4, "top_k": 2, **more})
    for kind, more in [
        ("moe", {"feed_forward": 12, "aux_loss_weight": 0.1, "spare_slots_per_rank": 1, "replicate": True}),
        ("experts", {"feed_forward": 8, "kind": "gelu", "bias": True}),
        ("own", {"max_tokens": 64}),
    ]
) + (Part(kind="dropout"),)


def train(comm, schedule, steps=5):
    """Train for some steps -> all outputs, gradients of inputs and weights of this rank."""
    torch.manual_seed(comm.rank)
    case = Case(parts=PARTS, tokens=tuple(tuple((3 * m + 5 * r) % 11 for r in range(comm.size)) for m in range(4)))
    links = make_topology(comm.size, min(2, comm.size))
    with hpcmoe.open(comm, links=links, schedule=schedule, in_flight=3, threads=1) as group:
        model = Model(case, group)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        inputs = [case.draw_input(number, comm.rank) for number in range(4)]
        kept = []

        def step(number):
            y = model(inputs[number], number)
            case.loss(y).backward()
            return y.detach()

        for _ in range(steps):
            kept += group.lanes(step, range(4))
            group.sum_gradients(model)
            group.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            group.update_routers()
        return [*kept, *(x.grad for x in inputs), *(p.detach() for p in model.parameters())]


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["serial", "overlap"])
def test_two_runs_are_the_same_bits(comm, schedule):
    first, second = train(comm, schedule), train(comm, schedule)
    assert len(first) == len(second) > 30
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.mpi
def test_a_token_has_the_same_output_on_any_rank_until_the_routers_are_told(comm):
    """Not bit for bit: an expert's rows come in another order, and a product of other sizes may round otherwise."""
    with hpcmoe.open(comm, links=make_topology(comm.size, min(2, comm.size)), threads=1) as group:
        moe = hpcmoe.MoE(16, 24, 4, group=group, load_feedback=0.5, bias_update_speed=0.1)
        tokens, outputs = draw(24, 16, seed=1), []
        for turn in range(comm.size + 1):
            own = torch.arange(comm.rank, 24, comm.size).roll(turn) if turn else torch.arange(24 * (comm.rank == 0))
            mine = (own + turn) % 24
            with torch.no_grad():
                found = gather_to_all(comm, (mine, moe(tokens[mine])))
            whole = torch.empty_like(tokens)
            for where, rows in found:
                whole[where] = rows
            outputs.append(whole)
    scale = outputs[0].abs().max()
    differences = [float((other - outputs[0]).abs().max() / scale) for other in outputs]
    assert max(differences) <= 1e-6, differences
