"""Every transport brings the same rows to the same places, whichever way they travel."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import carry, make_rows, make_send

from hpcmoe.comm.mpi import MpiTransport, open_mpi_transport
from hpcmoe.comm.transport import Direction, Loopback, make_tag, offsets_of

ROW_BYTES = 6


def draw_matrix(size, seed):
    """Rows from each rank to each, the same on all ranks; some pairs, ranks and whole exchanges have none."""
    random = np.random.default_rng(seed)
    return random.integers(0, 20, (size, size)) * random.integers(0, 2, (size, 1)) * random.integers(0, 2, (1, size))


def test_tags_of_different_exchanges_differ():
    num_layers, num_micro_batches = 3, 5
    exchanges = itertools.product(range(num_layers), range(num_micro_batches), Direction)
    tags = [make_tag(layer, micro, direction, num_micro_batches) for layer, micro, direction in exchanges]
    assert sorted(tags) == list(range(num_layers * num_micro_batches * 4))


def test_offsets_are_where_segments_start_and_the_last_ends():
    assert offsets_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert offsets_of(np.array([], dtype=int)).tolist() == [0]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_loopback_carries_rows_to_itself(count):
    pending, check = carry(Loopback(), np.array([[count]]), ROW_BYTES, tag=3)
    assert list(pending.arrivals()) == [[0]]
    pending.poke()
    pending.wait_for([0])
    pending.wait()
    check()
    counts = np.array([[1, 2, 3]])
    assert np.array_equal(Loopback().start_counts(counts)(), counts)


@pytest.fixture
def transport(comm):
    """Open an MPI transport whose messages have at most seven rows. Collective."""
    with open_mpi_transport(comm, ROW_BYTES, max_message_rows=7) as transport:
        yield transport


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(12))
def test_mpi_carries_what_the_counts_say(transport, seed):
    matrix = draw_matrix(transport.size, seed)
    pending, check = carry(transport, matrix, ROW_BYTES, tag=seed)
    pending.wait()
    check()


@pytest.mark.mpi
def test_messages_are_cut_at_the_longest_allowed(transport):
    matrix = np.full((transport.size, transport.size), 15)
    buffer = np.zeros((15 * transport.size, ROW_BYTES), np.uint8)
    parts = list(transport.parts(buffer, offsets_of(matrix[0]), transport.size - 1))
    assert [count for _, count, _ in parts] == [len(rows) for rows, _, _ in parts] == [7, 7, 1]
    pending, check = carry(transport, matrix, ROW_BYTES, tag=0)
    assert len(pending.receives) == len(pending.sends) == 3 * (transport.size - 1)
    pending.wait()
    check()


@pytest.mark.mpi
def test_a_rank_may_receive_nothing_and_another_send_nothing(transport):
    matrix = np.full((transport.size, transport.size), 9)
    matrix[0], matrix[:, -1] = 0, 0
    pending, check = carry(transport, matrix, ROW_BYTES, tag=0)
    pending.wait()
    check()


@pytest.mark.mpi
def test_arrivals_name_each_peer_once_own_first_when_its_rows_are_there(transport):
    for seed in range(5):
        matrix = draw_matrix(transport.size, seed)
        time.sleep(0.002 * ((transport.rank + seed) % transport.size))
        pending, check = carry(transport, matrix, ROW_BYTES, tag=seed)
        groups = []
        for peers in pending.arrivals():
            check(peers)
            groups.append(peers)
        assert transport.rank in groups[0] and sorted(sum(groups, [])) == list(range(transport.size))
        pending.wait()


@pytest.mark.mpi
def test_wait_for_a_late_peer_brings_its_rows(transport):
    matrix = np.full((transport.size, transport.size), 8)
    late = transport.size - 1
    if transport.rank == late:
        time.sleep(0.1)
    pending, check = carry(transport, matrix, ROW_BYTES, tag=0)
    pending.wait_for([late])
    check([late])
    pending.wait()
    check()


@pytest.mark.mpi
def test_exchanges_under_way_together_end_in_any_order(transport):
    size, tags = transport.size, [5, 6, 7]
    if transport.rank % 2:
        tags.reverse()
    under_way = {tag: carry(transport, np.full((size, size), tag), ROW_BYTES, tag) for tag in tags}
    for tag in (7, 5, 6):
        pending, check = under_way[tag]
        pending.wait()
        check()


@pytest.mark.mpi
def test_rows_are_read_only_when_they_are_ready(transport):
    class Late:
        """An event whose rows come when someone waits for it."""

        def synchronize(self):
            send[:] = torch.from_numpy(make_rows(transport.rank, transport.rank, 4 * size, ROW_BYTES))

    size = transport.size
    counts = np.full(size, 4)
    send, recv = (torch.zeros(4 * size, ROW_BYTES, dtype=torch.uint8) for _ in range(2))
    transport.start(send, counts, recv, counts, Late(), tag=0).wait()
    for source in range(size):
        expected = make_rows(source, source, 4 * size, ROW_BYTES)[4 * transport.rank :][:4]
        assert np.array_equal(recv[4 * source :][:4].numpy(), expected)


@pytest.mark.mpi
def test_after_wait_the_send_buffer_is_free(comm):
    """Half the ranks only send, large messages that leave when the late receivers are there, and then write again."""
    row_bytes, rows = 1024, 2000
    sends = np.arange(comm.size) % 2 == 0
    matrix = rows * np.outer(sends, ~sends)
    with open_mpi_transport(comm, row_bytes, max_message_rows=500) as transport:
        if not sends[comm.rank]:
            time.sleep(0.05)
        send = make_send(transport, matrix, row_bytes)
        pending, check = carry(transport, matrix, row_bytes, tag=0, send=send)
        pending.wait()
        send.zero_()
        comm.Barrier()
        check()


@pytest.mark.mpi
def test_random_delays_change_nothing(transport):
    """Ranks that dawdle at random between starting, poking and waiting, over many exchanges two at a time."""
    random = np.random.default_rng(transport.rank)
    for seed in range(0, 60, 2):
        under_way = []
        for tag in (seed, seed + 1):
            time.sleep(random.choice([0.0, 0.0, 0.001, 0.004]))
            under_way.append(carry(transport, draw_matrix(transport.size, tag), ROW_BYTES, tag))
        for pending, check in under_way[:: random.choice([1, -1])]:
            pending.poke()
            time.sleep(random.choice([0.0, 0.001]))
            pending.wait()
            check()


@pytest.mark.mpi
def test_tags_beyond_what_mpi_has_wrap_around(transport):
    tags, comm = [], transport.comm
    transport.comm = SimpleNamespace(
        Irecv=lambda part, peer, tag: tags.append(tag) or comm.Irecv(part, peer, tag),
        Isend=lambda part, peer, tag: tags.append(tag) or comm.Isend(part, peer, tag),
    )
    matrix = np.ones((transport.size, transport.size), int)
    pending, check = carry(transport, matrix, ROW_BYTES, tag=transport.last_tag + 1 + 3)
    pending.wait()
    check()
    assert tags == [3] * 2 * (transport.size - 1)


@pytest.mark.mpi
def test_counts_reach_the_peer_they_are_for(transport):
    def counts(source, seed):
        return np.random.default_rng([source, seed]).integers(0, 2**40, (transport.size, 3))

    waits = [transport.start_counts(counts(transport.rank, seed)) for seed in range(2)]
    for seed in (1, 0):
        received = waits[seed]()
        for source in range(transport.size):
            assert np.array_equal(received[source], counts(source, seed)[transport.rank])


@pytest.mark.mpi
def test_a_transport_frees_its_row_type(comm):
    with open_mpi_transport(comm, ROW_BYTES, 5) as transport:
        assert isinstance(transport, MpiTransport) and transport.row_type
    assert not transport.row_type
