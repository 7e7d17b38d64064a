"""Copies of an expert get the same gradient, the norm counts each parameter once, and clipping keeps its direction."""

import numpy as np
import pytest
import torch
from small import gather_logical, open_small_job

from hpcmoe.config import Train
from hpcmoe.run.optimizer import FlatGradients, learning_rate_at
from hpcmoe.wait import gather_to_all


def test_the_learning_rate_rises_linearly_and_then_stays():
    train = Train(learning_rate=0.4, learning_rate_warmup_steps=4)
    assert [learning_rate_at(step, train) for step in (1, 2, 4, 5, 100)] == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
    assert learning_rate_at(1, Train(learning_rate=0.4, learning_rate_warmup_steps=0)) == 0.4


@pytest.mark.mpi
def test_flat_gradients_are_the_parameters_own_and_sum_over_ranks(comm):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    gradients = FlatGradients(parameters)
    (parameters[0].sum() * (comm.rank + 1) + (parameters[1] * torch.arange(4.0)).sum()).backward()
    gradients.all_reduce(comm, scale=0.5)
    total = sum(range(1, comm.size + 1))
    assert torch.equal(parameters[0].grad, torch.full((2, 3), total / 2))
    assert torch.equal(parameters[1].grad, torch.arange(4.0) * comm.size / 2)
    FlatGradients([]).all_reduce(comm)


@pytest.mark.mpi
def test_every_copy_of_an_expert_gets_the_sum_in_rank_order(comm, shared):
    """Gradients that round differently in any other order."""
    changes = {
        "model__num_experts": 2, "cluster__replicate": True, "cluster__spare_slots_per_rank": 1,
        "cluster__probability": "config", "cluster__expert_probability": ((0.9, 0.1),),
    }  # fmt: skip
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        layers, sharing = job.stepper.network.layers, optimizer.shared
        mine = {}
        for (layer, slot), (expert, _) in sharing.ranks_of.items():
            up = layers[layer].experts.replicas[slot].up
            up.grad.copy_(torch.from_numpy(np.random.default_rng([comm.rank, layer, expert]).normal(size=up.shape)))
            mine[layer, expert] = up.grad.numpy().copy()
        of_ranks = gather_to_all(comm, mine)
        sharing.sum_gradients(layers)
        for (layer, slot), (expert, ranks) in sharing.ranks_of.items():
            assert ranks == [rank for rank in range(comm.size) if (layer, expert) in of_ranks[rank]]
            expected = sum(of_ranks[rank][layer, expert] for rank in ranks)
            assert np.array_equal(layers[layer].experts.replicas[slot].up.grad, expected)

        # Each expert of each layer has one owner.
        owned = [(layer, sharing.ranks_of[layer, slot][0]) for layer, slot in sharing.ranks_of
                 if sharing.owns(layer, slot)]  # fmt: skip
        assert sorted(sum(gather_to_all(comm, owned), [])) == [(layer, e) for layer in range(2) for e in range(2)]
        assert comm.size == 1 or any(len(ranks) > 1 for _, ranks in sharing.ranks_of.values())


def fill_gradients(optimizer, value):
    optimizer.zero_gradients()
    for gradients in (optimizer.dense, optimizer.expert):
        gradients.flat.fill_(value)


@pytest.mark.mpi
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_gradients_are_scaled_to_the_clipping_norm_where_they_exceed_it(comm, shared, clip_norm):
    with open_small_job(comm, shared, train__clip_norm=clip_norm) as (job, optimizer, state):
        fill_gradients(optimizer, 1.0)
        norm = optimizer.step(1)
        after = gather_logical(comm, state, lambda p: p.grad)
    # Dense gradients were 1 on each rank, and each expert's on one rank.
    expected = {name: comm.size if name.startswith("dense") else 1 for name in after}
    assert norm == pytest.approx(sum(g.numel() * expected[name] ** 2 for name, g in after.items()) ** 0.5, rel=1e-5)
    scale = clip_norm / norm if clip_norm == 0.5 else 1.0
    for name, gradient in after.items():
        assert torch.allclose(gradient, torch.full_like(gradient, expected[name] * scale)), name


@pytest.mark.mpi
def test_only_matrices_decay_and_a_step_takes_the_learning_rate_of_its_number(comm, shared):
    """Without gradients AdamW does nothing but decay: w -= learning rate x decay x w."""
    train = {"train__learning_rate": 0.1, "train__learning_rate_warmup_steps": 2, "train__weight_decay": 0.5}
    with open_small_job(comm, shared, experts__bias=True, **train) as (job, optimizer, state):
        for parameter in job.stepper.network.parameters():
            parameter.data.fill_(1.0)
        for number in (1, 2):
            fill_gradients(optimizer, 0.0)
            optimizer.step(number)
        after = gather_logical(comm, state, lambda p: p.data)
    for name, weights in after.items():
        decayed = 1.0 if "norm" in name or name.endswith("_bias") else (1 - 0.05 * 0.5) * (1 - 0.1 * 0.5)
        assert torch.allclose(weights, torch.full_like(weights, decayed)), name
