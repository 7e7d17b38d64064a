"""Messages of different exchanges, parts and parcels never match."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.comm.transport import Direction, Loopback, Part, make_part_tag, make_tag


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_tags_of_different_messages_differ_and_none_is_left_out(num_layers, num_micro_batches, max_parcels):
    exchanges = itertools.product(range(num_layers), range(num_micro_batches), Direction)
    tags = [
        make_part_tag(make_tag(layer, micro, num_micro_batches, direction), part, parcel, max_parcels)
        for layer, micro, direction in exchanges
        for part, parcel in itertools.product(Part, range(max_parcels))
    ]
    assert sorted(tags) == list(range(num_layers * num_micro_batches * 4 * 3 * max_parcels))


def test_a_group_on_one_node_has_nothing_under_way():
    assert not Loopback(2, 4).poke() and (Loopback(2, 4).rank, Loopback(2, 4).size) == (2, 4)
