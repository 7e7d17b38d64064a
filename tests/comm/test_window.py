"""Ranks of one node see each other's rows, and each word on the descriptor table when what it announces is there."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import open_small_job

import hpcmoe.comm.window
from hpcmoe.comm.window import DESCRIPTOR_WORDS, WindowSizes, make_private_window, open_window
from hpcmoe.errors import ClusterError
from hpcmoe.wait import Backoff, barrier

SIZES = WindowSizes(rows=10, row_bytes=24, num_in_flight=2, max_senders=3, max_messages=2, num_slots=4)


def wait_for(condition):
    """Spin politely, a second at most, until others have done something."""
    backoff = Backoff()
    for _ in range(20_000):
        if condition():
            return
        backoff.pause()
    raise AssertionError("it never came")


@pytest.mark.parametrize("num_local_peers", [1, 3])
def test_the_arrays_have_pages_of_their_own_and_fill_the_announced_bytes(num_local_peers):
    arrays = SIZES.arrays(num_local_peers)
    lengths = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in arrays.values()]
    assert SIZES.num_bytes(num_local_peers) == sum(-(-length // 4096) * 4096 for length in lengths)
    assert SIZES.num_descriptors == 1 + 3 * 2
    assert arrays["descriptors"][0] == (num_local_peers, 2, 2, 7, DESCRIPTOR_WORDS + 4)
    assert arrays["rows"][0] == (10 * num_local_peers, 24)


def test_a_private_window_is_zero_and_seen_as_numbers():
    window = make_private_window(SIZES)
    window.table(torch.bfloat16)[3, 5] = 2.0
    assert window.table(torch.float32).shape == (10, 6)
    assert window.rows[3].any() and not np.delete(window.rows, 3, axis=0).any()
    for name in ("gate_values", "sources", "consumed", "done", "descriptors"):
        assert not getattr(window, name).any()


def test_no_array_runs_into_another():
    window = make_private_window(SIZES)
    names = ["rows", "gate_values", "sources", "consumed", "done", "descriptors"]
    for number, name in enumerate(names, start=1):
        getattr(window, name)[...] = number
    assert all((getattr(window, name) == number).all() for number, name in enumerate(names, start=1))


def test_a_descriptor_is_dated_after_all_that_it_says():
    window, seen = make_private_window(SIZES), []
    window.sync = lambda: seen.append(window.descriptors[0, 1, 1, 5].tolist())
    window.post(1, 7, 5, (42, 3, 99), np.arange(4).reshape(1, 4))
    assert seen == [[0, 42, 3, 99, 0, 1, 2, 3]]
    assert window.descriptors[0, 1, 1, 5].tolist() == [7, 42, 3, 99, 0, 1, 2, 3]
    assert not np.delete(window.descriptors.reshape(-1, 8), (1 * 2 + 1) * 7 + 5, axis=0).any()
    window.post(1, 9, 5, (0, 0, -1))
    assert window.descriptors[0, 1, 1, 5].tolist() == [9, 0, 0, -1, 0, 0, 0, 0]


def test_a_descriptor_is_written_over_when_all_have_read_the_one_before_the_last():
    window = make_private_window(SIZES)
    assert window.may_post(0, 1) and window.may_post(0, 2) and not window.may_post(0, 3)
    window.mark_consumed(0, 1)
    assert window.may_post(0, 3) and not window.may_post(0, 4) and not window.may_post(1, 3)


def test_a_descriptor_is_done_when_every_local_peer_that_it_asks_has_done_it():
    window, counts = make_private_window(SIZES), np.array([[0, 3, 0, 0]])
    assert window.is_done(0, 1, 0, 0 * counts) and not window.is_done(0, 1, 2, counts)
    window.mark_done(0, 1, 0, 2)
    assert window.is_done(0, 1, 2, counts)
    assert not window.is_done(0, 2, 2, counts) and not window.is_done(0, 1, 1, counts)
    assert not window.is_done(1, 1, 2, counts)


@pytest.mark.mpi
@pytest.mark.parametrize("outlives_ranks", [False, True])
def test_local_peers_share_rows_and_each_has_its_own_part(comm, outlives_ranks, monkeypatch):
    monkeypatch.setattr(hpcmoe.comm.window, "survives_deaths", lambda: outlives_ranks)
    with open_window(comm, SIZES) as window:
        assert (window.local_index, window.num_local_peers, window.first_row) == (comm.rank, comm.size, 10 * comm.rank)
        assert not window.rows.any()
        barrier(comm)
        window.rows[window.first_row : window.first_row + 10] = comm.rank + 1
        window.sync()
        barrier(comm)
        window.sync()
        assert window.rows[::10, 0].tolist() == window.rows[9::10, 23].tolist() == list(range(1, comm.size + 1))
        assert not list(Path("/dev/shm").glob("hpcmoe-window-*"))
        barrier(comm)


@pytest.mark.mpi
@pytest.mark.parametrize("outlives_ranks", [False, True])
def test_the_window_tells_each_local_peer_of_every_other(comm, outlives_ranks, monkeypatch):
    """Each posts its number; each says it has taken and done all; each sees that the others have."""
    monkeypatch.setattr(hpcmoe.comm.window, "survives_deaths", lambda: outlives_ranks)
    with open_window(comm, SIZES) as window:
        for exchange in range(1, 20):
            wait_for(lambda exchange=exchange: window.may_post(0, exchange))
            window.post(0, exchange, 0, (100 * comm.rank + exchange, 1, exchange), np.full(4, exchange))
            for local_peer in range(comm.size):
                descriptor = window.descriptors[local_peer, 0, exchange % 2, 0]
                wait_for(lambda descriptor=descriptor, exchange=exchange: descriptor[0] == exchange)
                assert descriptor[1] == 100 * local_peer + exchange and descriptor[3] == exchange
                window.mark_done(0, exchange, local_peer, 0)
            window.mark_consumed(0, exchange)
            asked = np.ones((comm.size, 1), int)
            wait_for(lambda exchange=exchange, asked=asked: window.is_done(0, exchange, 0, asked))
        barrier(comm)


@pytest.mark.mpi
def test_windows_larger_than_the_shared_memory_are_refused_in_one_line(comm, shared, monkeypatch):
    """On all ranks, though one alone may see it; and before anything is touched."""
    if comm.size == 1:
        pytest.skip("a rank alone shares nothing")
    small = SimpleNamespace(f_bavail=3, f_frsize=1000 if comm.rank == comm.size - 1 else 10**12)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    said = "MB free, and the ranks of a node share"
    with pytest.raises(ClusterError, match=said) as rejected, open_small_job(comm, shared):
        raise AssertionError("it was opened")
    assert "\n" not in str(rejected.value) and "shared_memory = false" in str(rejected.value)
