"""On GPUs, several ranks on one if need be: a step equals the oracle by every way that this machine has."""

import math

import numpy as np
import oracle
import pytest
import torch
from against_oracle import check_against_oracle, whole_batches
from moves import MOVES, assert_near, run_steps
from small import BY_BACKEND, gather_logical, open_small_job

from hpcmoe.comm.device import open_device
from hpcmoe.comm.select import find_obstacles, read_transport_support
from hpcmoe.comm.self_test import run_self_test
from hpcmoe.wait import gather_to_all

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]
HOST = {"comm__device": "host", "comm__shared_memory": False}  # an MPI told to let UCX carry all has no such memory
CASES = {
    "plain": {},
    "serial": {"pipeline__schedule": "serial"},
    "gated, biases, seven experts": {
        "model__num_experts": 7, "experts__kind": "swiglu", "experts__bias": True
    },
    "ranks without tokens": {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "capacity": {"dispatch__capacity_factor": 0.5},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 3},
    "one expert": {"model__num_experts": 1, "model__top_k": 1},
    "small buckets": {"train__bucket_bytes": 200},
}  # fmt: skip


@pytest.fixture(params=BY_BACKEND)
def way(comm, request):
    """The keys of a way that these ranks have, and its name."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    support_of_rank = gather_to_all(comm, read_transport_support(comm, open_device("cuda", comm.rank)))
    why_not = find_obstacles(support_of_rank)[request.param]
    if why_not:
        pytest.skip(why_not)
    return request.param, {"comm__device": "cuda"} | BY_BACKEND[request.param]


def test_rows_come_whole(comm, way):
    kind, _ = way
    assert run_self_test(kind, comm, open_device("cuda", comm.rank)) > 0


@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_oracle(comm, shared, way, case):
    check_against_oracle(comm, shared, **way[1] | CASES[case])


def test_tensor_and_data_parallel_equal_the_oracle(comm, shared, way):
    if comm.size < 4:
        pytest.skip("needs 4 ranks")
    check_against_oracle(comm, shared, parallel__tensor=2, parallel__data=2, **way[1])


def test_data_parallel_groups_with_copies_equal_the_oracle(comm, shared, way):
    if comm.size < 4:
        pytest.skip("needs 4 ranks")
    check_against_oracle(comm, shared, parallel__data=2, **way[1] | CASES["replicas"])


@pytest.mark.parametrize("changes", [{"train__shard_optimizer": True}, MOVES | {"moves_after": (1,)}])
def test_steps_are_those_of_the_host(comm, shared, way, changes):
    """With an optimizer in shards, and with experts that move after the first step."""
    usual = {"steps": 2, "model__num_experts": 5}
    assert_near(*(run_steps(comm, shared, **usual | keys)[::2] for keys in (MOVES | HOST, way[1] | changes)))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_bfloat16_is_within_a_hundredth(comm, shared, way, kind):
    """Loss and gradients of one layer, whose router sees float32: in a second one near ties would go another way."""
    shapes = {"model__hidden": 16, "model__feed_forward": 32, "model__dtype": "bfloat16", "experts__kind": kind,
              "model__num_layers": 1, "model__attention": False, "model__num_experts": 8}  # fmt: skip
    with open_small_job(comm, shared, **shapes, **way[1]) as (job, optimizer, state):
        load = np.ones((1, 8))
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        starts, batches, groups = whole_batches(job, 1)
        optimizer.zero_gradients()
        outcome = job.stepper.run(job.training, starts, load, "train")
        optimizer.sums.finish()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        total, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        total.backward()
    assert math.isclose(outcome.loss, entropy.item(), rel_tol=1e-2)
    for name, weight in weights.items():
        difference = (gradients[name] - weight.grad).norm() / weight.grad.norm()
        assert difference <= 1e-2, name


def test_a_layer_in_bfloat16_is_within_a_hundredth_of_float32(comm, shared, way):
    """The same tokens and weights by float32 on the host's formula: outputs of the last layer."""
    shapes = {"model__hidden": 16, "model__feed_forward": 32, "model__num_layers": 1, "model__attention": False}
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        changes = shapes | {"model__dtype": dtype, "run__mode": "infer"} | way[1]
        with open_small_job(comm, shared, **changes) as (job, _, _):
            starts, _, _ = whole_batches(job, 1)
            job.stepper.run(job.training, starts, np.ones((1, 4)), "infer", (0,))
            outputs[dtype] = job.stepper.network.take_activations()["layer0/output"]
    difference = np.linalg.norm(outputs["bfloat16"] - outputs["float32"])
    assert difference <= 1e-2 * np.linalg.norm(outputs["float32"])


def test_the_memory_of_the_gpus_is_in_the_topology_and_bounds_the_placement(comm, shared, way):
    with open_small_job(comm, shared, **way[1]) as (job, _, _):
        assert job.budget.what == "GPU memory" and job.topology.device_memory_bytes.sum() > 0
        assert (job.budget.node_bytes <= job.topology.device_memory_bytes + 1).all()
