"""Experts that move in a small training run because a test says so."""

import numpy as np
import pytest
from small import gather_logical, gather_pieces, open_small_job

from hpcmoe.model.balance import even_load
from hpcmoe.placement.migrate import keep_slots, list_moves
from hpcmoe.placement.result import SearchStats, evaluate
from hpcmoe.prepare.placement import RunPlacement
from hpcmoe.run.migrate import start_migration
from hpcmoe.run.state import LOAD
from hpcmoe.run.train import train_step
from hpcmoe.wait import broadcast

STEPS = 4
MOVES = {"rebalance__every": 1000}  # never by itself


def shuffle(problem, present, seed):
    """Lay the experts of every layer anew at random, on ranks with room -> [L, S], what stays in its slot."""
    random, layouts = np.random.default_rng(seed), []
    for old in present:
        new = random.permutation(old)
        ranks = new.reshape(problem.num_ranks, -1)
        while any(len(set(r[r >= 0])) < (r >= 0).sum() for r in ranks):
            new = random.permutation(old)
            ranks = new.reshape(problem.num_ranks, -1)
        layouts.append(keep_slots(old, new, problem.slots_per_rank))
    return np.stack(layouts)


def force(job, optimizer, seed):
    """Move the experts to a random layout, whatever it gains -> the number that move. Collective over all ranks."""
    mine = None
    if job.mesh.world.rank == 0:
        layouts = shuffle(job.problem, job.placement.expert_of_replica, seed)
        placement = evaluate(job.problem, layouts, [0.0] * len(layouts), "packed", SearchStats())
        moves = list_moves(job.problem, job.placement.expert_of_replica, layouts)
        mine = RunPlacement(placement=placement, seconds_of_method={}), moves
    layout, moves = broadcast(job.mesh.world, mine)
    job.stepper.dispatcher.register(start_migration(job, optimizer, layout, moves))
    return len(moves)


def start_load(job):
    """The load that the first step feels [L, E]."""
    return even_load(job.config.model.num_layers, job.config.model.num_experts)


def run_steps(comm, folder, moves_after=(), steps=STEPS, **changes):
    """Train a few steps, moving after some of them -> (losses and norms, gradients, parameters, a checkpoint)."""
    with open_small_job(comm, folder, **changes) as (job, optimizer, state):
        load, told, moved = start_load(job), [], 0
        for step in range(1, steps + 1):
            if step - 1 in moves_after:
                moved += force(job, optimizer, step)
            outcome, norm = train_step(job, optimizer, load, step)
            told.append((outcome.loss, norm))
        assert comm.size == 1 or not moves_after or moved > 0
        gradients = gather_logical(comm, state, lambda p: p.grad)
        parameters = gather_logical(comm, state, lambda p: p.data)
        return told, gradients, parameters, gather_pieces(comm, state, {LOAD: load})


def assert_near(first, second):
    for (loss, norm), (other_loss, other_norm) in zip(first[0], second[0], strict=True):
        assert (loss, norm) == pytest.approx((other_loss, other_norm), rel=1e-5)
    for one, other in zip(first[1:], second[1:], strict=True):
        assert set(one) == set(other)
        for name in one:
            assert np.allclose(one[name], other[name], rtol=2e-3, atol=2e-5), name


def assert_equal(first, second):
    assert first[0] == second[0]
    for one, other in zip(first[1:], second[1:], strict=True):
        assert set(one) == set(other)
        for name in one:
            assert np.array_equal(one[name], other[name]), name
