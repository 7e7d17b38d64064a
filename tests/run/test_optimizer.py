"""Copies of an expert get the same gradient, the norm counts each parameter once, and clipping keeps its direction."""

import copy
import pickle
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import run
from mpi4py import MPI
from small import gather_logical, open_small_job

from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.reduce import HostReducer
from hpcmoe.experts.feed_forward import LocalExperts
from hpcmoe.run.flat_gradients import FlatGradients, PlacedExperts, SharedExperts
from hpcmoe.run.gradient_sums import GradientSums
from hpcmoe.run.optimizer import AdamW
from hpcmoe.run.slices import cut_rows
from hpcmoe.run.train import train_step
from hpcmoe.wait import gather_to_all


@pytest.mark.mpi
def test_flat_gradients_are_the_parameters_own_and_sum_over_ranks(comm):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    gradients = FlatGradients({"first": parameters[:1], "second": parameters[1:]})
    (parameters[0].sum() * (comm.rank + 1) + (parameters[1] * torch.arange(4.0)).sum()).backward()
    for _ in HostReducer(SimpleNamespace(sums=comm), HostDevice(), 4).all_reduce("world", gradients.flat):
        time.sleep(1e-4)
    assert torch.equal(parameters[0].grad, torch.full((2, 3), sum(range(1, comm.size + 1))))
    assert torch.equal(parameters[1].grad, torch.arange(4.0) * comm.size)
    assert gradients.end_of_part == {"first": 6, "second": 10}
    assert FlatGradients({}).end_of_part == {}


@pytest.mark.mpi
def test_every_replica_of_an_expert_gets_the_sum_in_rank_order(comm, shared):
    """Gradients that round differently in any other order."""
    changes = {
        "model__num_experts": 2, "placement__replicate": True, "placement__spare_slots_per_rank": 1,
        "loads": ((0.9, 0.1),),
    }  # fmt: skip
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        layers, sharing = job.stepper.network.layers, optimizer.shared
        mine = {}
        for replica in sharing.held_replicas():
            up = layers[replica.layer].experts.local.replicas[replica.slot].up
            seed = [comm.rank, replica.layer, replica.expert]
            up.grad.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=up.shape)))
            mine[replica.layer, replica.expert] = up.grad.numpy().copy()
        of_ranks = gather_to_all(comm, mine)
        optimizer.sums.finish()
        for replica in sharing.held_replicas():
            which = replica.layer, replica.expert
            assert replica.ranks == tuple(rank for rank in range(comm.size) if which in of_ranks[rank])
            expected = sum(of_ranks[rank][which] for rank in replica.ranks)
            assert np.array_equal(layers[replica.layer].experts.local.replicas[replica.slot].up.grad, expected)

        # Each expert of each layer has one owner.
        owned = [(c.layer, c.expert) for c in sharing.held_replicas() if sharing.owns(c.layer, c.slot)]
        assert sorted(sum(gather_to_all(comm, owned), [])) == [(layer, e) for layer in range(2) for e in range(2)]
        assert comm.size == 1 or any(len(replica.ranks) > 1 for replica in sharing.held_replicas())


GROUPS = {"model__num_experts": 2, "placement__replicate": True, "placement__spare_slots_per_rank": 2}


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["serial", "overlap", "arrival"])
def test_sums_beside_the_backward_pass_are_those_after_it(comm, shared, schedule):
    """Buckets of 200 bytes, of 4 MB and none at all, with replicas and, where ranks are even, two groups of them."""
    norms, gradients, early = [], [], []
    changes = GROUPS | {"parallel__data": 2 - comm.size % 2, "pipeline__schedule": schedule}
    for bucket_bytes in (0, 200, 4_000_000):
        changes |= {"train__bucket_bytes": bucket_bytes, "pipeline__deterministic": schedule != "arrival"}
        with open_small_job(comm, shared, **changes) as (job, optimizer, state):
            optimizer.zero_gradients()
            job.stepper.run(job.training, np.arange(14), np.ones((2, 2)), "train")
            early.append(len(optimizer.sums.waiting))
            optimizer.sums.finish()
            norms.append(optimizer.sums.global_norm())
            gradients.append(gather_logical(comm, state, lambda p: p.grad))  # replicas agree bit for bit
    assert early == [6, 0, 0]  # head, two layers' dense parts and experts, embedding
    assert norms == pytest.approx(norms[:1] * 3, rel=1e-6)
    for name, gradient in gradients[0].items():
        assert all(torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-7) for other in gradients[1:]), name


def open_sums(parameters, order, reducer, local):
    """Sums over parts of one parameter each, and one layer of experts that no other rank has."""
    dense = FlatGradients({name: [parameter] for name, parameter in parameters.items()})
    slots = np.zeros((2, 0), np.int64)
    placed = (
        [PlacedExperts(layer=0, local=local, expert_of_replica=slots[0], rank_of_replica=slots[1])] if local else []
    )
    return GradientSums(dense, SharedExperts(placed, reducer.mesh.ep), order, reducer)


def make_reducer_of_one():
    """A reducer of a group of one."""
    alone = MPI.COMM_SELF
    return HostReducer(SimpleNamespace(world=alone, sums=alone, ep=alone, dp=alone), HostDevice(), 4)


def test_sums_start_in_their_order_once_all_passes_have_come():
    """The second part is final first; experts tell of their passes themselves; later passes count for the next step."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    local = LocalExperts([])
    sums = open_sums({"first": first, "second": second}, ["first", 0, "second"], make_reducer_of_one(), local)

    for _ in range(2):
        sums.begin(2)
        for left in (["first", 0, "second"], [0, "second"]):
            second.sum().backward()
            first.sum().backward()
            assert sums.waiting == left
        local.gradients_added()
        assert sums.waiting == [0, "second"]
        local.gradients_added()
        assert sums.waiting == []
        sums.finish()
        first.sum().backward()  # after the sums: nobody counts it
        sums.begin(None)
        for _ in range(3):
            second.sum().backward()
            first.sum().backward()
        assert sums.waiting == ["first", 0, "second"]


def test_hooks_go_with_the_sums_and_are_not_copied():
    parameter, local = torch.nn.Parameter(torch.ones(3)), LocalExperts([])
    sums = open_sums({"only": parameter}, ["only", 0], make_reducer_of_one(), local)
    assert len(local.listeners) == 1 and len(parameter._post_accumulate_grad_hooks) == 1
    assert copy.deepcopy(local).listeners == pickle.loads(pickle.dumps(local)).listeners == []
    del sums
    assert len(local.listeners) == 0 and len(parameter._post_accumulate_grad_hooks) == 0
    parameter.sum().backward()


@pytest.mark.mpi
def test_experts_that_have_moved_are_heard_once(comm, shared):
    """Sums by another placement take the place of the first ones, and begin during the backward pass too."""
    with open_small_job(comm, shared) as (job, optimizer, _):
        for _ in range(2):
            optimizer.follow_placement(job.placement)
        assert [len(layer.experts.local.listeners) for layer in job.stepper.network.layers] == [1, 1]
        optimizer.zero_gradients()
        job.stepper.run(job.training, np.arange(14), np.ones((2, 4)), "evaluate")
        assert len(optimizer.sums.waiting) == 6
        job.stepper.run(job.training, np.arange(14), np.ones((2, 4)), "train")
        assert len(optimizer.sums.waiting) == 0
        optimizer.sums.finish()


@pytest.mark.mpi
def test_a_sharded_optimizer_takes_the_same_steps(comm, shared):
    """Whoever steps a row does it as everybody would: bit for bit, on all ranks."""
    after = []
    for shard in (False, True):
        with open_small_job(comm, shared, train__shard_optimizer=shard, experts__bias=True) as (job, optimizer, state):
            for number in (1, 2, 3):
                optimizer.zero_gradients()
                job.stepper.run(job.training, np.arange(14) * number, np.ones((2, 4)), "train")
                optimizer.step(number)
            after.append(gather_logical(comm, state, lambda p: p.data))
            held = sum(entry["exp_avg"].numel() for entry in optimizer.adamw.state.values())
            everything = sum(p.numel() for p in job.stepper.network.parameters())
            assert held < everything if shard and comm.size > 1 else held == everything
    assert all(torch.equal(after[1][name], weights) for name, weights in after[0].items())


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=6), st.integers(1, 9))
def test_shares_of_rows_hold_each_row_once_and_differ_by_a_row(shapes, num_shares):
    parameters = [torch.zeros(rows, columns) if columns else torch.zeros(rows) for rows, columns in shapes]
    shares = [cut_rows(parameters, index, num_shares) for index in range(num_shares)]
    numbers = {id(p): index for index, p in enumerate(parameters)}
    taken = [(numbers[id(p)], row) for share in shares for p, first, end in share for row in range(first, end)]
    assert taken == [(index, row) for index, p in enumerate(parameters) for row in range(len(p))]
    sizes = [sum(p[first:end].numel() for p, first, end in share) for share in shares]
    assert all(abs(size - sum(sizes) / num_shares) <= 6 for size in sizes)


def fill_gradients(optimizer, value):
    optimizer.zero_gradients()
    for gradients in (optimizer.dense, optimizer.shared):
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


def test_adamw_is_torchs_own_and_leaves_its_compiler_out():
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = kind([parameter], lr=0.1, weight_decay=0.1, fused=True)
        for step in range(1, 4):
            parameter.grad = torch.full((3, 4), 0.3 * step)
            optimizer.step()
        found.append(parameter)
    assert torch.equal(*found)

    program = "import sys, torch; from hpcmoe.run.optimizer import AdamW; p = torch.nn.Parameter(torch.ones(2)); "
    program += "p.grad = torch.ones(2); AdamW([p], fused=True).step(); print('torch._dynamo' in sys.modules)"
    assert run(sys.executable, "-c", program).output == "False\n"


@pytest.mark.mpi
def test_experts_work_with_the_weights_of_the_last_step(comm, shared):
    """Their casts to bfloat16 have followed: made anew by hand they give the same loss, bit for bit."""
    changes = {"model__dtype": "bfloat16", "experts__bias": True, "train__learning_rate": 0.1}
    changes |= {"train__learning_rate_warmup_steps": 1}
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        load, starts = np.ones((2, 4)), np.arange(14)
        train_step(job, optimizer, load, 1)
        after = job.stepper.run(job.training, starts, load, "evaluate").loss
        for layer in job.stepper.network.layers:
            layer.experts.local.refresh()
        assert after == job.stepper.run(job.training, starts, load, "evaluate").loss
