"""A user's own experts, reached by dispatch and combine, give what the same experts give where the tokens are."""

import contextlib

import pytest
import torch
from small import make_topology
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import compare, draw, sum_over

import hpcmoe
from hpcmoe.errors import ClusterError, ConfigError

H, E = 8, 5
TOKENS = (7, 0, 12, 5)  # of the ranks


@contextlib.contextmanager
def open_group(comm, num_nodes=1, **options):
    with hpcmoe.open(comm, links=make_topology(comm.size, min(num_nodes, comm.size)), threads=1, **options) as group:
        yield group


def make_expert(number):
    """One of a user's experts, the same on every rank: no feed-forward network of ours."""
    expert = nn.Sequential(nn.Linear(H, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, H))
    with torch.no_grad():
        for k, parameter in enumerate(expert.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 * number + k))
    return expert


def draw_call(rank, tokens=TOKENS, top_k=2, seed=0):
    num_tokens = tokens[rank % len(tokens)]
    x = draw(num_tokens, H, seed=seed + 100 * rank + 1).requires_grad_()
    choices = draw(num_tokens, E, seed=seed + 100 * rank).argsort(dim=1)[:, :top_k]
    return x, choices, draw(num_tokens, top_k, seed=seed + 100 * rank + 2).sigmoid().requires_grad_()


def apply_own(dispatcher, experts, call):
    rows, counts, handle = dispatcher.dispatch(*call)
    assert len(counts) == len(dispatcher.expert_of_slot) and int(counts.sum()) == len(rows)
    parts = zip(dispatcher.expert_of_slot.tolist(), rows.split(counts.tolist()), strict=True)
    results = [experts[expert](part) for expert, part in parts if len(part)]
    return dispatcher.combine(torch.cat([rows[:0], *results]), handle)


def apply_dense(experts, x, choices, gates):
    weight = torch.stack([(gates * (choices == expert)).sum(dim=1) for expert in range(E)])
    return sum(weight[expert][:, None] * experts[expert](x) for expert in range(E))


@pytest.mark.mpi
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("schedule", ["overlap", "arrival"])
def test_own_experts_and_their_gradients_are_those_without_ranks(comm, num_nodes, schedule):
    with open_group(comm, num_nodes, schedule=schedule) as group:
        dispatcher = hpcmoe.Dispatcher(H, E, group=group)
        own, dense = [[make_expert(number) for number in range(E)] for _ in range(2)]
        calls = [draw_call(comm.rank, seed=number) for number in range(3)]

        def step(call):
            y = apply_own(dispatcher, own, call)
            y.sin().sum().backward()
            return y.detach()

        for y, (x, choices, gates) in zip(group.lanes(step, calls), calls, strict=True):
            grads = x.grad, gates.grad
            x.grad = gates.grad = None
            wanted = apply_dense(dense, x, choices, gates)
            wanted.sin().sum().backward()
            compare(y, wanted)
            compare(grads[0], x.grad, 4e-6)
            compare(grads[1], gates.grad, 4e-6)
        for ours, theirs in zip(nn.ModuleList(own).parameters(), nn.ModuleList(dense).parameters(), strict=True):
            grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
            compare(sum_over(comm, grad), sum_over(comm, theirs.grad), 4e-6)


@pytest.mark.mpi
def test_the_loads_count_and_other_layers_may_come_between(comm):
    with open_group(comm) as group:
        dispatcher, moe = hpcmoe.Dispatcher(H, E, group=group), hpcmoe.MoE(H, 12, E, group=group)
        call = draw_call(comm.rank)
        rows, _, handle = dispatcher.dispatch(*call)
        between = moe(call[0])
        y = dispatcher.combine(rows, handle)
        compare(y, call[0] * call[2].sum(dim=1, keepdim=True))
        compare(moe(call[0]), between)
        loads = group.loads()
        assert loads[0].tolist() == sum_over(comm, torch.bincount(call[1].flatten(), minlength=E)).tolist()


@pytest.mark.mpi
def test_rows_that_are_replaced_still_bring_the_gradients_home(comm):
    """Experts whose results do not depend on the rows: the inputs' gradients are zero, the gates' are not."""
    with open_group(comm) as group:
        dispatcher = hpcmoe.Dispatcher(H, E, group=group)
        x, choices, gates = draw_call(comm.rank)
        rows, _, handle = dispatcher.dispatch(x, choices, gates)
        dispatcher.combine(torch.ones_like(rows.detach()), handle).sum().backward()
        assert not x.grad.any() and torch.equal(gates.grad, torch.full_like(gates, H))


@pytest.mark.mpi
def test_what_is_out_of_order_is_one_line(comm):
    with open_group(comm, max_tokens=16) as group:
        dispatcher = hpcmoe.Dispatcher(H, E, group=group)
        call = draw_call(comm.rank, (4,))
        rows, _, handle = dispatcher.dispatch(*call)
        with pytest.raises(ConfigError, match=r"layer 0: dispatch: combine\(\) of the one before is to come"):
            dispatcher.dispatch(*call)
        with pytest.raises(ConfigError, match=r"rows have shape \[0, 8\]: must be"):
            dispatcher.combine(torch.cat([rows, rows[:1]]) if len(rows) == 0 else rows[:0], handle)
        dispatcher.combine(rows, handle)
        with pytest.raises(ConfigError, match="the handle is not that of the last dispatch"):
            dispatcher.combine(rows, handle)
        with pytest.raises(ConfigError, match=r"top_k_index is .* to .*: must be from 0 to 4"):
            dispatcher.dispatch(call[0], call[1] + 5, call[2])
        with pytest.raises(ClusterError, match="layer 0 top-2 forward, own experts with more tokens than"):
            dispatcher.dispatch(*draw_call(comm.rank, (17, 2)))


@pytest.mark.mpi
def test_a_checkpoint_counts_each_token_once(comm):
    """Its second forward pass, within the backward pass, dispatches them again."""
    with hpcmoe.open(comm, threads=1) as group:
        dispatcher, own = hpcmoe.Dispatcher(4, 3, group=group), torch.nn.Linear(4, 4)

        def compute(x):
            rows, _, handle = dispatcher.dispatch(x, torch.tensor([[0, 2]] * 5), torch.ones(5, 2))
            return dispatcher.combine(own(rows), handle)

        x = torch.ones(5, 4, requires_grad=True)
        checkpoint(compute, x, use_reentrant=False).sum().backward()
        assert group.loads()[0].tolist() == [5 * comm.size, 0, 5 * comm.size]
