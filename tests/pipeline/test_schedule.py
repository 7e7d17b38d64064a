"""A schedule does every stage of every layer and micro-batch once, each after what it needs, few at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.pipeline.schedule import Op, make_schedule

sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.booleans())
UP, DOWN = ["route", "dispatch", "compute", "combine"], ["combine_backward", "compute_backward", "route_backward"]


def path_of(micro_batch, num_layers, training):
    """What one micro-batch must go through, in this order."""
    up = [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in UP]
    down = [Op(stage, layer, micro_batch) for layer in range(num_layers - 1, -1, -1) for stage in DOWN]
    path = [Op("embed", 0, micro_batch), *up, Op("head", 0, micro_batch)]
    return [*path, *down, Op("embed_backward", 0, micro_batch)] if training else path


@given(sizes)
def test_every_micro_batch_goes_through_all_its_stages_in_order(sizes):
    num_layers, num_micro_batches, in_flight, training = sizes
    schedule = make_schedule(*sizes)
    assert {op.micro_batch for op in schedule} == set(range(num_micro_batches))
    for micro_batch in range(num_micro_batches):
        own = [op for op in schedule if op.micro_batch == micro_batch]
        assert own == path_of(micro_batch, num_layers, training)


@given(sizes)
def test_no_more_micro_batches_are_open_than_may_be_and_each_has_its_own_berth(sizes):
    _, _, in_flight, _ = sizes
    schedule = make_schedule(*sizes)
    last = {op.micro_batch: index for index, op in enumerate(schedule)}
    is_open = set()
    for index, op in enumerate(schedule):
        is_open.add(op.micro_batch)
        assert len({micro_batch % in_flight for micro_batch in is_open}) == len(is_open) <= in_flight
        if last[op.micro_batch] == index:
            is_open.remove(op.micro_batch)


@pytest.mark.parametrize("training", [True, False])
def test_one_in_flight_is_serial(training):
    schedule = make_schedule(2, 3, 1, training)
    assert list(schedule) == [op for micro_batch in range(3) for op in path_of(micro_batch, 2, training)]


def test_micro_batches_in_flight_take_turns():
    """Between a stage that starts a transfer and the one that needs it, the other computes."""
    schedule = make_schedule(1, 2, 2, False)
    assert [(op.stage, op.micro_batch) for op in schedule] == [
        (stage, micro_batch) for stage in ["embed", *UP, "head"] for micro_batch in (0, 1)
    ]
