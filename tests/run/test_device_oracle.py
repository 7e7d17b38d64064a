"""The GPUs' way of the rows, whole, on a stand-in that watches its order: losses and gradients equal the oracle's."""

import contextlib
import threading

import numpy as np
import oracle
import pytest
import torch
from against_oracle import check_against_oracle, whole_batches
from covering import table, usually
from moves import MOVES, assert_near, run_steps
from mpi4py import MPI
from small import BY_BACKEND, gather_logical, open_small_job
from standin import Order, Stream, watch_job

from hpcmoe.comm.all_to_all import MpiRequest
from hpcmoe.comm.reduce import HostReducer
from hpcmoe.run.gradient_sums import GradientSums

CASES = {
    "plain": {},
    "serial": {"pipeline__schedule": "serial"},
    "three in flight": {"pipeline__in_flight": 3},
    "gated, biases": {"model__num_experts": 7, "experts__kind": "swiglu", "experts__bias": True},
    "ranks without tokens, one expert": {
        "data__batch_sequences": 2, "pipeline__micro_batches": 2, "model__num_experts": 1, "model__top_k": 1
    },
    "capacity": {"dispatch__capacity_factor": 0.5},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 3},
}  # fmt: skip


@pytest.fixture
def others(comm):
    """Skip on one rank, which sends nothing."""
    if comm.size == 1:
        pytest.skip("needs another rank")


def step(comm, shared, monkeypatch, way, **changes):
    """One step on the stand-in against the oracle -> its Order. Staged messages have several small pieces."""
    monkeypatch.setattr("hpcmoe.comm.staging._PIECE_BYTES", 200)
    with watch_way(comm, monkeypatch, way) as order:
        check_against_oracle(comm, shared, **BY_BACKEND[way] | changes)
    assert order.num_checked > 0
    return order


def watch_way(comm, monkeypatch, way):
    """Have jobs run on a stand-in that has what a way needs -> its Order, in a with-block."""
    gpu, nccl = (f"gpu{comm.rank}", comm) if way == "nccl" else (None, None)
    return watch_job(monkeypatch, gpu, nccl)


@pytest.mark.mpi
def test_the_thread_that_progresses_messages_makes_the_device_its_own(comm, shared, monkeypatch):
    entered = step(comm, shared, monkeypatch, "staged").entered
    assert threading.current_thread() not in entered and bool(entered) == (MPI.Query_thread() == MPI.THREAD_MULTIPLE)


@pytest.mark.mpi
@pytest.mark.parametrize(("way", "case"), table(BY_BACKEND, CASES, also=[("staged", "plain"), ("nccl", "plain")]))
def test_step_equals_the_oracle(comm, shared, monkeypatch, way, case):
    if comm.size == 1 and case != "plain":
        pytest.skip("one rank sends nothing")
    order = step(comm, shared, monkeypatch, way, **CASES[case])
    assert order.races == []
    if way == "nccl":
        assert order.nccl.num_groups >= 4 * 2 and order.nccl.ended == ["destroyed"] * (2 if comm.size > 1 else 1)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_lanes_may_start_in_any_order(comm, shared, monkeypatch, way):
    changes = {"pipeline__schedule": "arrival", "pipeline__deterministic": False}
    assert step(comm, shared, monkeypatch, way, **changes).races == []


SHAPES = {
    "biases": {"experts__bias": True},
    "gated, dropped": {"experts__kind": "swiglu", "dispatch__capacity_factor": 0.5},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 3},
}


@pytest.mark.mpi
@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("way", "case"), table(BY_BACKEND, SHAPES))
def test_copies_go_to_all_shards_of_their_expert(comm, shared, monkeypatch, way, case):
    shards = next((n for n in (2, 3) if comm.size % n == 0), 1)
    changes = {"parallel__tensor": shards} | SHAPES[case]
    assert step(comm, shared, monkeypatch, way, **changes).races == []


@pytest.mark.mpi
@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("way", "inside"), table(["staged", "nccl"], ["shards", "copies"]))
def test_gradients_of_data_parallel_groups_are_summed(comm, shared, monkeypatch, way, inside):
    """Each group with shards of its experts, or with copies, where there are ranks for it."""
    shares = next((n for n in (2, 3) if comm.size % n == 0), 1)
    within = {"parallel__tensor": 2 if comm.size == 4 else 1} if inside == "shards" else CASES["replicas"]
    assert step(comm, shared, monkeypatch, way, parallel__data=shares, **within).races == []


@pytest.mark.mpi
@pytest.mark.parametrize("bucket_bytes", [0, 200, 4_000_000])
def test_nccl_sums_during_the_backward_pass(comm, shared, monkeypatch, bucket_bytes):
    """As many sums of dense gradients as parts have whole buckets, and none before the end without one."""
    early, finish = [], GradientSums.finish
    monkeypatch.setattr(GradientSums, "finish", lambda sums: (early.append(len(sums.waiting)), finish(sums)))
    order = step(comm, shared, monkeypatch, "nccl", train__bucket_bytes=bucket_bytes, **CASES["replicas"])
    assert order.races == []
    assert early == [0 if bucket_bytes else 6]  # head, two layers' dense parts and experts, embedding
    sums = [count for size, count in order.nccl.sums if size == comm.size > 1]
    assert len(sums) == {0: 1, 200: 4, 4_000_000: 1}[bucket_bytes] * (comm.size > 1)


@pytest.mark.mpi
@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("way", usually(["staged", "nccl"], "staged"))
def test_experts_that_move_leave_the_training_as_it_was(comm, shared, monkeypatch, way):
    changes = MOVES | BY_BACKEND[way] | {"model__num_experts": 5, "experts__kind": "swiglu", "experts__bias": True}
    with watch_way(comm, monkeypatch, way) as order:
        stays, moves = (run_steps(comm, shared, after, **changes) for after in ((), (1, 3)))
    assert order.races == [] and order.num_checked > 0
    assert_near(stays, moves)  # where a row lies among all experts' may decide its last bits


@pytest.mark.mpi
@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("way", usually(["staged", "nccl"], "nccl"))
def test_a_sharded_optimizer_trains_as_a_whole_one(comm, shared, monkeypatch, way):
    with watch_way(comm, monkeypatch, way) as order:
        changes = {"steps": 2} | BY_BACKEND[way]
        whole, sharded = (run_steps(comm, shared, **changes, train__shard_optimizer=shard) for shard in (False, True))
    assert order.races == []
    assert_near(whole[::2], sharded[::2])  # not the gradients, in whose place rows are gathered


@pytest.mark.mpi
def test_bfloat16_is_near_the_oracle_by_grouped_gemms(comm, shared, monkeypatch):
    """Loss and gradients of one layer, whose router sees float32: in a second one near ties would go another way."""
    shapes = {"model__hidden": 16, "model__feed_forward": 32, "model__dtype": "bfloat16", "model__num_experts": 8,
              "model__num_layers": 1, "model__attention": False}  # fmt: skip
    with (
        watch_job(monkeypatch) as order,
        open_small_job(comm, shared, **shapes, **BY_BACKEND["staged"]) as (job, optimizer, state),
    ):
        load = np.ones((1, 8))
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        starts, batches, groups = whole_batches(job, 1)
        optimizer.zero_gradients()
        outcome = job.stepper.run(job.training, starts, load, "train")
        again = job.stepper.run(job.training, starts, load, "evaluate")
        optimizer.sums.finish()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        total, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        total.backward()
    assert order.races == [] and outcome.loss == again.loss == pytest.approx(entropy.item(), rel=1e-2)
    for name, weight in weights.items():
        assert (gradients[name] - weight.grad).norm() <= 1e-2 * weight.grad.norm(), name


EARLY = "compute reads what send has not been seen to write"
RAW = "send reads what compute has not been seen to write"
UNSUMMED = "compute reads what receive has not been seen to write"
UNFINISHED = "receive writes what compute has not been seen to write"
STREAMS = ("compute", "send", "receive")
NEEDED = {  # what comes of it when one of these streams does not wait; own rows go by the send stream
    "direct": {EARLY: {"compute"}},
    "staged": {EARLY: {"compute", "receive"}},
    "nccl": {EARLY: {"compute"}, RAW: {"send"}, UNSUMMED: {"compute"}, UNFINISHED: {"receive"}},
}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("way", "deaf"), table(BY_BACKEND, ["nobody", *STREAMS], also=[("nccl", deaf) for deaf in STREAMS])
)
def test_a_stream_that_does_not_wait_is_caught(comm, shared, monkeypatch, way, deaf):
    """The watch itself, and that each wait is needed, when streams know of nothing by what the host happens to know."""
    wait = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: self.name != deaf and wait(self, event))
    monkeypatch.setattr(Order, "clock_at_launch", lambda self: {"host": self.clocks["host"]["host"]})
    races = step(comm, shared, monkeypatch, way).races
    for race, waiting in NEEDED[way].items():
        if comm.size > 1 or race not in (UNSUMMED, UNFINISHED):  # one rank sums nothing
            assert (race in races) == (deaf in waiting), race


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_who_begins_before_the_rows_are_packed_is_caught(comm, shared, monkeypatch, way):
    monkeypatch.setattr(MpiRequest, "may_begin", lambda self: not self.begun)
    wait = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: self.name == "compute" and wait(self, event))
    assert step(comm, shared, monkeypatch, way).races


@pytest.mark.mpi
def test_mpi_sums_in_the_hosts_memory_one_part_after_the_other(comm, shared, monkeypatch, others):
    lend, lent = HostReducer.open_for_sums, []

    @contextlib.contextmanager
    def count(reducer, flat):
        lent.append(1)
        with lend(reducer, flat) as numbers:
            yield numbers
        lent.append(-1)

    monkeypatch.setattr(HostReducer, "open_for_sums", count)
    step(comm, shared, monkeypatch, "staged", train__bucket_bytes=200, **CASES["replicas"])
    assert lent == [1, -1] * (len(lent) // 2) and len(lent) > 4
