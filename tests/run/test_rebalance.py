"""Experts move when the measured loads call for it, and a run that may move them loses nothing by it."""

import numpy as np
import pytest
import torch
from small import Notes, open_small_job

from hpcmoe.errors import on_root
from hpcmoe.run.infer import infer
from hpcmoe.run.rebalance import make_measured_problem, propose_migration
from hpcmoe.run.train import train

SKEWED = {
    "num_nodes": 2, "placement__method": "contiguous", "placement__objective": "links", "run__steps": 7,
    "run__warmup_steps": 0, "rebalance__every": 3, "comm__once_per_node": "off", "train__validate_every": 4,
    "placement__search_seconds": 20.0, "placement__search_iterations": 1000,
}  # fmt: skip
LONG = {"run__steps": 10**7, "rebalance__horizon": 10**6}  # so that moves cost nothing in comparison


def find_holders(job, layer):
    """The node that holds each expert of a layer [E]."""
    placement = job.placement
    slots = [int(np.argmax(placement.expert_of_replica[layer] == e)) for e in range(job.config.model.num_experts)]
    return job.topology.node_of_rank[placement.rank_of_replica[slots]]


def repel(forward, load):
    """Make a router's forward feel more load on some experts."""
    return lambda x, felt: forward(x, (felt + load).float())


def run(comm, folder, **changes):
    """Run with tokens that prefer the experts of the other node -> (what was recorded, the final layout)."""
    notes = Notes()
    with open_small_job(comm, folder, **SKEWED | changes) as (job, optimizer, _):
        experts, node = job.config.model.num_experts, job.topology.node_of_rank[comm.rank]
        first = job.placement.expert_of_replica.copy()
        for number, layer in enumerate(job.stepper.network.layers):
            holder = find_holders(job, number)
            layer.router.forward = repel(layer.router.forward, torch.from_numpy(np.where(holder == node, 20.0, 0.0)))
        load = np.ones((2, experts))
        if optimizer is None:
            infer(job, notes, load, lambda *state: None)
        else:
            train(job, notes, optimizer, (0, load), lambda *state: None)
        assert job.staged_bytes <= job.memory.moving
        return notes.values, first, job.placement.expert_of_replica


@pytest.mark.mpi
def test_training_moves_its_experts_once_and_loses_nothing(comm, shared):
    if comm.size == 1:
        pytest.skip("needs two nodes")
    moves, first, last = run(comm, shared)
    stays, _, same = run(comm, shared, rebalance__margin=1e9)
    assert (same == first).all() and (last != first).any()
    assert list(moves["cluster/migrated"]) == [1, 4] and list(stays["cluster/migrated"]) == [1]
    assert np.array_equal(moves["cluster/migrated"][1], first) and np.array_equal(moves["cluster/migrated"][4], last)
    assert moves["cluster/moved"][4] == ((first != last) & (last >= 0)).sum() and moves["cluster/move_seconds"][4] > 0
    assert moves["cluster/gain_seconds_predicted"][4] > 1.3 * moves["cluster/move_seconds_predicted"][4] > 0
    for name in ("train/loss", "train/gradient_norm", "train/validation_loss"):
        assert moves[name] == stays[name], name


@pytest.mark.mpi
def test_inference_moves_its_experts(comm, shared):
    if comm.size == 1:
        pytest.skip("needs two nodes")
    moves, first, last = run(comm, shared, run__mode="infer", model__dtype="bfloat16")
    assert list(moves["cluster/migrated"]) == [1, 4] and (last != first).any()


@pytest.mark.mpi
def test_chance_alone_moves_no_expert(comm, shared):
    """Few tokens of an even router lean this way and that: what is found for some of them gains nothing for others."""
    with open_small_job(comm, shared, **SKEWED | LONG) as (job, _, _):

        def ask():
            shape = (4, 2, job.topology.num_nodes, 4)
            drawn = (np.random.default_rng(seed).poisson(20, shape) for seed in range(12))
            return sum(propose_migration(job, tokens, 3)[0].accepted for tokens in drawn)

        assert on_root(comm, ask) <= 4  # a sixth of all gains exceed what chance makes of none


@pytest.mark.mpi
def test_a_proposal_weighs_gain_noise_and_cost(comm, shared):
    """Loads that part of the steps belies make noise; of no step left there is no gain."""
    with open_small_job(comm, shared, **SKEWED) as (job, _, _):

        def ask():
            tokens = np.full((2, job.topology.num_nodes, 4), 10)
            for layer in range(2):  # nobody wants what is on its own node
                tokens[layer, find_holders(job, layer), range(4)] = 1
            steady = propose_migration(job, np.stack([tokens] * 3), 3)
            fickle = propose_migration(job, np.stack([5 * tokens, 0 * tokens + 40, tokens]), 3)
            late = propose_migration(job, np.stack([tokens] * 3), 7)
            return make_measured_problem(job, tokens).probability, steady, fickle, late

        probability, (steady, layout), (fickle, _), (late, nothing) = on_root(comm, ask)
    assert np.allclose(probability.sum(axis=2), 1)
    assert late.gain_seconds == 0 and not late.accepted and nothing is None
    if comm.size > 1:
        assert steady.accepted and steady.noise_seconds < 1e-12 and steady.seconds_after < steady.seconds_before
        assert steady.gain_seconds == pytest.approx(3 * (steady.seconds_before - steady.seconds_after))
        assert layout.placement.objective_seconds * 4 == pytest.approx(steady.seconds_after)
        assert fickle.noise_seconds > 0
