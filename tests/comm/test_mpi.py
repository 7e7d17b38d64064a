"""Rows and words reach the peer and the tag they are for, however late anyone is; sums over the ranks."""

import random
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI
from small import hesitate_to_poke, record_sends

from hpcmoe.comm.mpi import MpiTransport, all_reduce, open_mpi_transport, start_all_reduce
from hpcmoe.wait import Backoff, barrier

ROW_BYTES = 6


@pytest.fixture
def transport(comm):
    """Open an MPI transport. Collective."""
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        yield transport


def wait_for(transport, *requests):
    """Poke until all requests are done."""
    backoff, deadline = Backoff(), time.monotonic() + 300
    while not all(request.done for request in requests):
        assert time.monotonic() < deadline, "stuck"
        if not transport.poke():
            backoff.pause()


def make_rows(source, target, tag, count):
    """What one rank sends another with a tag."""
    return np.random.default_rng([source, target, tag]).integers(0, 256, (count, ROW_BYTES), dtype=np.uint8)


def exchange_rows(transport, tags, counts):
    """Begin to send every peer rows with each tag, and to receive them -> (requests, check)."""
    peers = [peer for peer in range(transport.size) if peer != transport.rank]
    received, requests = {}, []
    for tag, count in zip(tags, counts, strict=True):
        for peer in peers:
            received[peer, tag] = np.zeros((count, ROW_BYTES), np.uint8)
            requests.append(transport.recv_rows(received[peer, tag], peer, tag))
            requests.append(transport.send_rows(make_rows(transport.rank, peer, tag, count), peer, tag))

    def check():
        for (peer, tag), rows in received.items():
            assert np.array_equal(rows, make_rows(peer, transport.rank, tag, len(rows)))

    return requests, check


@pytest.mark.mpi
def test_rows_reach_peer_and_tag_in_any_order(transport):
    way, sent = 1 - 2 * (transport.rank % 2), record_sends(transport)  # half the ranks begin with the last
    requests, check = exchange_rows(transport, [5, 6, 7, 8][::way], [0, 1, 30, 4000][::way])
    wait_for(transport, *requests)
    check()
    assert len(sent) == 4 * (transport.size - 1) and not transport.poke()
    assert transport.requests == transport.requests == []


@pytest.mark.mpi
def test_words_reach_peer_and_tag(transport):
    peers = [peer for peer in range(transport.size) if peer != transport.rank]
    received = {peer: np.zeros(9, np.int64) for peer in peers}  # room for more than comes
    requests = [transport.recv_words(received[peer], peer, 3) for peer in peers]
    requests += [transport.send_words(np.array([transport.rank, peer, -(2**60)]), peer, 3) for peer in peers]
    wait_for(transport, *requests)
    for peer in peers:
        assert received[peer].tolist() == [peer, transport.rank, -(2**60), *[0] * 6]


@pytest.mark.mpi
def test_a_request_is_done_when_its_own_message_is(comm, transport):
    """What a late peer has not sent yet is not there, and what others sent is."""
    if comm.size < 3:
        pytest.skip("needs a third rank")
    late, buffers = comm.size - 1, {peer: np.zeros((2, ROW_BYTES), np.uint8) for peer in range(comm.size)}
    if comm.rank == late:
        barrier(comm)
    sends = [transport.send_rows(make_rows(comm.rank, p, 0, 2), p, 0) for p in buffers if p != comm.rank]
    requests = {peer: transport.recv_rows(buffers[peer], peer, 0) for peer in buffers if peer != comm.rank}
    early = [request for peer, request in requests.items() if peer != late]
    if comm.rank != late:
        wait_for(transport, *early)
        assert not requests[late].done and not buffers[late].any()
        barrier(comm)
    wait_for(transport, *sends, *requests.values())


@pytest.mark.mpi
def test_while_it_hesitates_nothing_progresses(comm):
    hesitates = [True]
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        hesitate_to_poke(transport, lambda: hesitates[0])
        requests, check = exchange_rows(transport, [1], [3])
        for _ in range(50):
            assert not transport.poke() and not any(request.done for request in requests)
        hesitates[0] = False
        wait_for(transport, *requests)
        check()


@pytest.mark.mpi
def test_random_hesitation_changes_nothing(comm):
    delays = random.Random(comm.rank)
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        hesitate_to_poke(transport, lambda: delays.random() < 0.7)
        for seed in range(100):
            requests, check = exchange_rows(transport, [2 * seed, 2 * seed + 1], [seed, 7])
            wait_for(transport, *requests)
            check()


@pytest.mark.mpi
def test_a_transport_frees_its_row_type(comm):
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        assert isinstance(transport, MpiTransport) and transport.row_type
    assert not transport.row_type


@pytest.fixture
def threads():
    """Skip where MPI lets one thread alone in."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI lets one thread alone in")


@pytest.mark.mpi
def test_a_thread_that_progresses_messages_begins_as_it_is_named(comm, threads):
    begun = []
    with open_mpi_transport(comm, ROW_BYTES, bind_thread=lambda: begun.append(threading.current_thread())) as transport:
        requests, check = exchange_rows(transport, [5], [4000])
        wait_for(transport, *requests)
        check()
    assert len(begun) == 1 and begun[0] is not threading.current_thread() and not begun[0].is_alive()


@pytest.mark.mpi
def test_what_goes_wrong_at_the_threads_beginning_is_the_ranks_own_error(comm, threads):
    with pytest.raises(ZeroDivisionError), open_mpi_transport(comm, ROW_BYTES, bind_thread=lambda: 1 / 0):
        pass


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_all_reduce_sums_in_place_and_pokes_meanwhile(comm, dtype):
    array, pokes = np.array([[comm.rank, 1], [2, 10**comm.rank]], dtype), []
    if comm.rank == 0:
        time.sleep(0.02)
    assert all_reduce(comm, array, poke=lambda: pokes.append(1)) is array
    assert array.tolist() == [[sum(range(comm.size)), comm.size], [2 * comm.size, int("1" * comm.size)]]
    assert pokes or comm.rank == 0


@pytest.mark.mpi
def test_sums_under_way_together_end_in_any_order(comm):
    arrays = [np.full(3, float(10**n)) for n in range(3)]
    requests = [start_all_reduce(comm, array) for array in arrays]
    for n in (2, 0, 1):
        requests[n].Wait()
        assert arrays[n].tolist() == [comm.size * 10**n] * 3
