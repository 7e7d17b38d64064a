"""Tags: few, whatever the layers and experts; a run that needs more than MPI has is rejected with the arithmetic."""

import pytest
import torch
from moves import MOVES, assert_near, run_steps

from hpcmoe.comm import mpi, reduce
from hpcmoe.dispatch.sizes import DeviceSizes, HostSizes
from hpcmoe.errors import ConfigError
from hpcmoe.prepare import sizes as ways

LEAST_TAG_UB = 32767  # that the standard guarantees


def make_sizes(**changes):
    """Sizes of a run between nodes: 1000 tokens of a micro-batch, in messages of 10."""
    fields = {
        "hidden": 8, "dtype": torch.float32, "tokens": 1000, "top_k": 2, "num_in_flight": 1, "num_micro_batches": 2,
        "expert_rows": 1000, "batch_rows": 100, "message_tokens": 10, "num_messages_sent": 100, "pool_rows": 1000,
        "messages_at_once": 1, "in_order": True, "deterministic": True,
    }  # fmt: skip
    return HostSizes(**fields | changes)


@pytest.mark.parametrize(
    ("max_tag", "changes", "num_layers", "error"),
    [
        (2399, {}, 60, None),  # 2 micro-batches x 4 directions x 3 parts x 100 messages
        (2398, {}, 60, r"micro_batches = 2, \[comm\] message_rows: 24 tags x 100 messages .* = 2400, .* has 2399 "),
        (7, {"num_messages_sent": 0}, 7, None),  # all ranks on one node
        (
            7,
            {"num_messages_sent": 0},
            8,
            r"\[model\] num_layers = 8: .* tags up to 8, this MPI's end at 7 \(MPI_TAG_UB\)",
        ),
        (LEAST_TAG_UB, {"num_micro_batches": 8, "tokens": 3410}, 60, None),
        (LEAST_TAG_UB, {"num_micro_batches": 8, "tokens": 3420}, 60, "96 tags x 342 messages .* = 32832"),
    ],
)
def test_a_run_that_needs_more_tags_than_mpi_has_is_rejected(monkeypatch, max_tag, changes, num_layers, error):
    monkeypatch.setattr(ways, "read_max_tag", lambda: max_tag)
    if error is None:
        ways.check_tags(make_sizes(**changes), num_layers)
    else:
        with pytest.raises(ConfigError, match=error):
            ways.check_tags(make_sizes(**changes), num_layers)


def test_between_gpus_a_transfer_is_one_message(monkeypatch):
    monkeypatch.setattr(ways, "read_max_tag", lambda: 23)
    fields = {name: getattr(make_sizes(), name) for name in ("hidden", "dtype", "tokens", "top_k", "num_in_flight")}
    sizes = DeviceSizes(**fields, num_micro_batches=2, expert_rows=1, batch_rows=1, buffer_factor=1.0)
    ways.check_tags(sizes, 2)
    monkeypatch.setattr(ways, "read_max_tag", lambda: 22)
    with pytest.raises(ConfigError, match="24 tags x 1 messages"):
        ways.check_tags(sizes, 2)


def test_this_mpi_has_as_many_as_the_standard_asks_for():
    assert mpi.read_max_tag() >= LEAST_TAG_UB


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["overlap", "arrival"])
def test_tags_grow_neither_with_experts_nor_with_the_layers_of_an_exchange(comm, shared, monkeypatch, schedule):
    """Copies of experts, moves in between, each rank a node of its own: the losses of one node, and few tags."""
    of_sums, of_rows = [], []

    class NotingReducer(reduce.HostReducer):
        def send_recv(self, outgoing, incoming):
            of_sums.extend(tag for tag, _, _ in [*outgoing, *incoming])
            return super().send_recv(outgoing, incoming)

    class NotingTransport(mpi.MpiTransport):
        def send_rows(self, rows, peer, tag):
            of_rows.append(tag)
            return super().send_rows(rows, peer, tag)

    monkeypatch.setattr(reduce, "HostReducer", NotingReducer)
    monkeypatch.setattr(mpi, "MpiTransport", NotingTransport)
    changes = MOVES | {"model__num_experts": 5, "model__num_layers": 4, "placement__replicate": True}
    changes |= {"placement__spare_slots_per_rank": 1, "pipeline__in_flight": 3, "pipeline__schedule": schedule}
    expected = run_steps(comm, shared, (1, 2), **changes)
    assert of_rows == []
    apart = run_steps(comm, shared, (1, 2), comm__shared_memory=False, comm__message_rows=4, **changes)
    assert_near(expected, apart)
    if comm.size > 1:
        assert set(of_sums) <= set(range(1, 5)) and 0 < max(of_rows) < 3 * 4 * 3 * 9  # of 25 tokens and fewer
