"""Experts that move leave the training as it was: losses, gradients, parameters and checkpoints."""

import numpy as np
import pytest
from covering import usually
from moves import MOVES, STEPS, assert_equal, assert_near, force, run_steps, start_load
from small import gather_pieces, open_small_job

from hpcmoe.run import move_experts
from hpcmoe.run.state import LOAD
from hpcmoe.run.train import train_step

SWIGLU = {"experts__kind": "swiglu", "experts__bias": True}
NODES = {"num_nodes": 2, "comm__once_per_node": "off"}
EQUAL = {  # bit for bit
    "an expert a rank": {},
    "more experts than slots divide": {"model__num_experts": 5},
    "fewer experts than ranks": {"model__num_experts": 2},
    "several experts a rank": {"model__num_experts": 8, "model__top_k": 3} | SWIGLU,
    "many portions": {"model__num_experts": 6, "experts__gemm_rows": 7, "pipeline__schedule": "serial"},
    "bfloat16": {"model__num_experts": 6, "model__dtype": "bfloat16"},
    "nodes": NODES,
    "nodes, several experts a rank": NODES | {"model__num_experts": 7} | SWIGLU,
    "nodes, little room": NODES | {"comm__pool_bytes": 6000, "pipeline__in_flight": 3},
    "messages alone": {"comm__shared_memory": False, "model__num_experts": 5},
}
NEAR = {  # to rounding
    "once a node": {"num_nodes": 2, "comm__once_per_node": "on", "model__num_experts": 6, "model__top_k": 3},
    "any order": {"pipeline__deterministic": False, "model__num_experts": 5},
    "arrival": NODES | {"pipeline__schedule": "arrival", "pipeline__deterministic": False},
}

GROUPS = {
    "tensor": {"parallel__tensor": 2, "model__feed_forward": 32},
    "data": {"parallel__data": 2},
    "data, buckets": {"parallel__data": 2, "train__bucket_bytes": 400, "train__shard_optimizer": True},
}


@pytest.mark.mpi
@pytest.mark.parametrize(
    "case",
    usually(EQUAL, "more experts than slots divide", "several experts a rank", "nodes, little room", "messages alone"),
)
def test_a_move_leaves_training_as_it_was_bit_for_bit(comm, shared, case):
    stays, moves = (run_steps(comm, shared, after, **MOVES | EQUAL[case]) for after in ((), (1, 3)))
    assert_equal(stays, moves)


@pytest.mark.mpi
@pytest.mark.parametrize("case", usually(NEAR, "once a node", "arrival"))
def test_a_move_leaves_training_as_it_was_to_rounding(comm, shared, case):
    stays, moves = (run_steps(comm, shared, after, **MOVES | NEAR[case]) for after in ((), (1, 3)))
    assert_near(stays, moves)


@pytest.mark.mpi
def test_copies_of_an_expert_move_too(comm, shared):
    """Every replica stays the same bit for bit, which gather_logical asserts; their gradients are summed elsewhere."""
    changes = {
        "placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 5, "num_nodes": 2,
        "loads": ((0.4, 0.2, 0.2, 0.1, 0.1),),
    }  # fmt: skip
    stays, moves = (run_steps(comm, shared, after, **MOVES | changes) for after in ((), (1, 2, 3)))
    assert_near(stays, moves)


@pytest.mark.mpi
@pytest.mark.parametrize("shape", usually(GROUPS, "tensor", "data, buckets"))
def test_groups_move_alike(comm, shared, shape):
    """Shards, and groups that read other tokens; a group has two ranks, so that experts may move in it."""
    if comm.size % 2 or comm.size == 2:
        pytest.skip("needs two ranks in a group")
    changes = GROUPS[shape] | {"experts__bias": True, "model__num_experts": 5}
    stays, moves = (run_steps(comm, shared, after, **MOVES | changes) for after in ((), (1, 3)))
    assert_equal(stays, moves)
    changes |= {"num_nodes": 2, "model__feed_forward": 12}  # shards of no multiple of 32 bytes
    stays, moves = (run_steps(comm, shared, after, **MOVES | changes) for after in ((), (1, 3)))
    assert_near(stays, moves)


@pytest.mark.mpi
def test_no_rank_holds_more_than_the_staging_of_what_comes(comm, shared, monkeypatch):
    """The same in many small pieces: the bound is less than one matrix."""
    seen = []

    def keep(tensors, piece_bytes):
        for piece in cut(tensors, piece_bytes):
            seen.append(piece.nbytes)
            yield piece

    cut = move_experts.cut
    stays = run_steps(comm, shared, **MOVES)
    monkeypatch.setattr(move_experts, "STAGING_BYTES", 200)
    monkeypatch.setattr(move_experts, "cut", keep)
    assert_equal(stays, run_steps(comm, shared, (1, 3), **MOVES))
    assert all(nbytes <= 200 for nbytes in seen) and (comm.size == 1 or len(seen) > 20)


@pytest.mark.mpi
def test_a_checkpoint_is_taken_back_wherever_the_experts_have_moved(comm, shared):
    changes = MOVES | {"model__num_experts": 5}
    steps, *_ = run_steps(comm, shared, steps=STEPS + 1, **changes)
    *_, pieces = run_steps(comm, shared, (1,), **changes)
    with open_small_job(comm, shared, **changes) as (job, optimizer, state):
        load = start_load(job)
        train_step(job, optimizer, load, 1)
        force(job, optimizer, 7)
        job.stepper.dispatcher.poke()
        while not job.stepper.dispatcher.is_idle:
            job.stepper.dispatcher.poke()
        arrays = {}
        for part in state.list_wanted():
            box = tuple(slice(first, first + count) for first, count in zip(part.start, part.extent, strict=True))
            arrays[part.name, part.start] = pieces[part.name][box]
        state.restore(arrays, STEPS)
        again = gather_pieces(comm, state, {LOAD: load})
        outcome, norm = train_step(job, optimizer, load, STEPS + 1)
    assert set(again) == set(pieces) and all(np.array_equal(again[name], pieces[name]) for name in pieces)
    assert (outcome.loss, norm) == steps[-1]
