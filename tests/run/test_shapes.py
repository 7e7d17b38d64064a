"""Every way to split the ranks into data, expert and tensor parallelism gives the dense oracle's step and training."""

import itertools
import math
import os

import numpy as np
import pytest
from against_oracle import check_against_oracle
from launch import mpirun
from mpi4py import MPI
from small import open_small_job

from hpcmoe.run.train import train_step
from hpcmoe.wait import broadcast

QUICK = {"model__feed_forward": 48, "data__batch_sequences": 19, "pipeline__micro_batches": 2}
NUM_EXPERTS, KINDS = (3, 4, 8, 16, 17), ("gelu", "swiglu")
FEW_RANKS, MANY_RANKS = 4, 16
SAMPLE = ((1, 16, 1), (2, 4, 2), (1, 4, 4), (4, 1, 4), (16, 1, 1))  # of shapes, where ranks are many
EVERY = "EVERY_MODEL" in os.environ  # each model at each shape, each shape trained, whatever it takes
MOST_TRAINED = 2  # shapes of more ranks than FEW_RANKS, for so many steps:
STEPS, REPETITIVE = 30, b"the quick brown fox. " * 200
MORE_RANKS = (6, 8, MANY_RANKS)  # than the suite is run on


def shapes_of(ranks):
    """List all (data, expert, tensor) whose product is the ranks; of many ranks a sample."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    every = [(dp, ranks // dp // tp, tp) for dp in sizes for tp in sizes if ranks % (dp * tp) == 0]
    return [shape for shape in every if ranks < MANY_RANKS or shape in SAMPLE]


def models_for(shape):
    """List (experts, kind, attention, replicas) in which any value of one meets any of another.

    Beyond a few ranks each shape takes some of them in turn.
    """
    few = math.prod(shape) <= FEW_RANKS or EVERY
    turn = 1 if few else 5 if math.prod(shape) < MANY_RANKS else 10
    for place, (number, replicas) in enumerate(itertools.product(range(len(NUM_EXPERTS)), range(2))):
        if (place + 2 * shape[0] + shape[2]) % turn == 0:
            kind, attention = KINDS[(number + replicas) % 2], (number // 2 + replicas) % 2 == 0
            yield NUM_EXPERTS[number], kind, attention, bool(replicas)


def name_shape(shape):
    """Name a shape."""
    return "dp{} ep{} tp{}".format(*shape)


def keys_of(shape, **changes):
    """The keys of a parallel shape, with others."""
    names = ("cluster__data_parallel", "cluster__expert_parallel", "cluster__tensor_parallel")
    return QUICK | dict(zip(names, shape, strict=True)) | changes


def keys_of_model(num_experts, kind, attention, replicas):
    """The keys of a model; with replicas each rank has a slot to spare."""
    return {
        "model__num_experts": num_experts, "experts__kind": kind, "experts__bias": kind == "swiglu",
        "model__attention": attention, "cluster__replicate": replicas, "cluster__spare_slots_per_rank": int(replicas),
    }  # fmt: skip


@pytest.mark.mpi(seconds=600.0)
@pytest.mark.parametrize("shape", shapes_of(MPI.COMM_WORLD.size), ids=name_shape)
def test_every_model_at_every_shape_equals_the_oracle(comm, shared, shape):
    for model in models_for(shape):
        try:
            check_against_oracle(comm, shared, **keys_of(shape, **keys_of_model(*model)))
        except AssertionError as wrong:
            raise AssertionError(f"experts, kind, attention, replicas = {model}: {wrong}") from wrong


def train_losses(comm, folder, **changes):
    """Train from the seed -> the loss of each step."""
    with open_small_job(comm, folder, text=REPETITIVE, **changes) as (job, optimizer, _):
        load = np.ones((2, job.config.model.num_experts))
        return [train_step(job, optimizer, load, step)[0].loss for step in range(1, STEPS + 1)]


@pytest.mark.mpi(seconds=600.0)
def test_thirty_steps_give_the_same_losses_at_every_shape(comm, shared):
    """The losses of one rank alone, but for rounding, which training lets grow."""
    model = keys_of_model(8, "swiglu", True, False) | {"train__learning_rate": 0.01}
    alone = comm.Split(comm.rank)
    losses = None
    if comm.rank == 0:
        (shared / "alone").mkdir()
        losses = train_losses(alone, shared / "alone", **keys_of((1, 1, 1), **model))
    expected = broadcast(comm, losses)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.2
    shapes = shapes_of(comm.size)
    few = shapes if comm.size <= FEW_RANKS or EVERY else shapes[:: math.ceil(len(shapes) / MOST_TRAINED)]
    for number, shape in enumerate(few):
        replicas = {"cluster__replicate": number % 2 == 0, "cluster__spare_slots_per_rank": 1}
        losses = train_losses(comm, shared, **keys_of(shape, **model | replicas))
        assert losses == pytest.approx(expected, rel=1e-4), name_shape(shape)
    alone.Free()


@pytest.mark.parametrize("ranks", MORE_RANKS)
def test_shapes_of_more_ranks_too(ranks):
    """This file's tests above, on more ranks than the suite is run on."""
    ended = mpirun(ranks, "-m", "pytest", "-q", "--with-mpi", "-m", "mpi", __file__, timeout_seconds=900.0)
    assert ended.status == 0, ended
    assert f"{len(shapes_of(ranks)) + 1} passed" in ended.output, ended
