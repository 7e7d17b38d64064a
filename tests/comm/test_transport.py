"""Messages of different exchanges, parts and messages never match."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.comm.transport import Direction, Loopback, MessageKind, count_tags, make_message_tag, make_tag


@given(st.integers(1, 4), st.integers(1, 5))
def test_tags_of_different_messages_differ_and_none_is_left_out(num_micro_batches, max_messages):
    tags = [
        make_message_tag(make_tag(micro_batch, direction), part, message, max_messages)
        for micro_batch, direction in itertools.product(range(num_micro_batches), Direction)
        for part, message in itertools.product(MessageKind, range(max_messages))
    ]
    assert sorted(tags) == list(range(count_tags(num_micro_batches, max_messages)))


def test_a_group_on_one_node_has_nothing_under_way():
    assert not Loopback(2, 4).poke() and (Loopback(2, 4).rank, Loopback(2, 4).size) == (2, 4)
