"""Experts are shared by as few ranks as their memory needs, and the arithmetic is logged."""

import dataclasses
import logging

import numpy as np
import pytest
from small import make_config, make_topology

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.model.shapes import count_dense_parameters
from hpcmoe.prepare.shards import choose_tensor_parallel, resolve_tensor_parallel

EXPERT = 2 * 8 * 12 * 4 * 4  # bytes of an expert with gradients and moments: two matrices 8 x 12 in float32
DENSE = count_dense_parameters(make_config().model) * 4 * 4


@pytest.mark.parametrize(
    ("budget", "parallel", "chosen"),
    [
        (EXPERT, {}, 1),
        (EXPERT - 1, {}, 2),
        (EXPERT // 2, {}, 2),
        (EXPERT // 2 - 1, {}, 4),  # three would be enough, but do not divide eight ranks
        (EXPERT // 4 - 1, {}, 1),  # eight do not divide feed_forward 12
        (EXPERT // 2 - 1, {"parallel__data": 4}, 1),  # only two are left
        (EXPERT - 1, {"parallel__expert": 2}, 4),  # what the other two leave
    ],
)
def test_as_few_ranks_share_an_expert_as_it_needs(budget, parallel, chosen):
    config = make_config(parallel__tensor=0, **parallel)
    number, arithmetic = choose_tensor_parallel(config.parallel, config.spec, 8, DENSE + budget)
    assert number == chosen
    assert arithmetic.startswith("an expert with its state takes 3.07 kB, a rank has ")
    assert arithmetic.endswith("does not suffice") == (budget < EXPERT / chosen)


def test_inference_needs_parameters_alone():
    config = make_config(run__mode="infer", model__dtype="bfloat16")
    assert choose_tensor_parallel(config.parallel, config.spec, 2, DENSE // 4 + EXPERT // 8)[0] == 1
    assert choose_tensor_parallel(config.parallel, config.spec, 2, DENSE // 4 + EXPERT // 8 - 1)[0] == 2


@pytest.mark.mpi
def test_the_mesh_takes_what_was_chosen_and_the_log_tells_why(comm, caplog):
    memory_bytes = np.array([comm.size * (DENSE + EXPERT // 2)])
    topology = dataclasses.replace(make_topology(comm.size), memory_bytes=memory_bytes)
    fitting = [number for number in range(2, comm.size + 1) if comm.size % number == 0 and 12 % number == 0]
    config = make_config()
    with caplog.at_level(logging.INFO):
        parallel = resolve_tensor_parallel(comm, config.parallel, config.spec, topology, "host")
    assert parallel.tensor == min(fitting, default=1)
    assert caplog.messages[0].endswith(f": [parallel] tensor = {fitting[0]}" if fitting else "does not suffice")
    with open_mesh(comm, parallel) as mesh:
        assert mesh.tensor_parallel * mesh.expert_parallel == comm.size
    given = make_config(parallel__tensor=7)
    assert resolve_tensor_parallel(comm, given.parallel, given.spec, topology, "host") is given.parallel
