"""A schedule does every stage of every layer and micro-batch once, each after what it needs, few at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.pipeline.schedule import BACKWARD, FORWARD, Op, make_schedule

KINDS = ["serial", "overlap", "arrival"]
sizes = st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.booleans())


def path_of(micro_batch, num_layers, training):
    """What one micro-batch must go through, in this order."""
    up = [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in FORWARD]
    down = [Op(stage, layer, micro_batch) for layer in range(num_layers - 1, -1, -1) for stage in BACKWARD]
    path = [Op("embed", 0, micro_batch), *up, Op("head", 0, micro_batch)]
    return [*path, *down, Op("embed_backward", 0, micro_batch)] if training else path


def lane_and_place(schedule):
    """Where each op stands -> dict op: (lane, place in it); each is there once."""
    places = {op: (lane, place) for lane, ops in enumerate(schedule) for place, op in enumerate(ops)}
    assert len(places) == sum(map(len, schedule))
    return places


@given(sizes)
def test_every_micro_batch_goes_through_all_its_stages_in_order_in_one_lane(sizes):
    _, num_layers, num_micro_batches, _, training = sizes
    places = lane_and_place(make_schedule(*sizes))
    paths = [path_of(micro_batch, num_layers, training) for micro_batch in range(num_micro_batches)]
    assert set(places) == {op for path in paths for op in path}
    for path in paths:
        lanes, order = zip(*(places[op] for op in path), strict=True)
        assert len(set(lanes)) == 1 and list(order) == sorted(order)


@given(sizes)
def test_each_micro_batch_in_flight_has_buffers_of_its_own_however_lanes_go_on(sizes):
    kind, _, num_micro_batches, in_flight, _ = sizes
    schedule = make_schedule(*sizes)
    num_in_flight = 1 if kind == "serial" else in_flight
    assert 1 <= len(schedule) <= (in_flight if kind == "arrival" else 1)
    in_flight_buffers = []
    for lane in schedule:
        last, is_open = {op.micro_batch: index for index, op in enumerate(lane)}, set()
        most = 0
        for index, op in enumerate(lane):
            is_open.add(op.micro_batch)
            assert len({micro_batch % num_in_flight for micro_batch in is_open}) == len(is_open)
            most = max(most, len(is_open))
            if last[op.micro_batch] == index:
                is_open.remove(op.micro_batch)
        assert most == (min(in_flight, num_micro_batches) if kind == "overlap" else 1)
        in_flight_buffers.append({op.micro_batch % num_in_flight for op in lane})
    assert sum(map(len, in_flight_buffers)) == len(set().union(*in_flight_buffers))  # no two lanes share one


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_overlapping_micro_batches_keep_at_most_one_stage_apart(num_layers, num_micro_batches, in_flight, training):
    (lane,) = make_schedule("overlap", num_layers, num_micro_batches, in_flight, training)
    passed = dict.fromkeys(range(num_micro_batches), 0)
    for op in lane:
        passed[op.micro_batch] += 1
        together = [m for m in passed if m // in_flight == op.micro_batch // in_flight]
        assert max(passed[m] for m in together) - min(passed[m] for m in together) <= 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_in_flight_is_serial(kind, training):
    (lane,) = make_schedule(kind, 2, 3, 1, training)
    assert list(lane) == [op for micro_batch in range(3) for op in path_of(micro_batch, 2, training)]


def test_micro_batches_in_flight_take_turns():
    """Between a stage that starts a transfer and the one that needs it, the other computes."""
    (lane,) = make_schedule("overlap", 1, 2, 2, False)
    assert [(op.stage, op.micro_batch) for op in lane] == [
        (stage, micro_batch) for stage in ["embed", *FORWARD, "head"] for micro_batch in (0, 1)
    ]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="backwards"):
        make_schedule("backwards", 1, 1, 1, True)
