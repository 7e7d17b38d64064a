"""The GPUs' way of the rows, whole, on a stand-in that watches its order: losses and gradients equal the oracle's."""

import pytest
from against_oracle import check_against_oracle
from standin import Stream, watch_job

WAYS = {
    "direct": {"comm__transport": "mpi", "comm__buffers": "direct"},
    "staged": {"comm__transport": "mpi", "comm__buffers": "staged"},
    "nccl": {"comm__transport": "nccl"},
}
CASES = {
    "plain": {},
    "serial": {"pipeline__schedule": "serial"},
    "three in flight": {"pipeline__in_flight": 3},
    "gated, biases": {"model__num_experts": 7, "experts__kind": "swiglu", "experts__bias": True},
    "ranks without tokens, one expert": {
        "data__batch_sequences": 2, "pipeline__micro_batches": 2, "model__num_experts": 1, "model__top_k": 1
    },
    "capacity": {"dispatch__capacity_factor": 0.5},
    "replicas": {"cluster__replicate": True, "cluster__spare_slots_per_rank": 1, "model__num_experts": 3},
}  # fmt: skip


def step(comm, shared, monkeypatch, way, **changes):
    """One step on the stand-in against the oracle -> its Order. Staged messages have several small pieces."""
    monkeypatch.setattr("hpcmoe.comm.staging.PIECE_BYTES", 200)
    gpu, nccl = (f"gpu{comm.rank}", comm) if way == "nccl" else (None, None)
    with watch_job(monkeypatch, gpu, nccl) as order:
        check_against_oracle(comm, shared, **WAYS[way] | changes)
    assert order.num_checked > 0
    return order


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_step_equals_the_oracle(comm, shared, monkeypatch, way, case):
    order = step(comm, shared, monkeypatch, way, **CASES[case])
    assert order.races == []
    if way == "nccl":
        assert order.nccl.num_groups >= 4 * 2 and set(order.nccl.ended) == {"destroyed"}


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_lanes_may_start_in_any_order(comm, shared, monkeypatch, way):
    changes = {"pipeline__schedule": "arrival", "pipeline__deterministic": False}
    assert step(comm, shared, monkeypatch, way, **changes).races == []


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deaf", ["compute", "send", "receive"])
def test_a_stream_that_does_not_wait_is_caught(comm, shared, monkeypatch, way, deaf):
    """The watch itself, and that each wait is needed. What the host has waited for, every later launch knows."""
    wait = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: self.name != deaf and wait(self, event))
    races = step(comm, shared, monkeypatch, way).races
    if deaf in {"direct": (), "staged": ("compute", "receive"), "nccl": ("compute", "send")}[way]:
        assert races
    elif (way, deaf) != ("direct", "compute"):  # which waits for what this rank sends itself, if the host has not
        assert races == []


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_who_begins_before_the_rows_are_packed_is_caught(comm, shared, monkeypatch, way):
    for module in ("carrier", "staging"):
        monkeypatch.setattr(f"hpcmoe.comm.{module}.may_begin", lambda pending: True)
    wait = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: self.name == "compute" and wait(self, event))
    assert step(comm, shared, monkeypatch, way).races
