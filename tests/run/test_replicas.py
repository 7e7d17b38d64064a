"""A bit that flips in one replica of what several ranks hold is found, and the run ends with a line that names it."""

import numpy as np
import pytest
import torch
from launch import ROOT, mpirun
from small import open_small_job

from hpcmoe.errors import TrainingError
from hpcmoe.run.replicas import NOT_HELD, check_shared_parameters, describe_ranks, digest
from hpcmoe.wait import gather_to_all

COPIES = {
    "model__num_experts": 2, "placement__replicate": True, "placement__spare_slots_per_rank": 1,
    "placement__method": "contiguous",
}  # fmt: skip


def flip(parameter):
    """Flip the lowest bit of a parameter's last number."""
    parameter.data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)


def check(job, optimizer):
    check_shared_parameters(job.stepper.network, optimizer.shared, job.mesh, 7)


@pytest.mark.mpi
def test_copies_that_train_together_stay_alike(comm, shared):
    changes = COPIES | {"parallel__data": 2 - comm.size % 2}
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        for number in range(1, 5):
            optimizer.zero_gradients()
            job.stepper.run(job.training, np.arange(14) * number, np.ones((2, 2)), "train")
            optimizer.step(number)
            check(job, optimizer)


@pytest.mark.mpi
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_an_expert_of_which_one_copy_differs_is_named_with_layer_and_ranks(comm, shared, tensor_parallel):
    if comm.size % tensor_parallel:
        pytest.skip("does not fit this number of ranks")
    changes = COPIES | {"parallel__tensor": tensor_parallel}
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        of_ranks = gather_to_all(comm, [(c.layer, c.expert) for c in optimizer.shared.held_replicas()])
        holders = [rank for rank in range(tensor_parallel - 1, comm.size, tensor_parallel) if (1, 0) in of_ranks[rank]]
        if comm.rank == holders[-1]:
            (held,) = (c for c in optimizer.shared.held_replicas() if (c.layer, c.expert) == (1, 0))
            flip(job.stepper.network.layers[1].experts.local.replicas[held.slot].down)
        if len(holders) == 1:
            check(job, optimizer)
            return
        with pytest.raises(TrainingError, match="step 7: copies of expert 0 of layer 1") as caught:
            check(job, optimizer)
    assert caught.value.shared
    line = str(caught.value)
    assert ("(shard 1 of 2) differ" in line) == (tensor_parallel == 2) and "\n" not in line
    if len(holders) > 2:
        others = ", ".join(map(str, holders[:-1]))
        assert line.endswith(f"rank {holders[-1]} not as ranks {others}")


@pytest.mark.mpi
def test_dense_parts_that_differ_are_named(comm, shared):
    with open_small_job(comm, shared) as (job, optimizer, _):
        network = job.stepper.network
        if comm.rank == comm.size - 1:
            flip(network.positions)
            flip(network.layers[1].router.weight)
        if comm.size == 1:
            check(job, optimizer)
            return
        with pytest.raises(TrainingError) as caught:
            check(job, optimizer)
    first, second = str(caught.value).splitlines()
    assert "copies of the dense parts of layer 1 differ" in first and "copies of the embedding differ" in second


def test_the_ranks_that_hold_what_few_hold_are_the_odd_ones():
    assert describe_ranks(np.array([5, 5, 9, NOT_HELD, 5])) == "rank 2 not as ranks 0, 1, 4"
    assert describe_ranks(np.arange(12) // 11).startswith("rank 11 not as ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more")


def test_a_digest_is_that_of_the_bits():
    zero, minus = torch.zeros(3), -torch.zeros(3)
    assert digest([zero]) == digest([torch.zeros(3)]) != digest([minus]) and digest([zero]) > NOT_HELD + 1
    assert digest([zero.bfloat16().float(), minus]) == digest([torch.cat([zero, minus])])


FLIP = """
import hpcmoe.main, hpcmoe.run.train as train, torch
from mpi4py import MPI
step_as_usual = train.train_step

def step_and_flip(job, optimizer, load, step):
    if step == 3 and MPI.COMM_WORLD.rank == 1:
        first = job.stepper.network.head_weight.data.view(-1)[:1]
        first.view(torch.int32).bitwise_xor_(1 << 20)  # AdamW rounds a lower bit away
    return step_as_usual(job, optimizer, load, step)

train.train_step = step_and_flip
hpcmoe.main.main()
"""


def test_a_run_whose_copies_come_apart_is_stopped(tmp_path):
    (tmp_path / "flip.py").write_text(FLIP)
    settings = [
        "run.steps=4",
        "model.sequence_length=32",
        "data.batch_sequences=16",
        "cluster.measure_seconds=0.2",
        f"run.output={tmp_path}",
        "train.check_every=2",
        "train.validate_every=0",
    ]
    arguments = [word for setting in settings for word in ("--set", setting)]
    command = tmp_path / "flip.py", ROOT / "inputs/run.toml", *arguments
    ended = mpirun(3, *command, PYTHONPATH=str(ROOT))
    assert ended.status == 2, ended
    assert ended.lines("hpcmoe: step 4: copies of the head differ: rank 1 not as ranks 0, 2"), ended
