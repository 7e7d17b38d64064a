"""Every op of a step is measured, by ranks that work at the same time, and what was measured is said."""

import dataclasses
import itertools

import pytest
from small import make_config, open_small_job

from hpcmoe.errors import ConfigError
from hpcmoe.measuring import OpClock, choose_micro_batches, is_enough, make_lone_config, measure_costs
from hpcmoe.model.balance import even_load
from hpcmoe.projection.costs import LAYER_OPS, OPS, read_costs
from hpcmoe.run.train import draw_batch


def use_clock(job):
    """Give a job a clock that ticks once a reading -> the clock."""
    ticks = itertools.count()
    clock = OpClock(job.stepper.lanes, job.config.model.num_layers, lambda: float(next(ticks)))
    job.stepper.clock = job.stepper.lanes.clock = job.stepper.dispatcher.clock = clock
    return clock


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_second_of_a_step_belongs_to_an_op(comm, shared, mode):
    changes = {"run__mode": mode, "pipeline__schedule": "serial", "dispatch__aux_loss_weight": 0.1}
    with open_small_job(comm, shared, **changes) as (job, _, _):
        clock = use_clock(job)
        load = even_load(2, 4)
        clock.pop_ops()
        job.stepper.run(job.training, draw_batch(job, 1), load, mode)
        ops, total = clock.pop_ops(), clock.since
        expected = {"data", "dense", "route", "dispatch", "compute", "combine", "head", "waiting"}
        backward = (
            {"combine_backward", "compute_backward", "route_backward", "dense_backward"} if mode == "train" else set()
        )
        assert set(ops) == expected | backward <= set(OPS)
        assert 0 < sum(ops.values()) <= total


@pytest.mark.mpi
def test_costs_are_measured_on_all_ranks_and_written(comm, shared):
    path = str(shared / "costs.json")
    config = make_config(model__hidden=16, data__batch_sequences=24 * comm.size, cluster__measure_seconds=0.2)
    costs = measure_costs(comm, config, path, seconds=0.2)
    assert costs == read_costs(path)
    assert costs.tokens == (5, 40) and set(costs.ops) == set(OPS) and costs.is_measured
    assert costs.conditions.num_experts == max(-(-4 // comm.size), 2)
    assert costs.source["ranks"] == str(comm.size) and costs.source["threads_per_rank"] == "1"
    for op in LAYER_OPS:
        assert costs.ops[op].seconds(40) > 0
        assert costs.ops[op].low <= 1 <= costs.ops[op].high


@pytest.mark.mpi
def test_a_model_of_transformers_is_not_measured(comm, shared):
    config = make_config(model__source="hf", model__path="x")
    with pytest.raises(ConfigError, match=r'\[model\] source = "hf": --measure measures the network of "own"'):
        measure_costs(comm, config, str(shared / "costs.json"))


def test_two_sizes_are_measured_that_differ():
    config = make_config(pipeline__micro_batches=2)
    for sequences, ranks, sizes in ((64, 2, (2, 16)), (64, 16, (1, 2)), (2, 4, (1, 2)), (64, 1, (4, 32))):
        data = dataclasses.replace(config.data, batch_sequences=sequences)
        assert choose_micro_batches(dataclasses.replace(config, data=data), ranks) == sizes


def test_slow_steps_are_fewer():
    assert [is_enough(*case, 10.0) for case in ((1, 99.0), (2, 19.0), (2, 20.0), (7, 15.0))] == [
        False,
        False,
        True,
        False,
    ]
    assert [is_enough(*case, 10.0) for case in ((8, 9.0), (8, 10.0), (200, 1.0))] == [False, True, True]


@pytest.mark.mpi
def test_a_lone_rank_has_its_part_of_the_experts(comm, shared):
    changes = {"model__num_experts": 16, "model__num_layers": 5, "parallel__expert": comm.size}
    with open_small_job(comm, shared, **changes) as (job, _, _):
        alone = make_lone_config(job.config, comm, job.topology, 3)
    assert alone.model.num_experts == -(-16 // comm.size) and alone.model.num_layers == 2
    assert alone.data.batch_sequences == 3 * alone.pipeline.micro_batches and alone.run.threads_per_rank == 1
