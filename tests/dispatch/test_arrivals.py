"""Every row announced to a rank comes into exactly one batch, with a place for its result, in an order that is told."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small import make_dispatcher

from hpcmoe.comm.transport import Loopback
from hpcmoe.comm.window import Window, WindowSizes
from hpcmoe.dispatch.arrivals import Arrivals, make_batch
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.routes import make_routes

counts_of = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(0, 6))  # [n, s]


@given(counts_of, st.data())
def test_a_batch_holds_its_descriptors_rows_grouped_by_slot_and_descriptor(counts, data):
    starts = np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(counts), max_size=len(counts))))
    descriptors = [(number, 7) for number in range(len(counts))]
    batch = make_batch(descriptors, starts, counts)
    offsets = starts[:, None] + np.cumsum(counts, axis=1) - counts
    slowly = [
        (descriptor, offsets[descriptor, slot] + row)
        for slot in range(counts.shape[1])
        for descriptor in range(len(counts))
        for row in range(counts[descriptor, slot])
    ]  # fmt: skip
    assert list(zip(batch.descriptor_of_row, batch.offset_of_row, strict=True)) == slowly
    assert batch.rows_of_slot.tolist() == counts.sum(axis=0).tolist() and batch.descriptors == tuple(descriptors)


@given(counts_of, st.integers(1, 9))
def test_portions_take_every_row_once_and_are_about_so_long(counts, about):
    """Slots with few rows share chunks, none of which could have taken the next; of many, chunks are even."""
    batch, row = make_batch([(n, 0) for n in range(len(counts))], np.zeros(len(counts), np.int64), counts), 0
    slot_of_row = np.repeat(np.arange(counts.shape[1]), batch.rows_of_slot)
    chunks = list(batch.split(about))
    for part, slots in chunks:
        assert part.start == row <= part.stop and part.stop - row == sum(rows for _, rows in slots)
        assert slot_of_row[part].tolist() == [slot for slot, rows in slots for _ in range(rows)]
        assert part.stop - row <= max(1.5 * about, 1)
        row = part.stop
    assert row == counts.sum()

    for (before, slots), (_, others) in itertools.pairwise(chunks):
        (slot, _), (other, rows) = slots[-1], others[0]
        if slot == other:
            assert abs(before.stop - before.start - rows) <= 1
        elif all(round(batch.rows_of_slot[number] / about) <= 1 for number in (slot, other)):
            assert before.stop - before.start + rows > 1.5 * about


def test_apart_a_slots_portions_depend_on_its_own_rows_alone():
    alone, few, many = (make_batch([(0, 0)], [0], np.array([counts])) for counts in ([0, 7, 0], [2, 7, 1], [90, 7, 30]))
    for about in (5, 10, 200):
        sizes = [
            [rows for _, slots in batch.split(about, apart=True) for slot, rows in slots if slot == 1]
            for batch in (alone, few, many)
        ]
        assert sizes[0] == sizes[1] == sizes[2]
        assert all(len(slots) == 1 for _, slots in few.split(about, apart=True))


def make_windows(node_of_rank, rank, once, max_messages=3, num_slots=2):
    """A window that one process holds for all local peers of a rank, and the rank's Routes."""
    nodes = max(node_of_rank) + 1
    routes = make_routes(node_of_rank, rank, num_slots, np.full((nodes, nodes), once))
    sizes = WindowSizes(
        rows=50, row_bytes=8, num_in_flight=1, max_senders=routes.max_senders, max_messages=max_messages,
        num_slots=routes.num_places,
    )  # fmt: skip
    memory = np.zeros(sizes.num_bytes(len(routes.local_peers)), np.uint8)
    windows = [
        Window(sizes, len(routes.local_peers), local_peer, memory, lambda: None)
        for local_peer in range(len(routes.local_peers))
    ]
    return routes, windows


def make_arrivals(window, routes, exchange, word=0):
    """What is announced to a rank of these routes, which gives the others a word."""
    return Arrivals(window, routes, 0, exchange, Notices(word, len(routes.publishers)))


def announce(routes, windows, peer, number, num_descriptors, exchange, first, counts, word=0):
    """Do what the publisher of a peer's rows does."""
    descriptor = (
        0 if routes.inbound_index[peer] < 0 else 1 + routes.inbound_index[peer] * windows[0].sizes.max_messages + number
    )
    windows[routes.publishers[peer]].post(0, exchange, descriptor, (first, num_descriptors, word), counts)
    return int(routes.publishers[peer]), int(descriptor)


@pytest.mark.parametrize("once", [True, False])
def test_descriptors_are_seen_once_as_they_come_and_then_marked_as_taken(once):
    routes, windows = make_windows([0, 0, 1, 1, 1], 1, once)
    window = windows[routes.local_index]
    arrivals, rows = make_arrivals(window, routes, 4), {}
    assert arrivals.poll() == [] and len(arrivals.expected) == 5
    for peer in (3, 0, 4, 1, 2):
        counts = np.array([[1, 0], [peer, 2]]) if peer != 4 else np.zeros((2, 2), int)
        descriptor = announce(routes, windows, peer, 0, 3 if peer == 3 else int(peer != 4), 4, 100 * peer, counts)
        assert arrivals.poll() == ([descriptor] if peer != 4 else []) and arrivals.poll() == []
        rows[descriptor] = (100 * peer, 1, counts[1].tolist())
        assert window.consumed[routes.local_index, 0] == 0
    for number in (2, 1):  # those that follow the first of rank 3's, in any order
        descriptor = announce(routes, windows, 3, number, 1, 4, 300 + number, np.array([[0, 0], [0, 5]]))
        assert arrivals.poll() == [descriptor]
        rows[descriptor] = (300 + number, 0, [0, 5])
    assert window.consumed[routes.local_index, 0] == 4 and len(arrivals.expected) == 0
    for descriptor, (first, start, counts) in rows.items():
        assert arrivals.seen[descriptor][:2] == (first, start if sum(counts) else 0) or not sum(counts)
        if sum(counts):
            batch = arrivals.build_batch([descriptor])
            assert arrivals.find_rows(batch).tolist() == list(range(first + start, first + start + sum(counts)))


def test_an_earlier_exchanges_descriptors_are_not_taken_for_this_ones():
    routes, windows = make_windows([0, 0], 0, False)
    for peer in (0, 1):
        announce(routes, windows, peer, 0, 1, 2, 0, np.ones((2, 2), int))
    assert make_arrivals(windows[0], routes, 4).poll() == []
    assert make_arrivals(windows[0], routes, 3).poll() == []
    assert make_arrivals(windows[0], routes, 2).poll() == [(0, 0), (1, 0)]


def test_rows_are_found_where_they_lie_this_time():
    """The way back has the same plans, but messages land elsewhere."""
    routes, windows = make_windows([0, 1], 0, False)
    batches = []
    for exchange, first in ((1, 20), (2, 33)):
        arrivals = make_arrivals(windows[0], routes, exchange)
        descriptor = announce(routes, windows, 1, 0, 1, exchange, first, np.array([[2, 1]]))
        assert not batches or not arrivals.has(batches[0])
        arrivals.poll()
        batches.append(arrivals.build_batch([descriptor]))
        assert arrivals.has(batches[0])
        assert arrivals.find_rows(batches[0]).tolist() == [first, first + 1, first + 2]
        assert not windows[0].done.any() or exchange == 2
        arrivals.finish(batches[-1])
        assert windows[0].done[0, 0][descriptor] == exchange


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_groups_hold_no_more_messages_than_find_room_and_are_the_same_for_all_local_peers(at_once):
    node_of_rank, groups_of_peer = [0, 0, 1, 1, 1], []
    for rank in (0, 1):
        routes, windows = make_windows(node_of_rank, rank, True)
        arrivals, peers = make_arrivals(windows[rank], routes, 1), [2, 3, 4]
        groups = arrivals.read_in_order(peers, at_once)
        assert next(groups) is None
        for peer, num_descriptors in ((4, 3), (3, 0), (2, 2)):
            for number in range(max(num_descriptors, 1)):
                counts = np.array([[1, 0], [0, number % 2]]) if num_descriptors else np.zeros((2, 2), int)
                announce(routes, windows, peer, number, num_descriptors if number == 0 else 1, 1, 0, counts)
        arrivals.poll()
        arrivals.poll()
        groups_of_peer.append(list(groups))
        everyone = [descriptor for group in groups_of_peer[-1] for descriptor in group]
        expected = [
            arrivals.find_descriptors(peer, number)
            for peer, count in ((2, 2), (3, 0), (4, 3))
            for number in range(count)
        ]
        assert everyone == [descriptor for descriptor in expected if arrivals.seen[descriptor][2].any()]
        for group in groups_of_peer[-1]:
            publishers = [publisher for publisher, _ in group]
            assert all(publishers.count(publisher) <= at_once for publisher in publishers)
    assert len(groups_of_peer[0]) == len(groups_of_peer[1])


def test_groups_go_on_only_as_far_as_descriptors_are_there():
    routes, windows = make_windows([0, 0, 1], 0, False)
    arrivals = make_arrivals(windows[0], routes, 1)
    groups = arrivals.read_in_order([1, 2], 1)
    announce(routes, windows, 2, 0, 2, 1, 0, np.ones((2, 2), int))
    arrivals.poll()
    assert next(groups) is None  # rank 1's come first
    announce(routes, windows, 1, 0, 1, 1, 0, np.ones((2, 2), int))
    arrivals.poll()
    assert next(groups) == [(1, 0), (0, 1)] and next(groups) is None
    announce(routes, windows, 2, 1, 1, 1, 0, np.ones((2, 2), int))
    arrivals.poll()
    assert list(groups) == [[(0, 2)], []]


def test_whoever_is_first_goes_first_unless_the_order_is_fixed():
    """Two groups of peers, the second there before the first."""
    for deterministic in (True, False):
        dispatcher = make_dispatcher(
            2, transport=Loopback(0, 2), window=make_windows([0, 0], 0, False, 1, 1)[1][0], node_of_rank=(0, 0),
            batch_rows=1, deterministic=deterministic,
        )  # fmt: skip
        assert dispatcher.groups == [[0], [1]]
        handle = SimpleNamespace(arrivals=make_arrivals(dispatcher.window, dispatcher.routes, 1))
        batches = dispatcher.receive(handle)
        dispatcher.window.descriptors[1, 0, 1, 0] = [1, 5, 1, 0, 2, 0]
        first = next(batches)
        assert (first is None) if deterministic else (first.descriptors == ((1, 0),))
        dispatcher.window.descriptors[0, 0, 1, 0] = [1, 0, 1, 0, 3, 0]
        rest = [batch.descriptors for batch in batches if batch is not None]
        assert rest == ([((0, 0),), ((1, 0),)] if deterministic else [((0, 0),)])
        assert len(handle.arrivals.expected) == 0
