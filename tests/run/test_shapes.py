"""Every way to split the ranks into data, expert and tensor parallelism gives the dense oracle's step and training."""

import itertools
import math

import numpy as np
import pytest
from against_oracle import check_against_oracle
from covering import cover
from launch import mpirun
from mpi4py import MPI
from small import open_small_job

from hpcmoe.run.train import train_step
from hpcmoe.wait import broadcast

QUICK = {"model__feed_forward": 48, "data__batch_sequences": 19, "pipeline__micro_batches": 2}
NUM_EXPERTS, KINDS, ATTENTION = (3, 4, 8, 16, 17), ("gelu", "swiglu"), (True, False)
USUAL_EXPERTS = (
    (3, True),
    (4, False),
    (8, False),
    (16, False),
    (17, True),
)  # and replicas, where there is room for some
MANY_RANKS = 16
SAMPLE = ((1, 16, 1), (2, 4, 2), (1, 4, 4), (4, 1, 4), (16, 1, 1))  # of shapes, where ranks are many
MOST_TRAINED = 2  # shapes of any number of ranks, for so many steps:
STEPS, REPETITIVE = 30, b"the quick brown fox. " * 200
ALL_WAYS = "dp2 ep2 tp2"  # the smallest shape that is split in all three


def shapes_of(ranks):
    """List all (data, expert, tensor) whose product is the ranks; of many ranks a sample."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    every = [(dp, ranks // dp // tp, tp) for dp in sizes for tp in sizes if ranks % (dp * tp) == 0]
    return [shape for shape in every if ranks < MANY_RANKS or shape in SAMPLE]


def models_for(shape):
    """List the models ((experts, replicas), kind, attention) of a shape in a table where every two values meet."""
    shapes = shapes_of(math.prod(shape))
    return [model for other, *model in cover(shapes, USUAL_EXPERTS, KINDS, ATTENTION) if other == shape]


def all_models():
    """List all models ((experts, replicas), kind, attention)."""
    return itertools.product(itertools.product(NUM_EXPERTS, (False, True)), KINDS, ATTENTION)


def name_shape(shape):
    """Name a shape."""
    return "dp{} ep{} tp{}".format(*shape)


def keys_of(shape, **changes):
    """The keys of a parallel shape, with others."""
    names = ("parallel__data", "parallel__expert", "parallel__tensor")
    return QUICK | dict(zip(names, shape, strict=True)) | changes


def keys_of_model(experts, kind, attention):
    """The keys of a model, experts = (their number, replicas); with replicas each rank has a slot to spare."""
    num_experts, replicas = experts
    return {
        "model__num_experts": num_experts, "experts__kind": kind, "experts__bias": kind == "swiglu",
        "model__attention": attention, "placement__replicate": replicas,
        "placement__spare_slots_per_rank": int(replicas),
    }  # fmt: skip


@pytest.mark.mpi
@pytest.mark.parametrize("product", [False, pytest.param(True, marks=pytest.mark.full)], ids=["every two", "all"])
@pytest.mark.parametrize("shape", shapes_of(MPI.COMM_WORLD.size), ids=name_shape)
def test_every_model_at_every_shape_equals_the_oracle(comm, shared, shape, product):
    for model in all_models() if product else models_for(shape):
        try:
            check_against_oracle(comm, shared, **keys_of(shape, **keys_of_model(*model)))
        except AssertionError as wrong:
            raise AssertionError(f"experts, kind, attention = {model}: {wrong}") from wrong


def train_losses(comm, folder, **changes):
    """Train from the seed -> the loss of each step."""
    with open_small_job(comm, folder, text=REPETITIVE, **changes) as (job, optimizer, _):
        load = np.ones((2, job.config.model.num_experts))
        return [train_step(job, optimizer, load, step)[0].loss for step in range(1, STEPS + 1)]


@pytest.mark.mpi
@pytest.mark.parametrize("most", [MOST_TRAINED, pytest.param(99, marks=pytest.mark.full)])
def test_thirty_steps_give_the_same_losses_at_every_shape(comm, shared, most):
    """The losses of one rank alone, but for rounding, which training lets grow."""
    model = keys_of_model((8, False), "swiglu", True) | {"train__learning_rate": 0.01}
    alone = comm.Split(comm.rank)
    losses = None
    if comm.rank == 0:
        (shared / "alone").mkdir()
        losses = train_losses(alone, shared / "alone", **keys_of((1, 1, 1), **model))
    expected = broadcast(comm, losses)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.2
    shapes = shapes_of(comm.size)
    for number, shape in enumerate(shapes[:: math.ceil(len(shapes) / most)]):
        replicas = {"placement__replicate": number % 2 == 0, "placement__spare_slots_per_rank": 1}
        losses = train_losses(comm, shared, **keys_of(shape, **model | replicas))
        assert losses == pytest.approx(expected, rel=1e-4), name_shape(shape)
    alone.Free()


@pytest.mark.parametrize(
    ("ranks", "chosen"), [(8, ALL_WAYS), *(pytest.param(ranks, "dp", marks=pytest.mark.full) for ranks in (6, 8, 16))]
)
def test_shapes_of_more_ranks_too(ranks, chosen):
    """This file's first test above, on more ranks than the suite is run on."""
    words = ("-m", "pytest", "-q", "--with-mpi", "-m", "mpi", "-k", chosen.replace(" ", " and "), __file__)
    ended = mpirun(ranks, *words, timeout_seconds=900.0)
    assert ended.status == 0, ended
    assert f"{len([shape for shape in shapes_of(ranks) if chosen in name_shape(shape)])} passed" in ended.output, ended
