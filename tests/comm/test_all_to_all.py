"""All-to-all backends take every row where it belongs, in pieces or whole, and say who is with whom when NCCL fails."""

import itertools
import threading

import numpy as np
import pytest
from mpi4py import MPI
from small import hesitate_to_poke, record_sends
from standin import ASKED_BEFORE, Order, OrderedDevice, StandInNccl, Watching

from hpcmoe.comm.all_to_all import DirectAllToAll, Transfer
from hpcmoe.comm.device import PlainDevice
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.nccl import NcclAllToAll, find_nccl, open_nccl
from hpcmoe.comm.self_test import run_self_test
from hpcmoe.comm.staging import MAX_PIECES, StagedAllToAll
from hpcmoe.errors import ClusterError
from hpcmoe.wait import Backoff

ROW_BYTES = 16


def make_transfer(comm, device, counts):
    """A transfer of counts[i][j] rows from rank i to j, filled with i, j and their number."""
    counts, buffers = np.asarray(counts), []
    for own in (counts[comm.rank], counts[:, comm.rank]):
        buffers += [device.make_buffer(max(int(own.sum()), 1), ROW_BYTES), np.concatenate(([0], np.cumsum(own)))]
    send, send_edges, receive, recv_edges = buffers
    for peer in range(comm.size):
        rows = send.array[send_edges[peer] : send_edges[peer + 1]]
        rows[:] = 10 * comm.rank + peer
        rows[:, 0] = np.arange(len(rows)) % 251
    return Transfer(tag=3, name="dispatch of layer 2, micro-batch 1", send=send, send_edges=send_edges,
               recv=receive, recv_edges=recv_edges)  # fmt: skip


def check_received(comm, transfer):
    """Each rank's rows are there, in order."""
    for peer in range(comm.size):
        rows = transfer.recv.array[transfer.recv_slice(peer)]
        assert (rows[:, 1:] == 10 * peer + comm.rank).all()
        assert np.array_equal(rows[:, 0], np.arange(len(rows)) % 251)


def run(all_to_all, transfer, after=None):
    """Run a transfer to its end -> its Request, and how many pieces were in flight at most."""
    request = all_to_all.start(transfer, all_to_all.device.compute_stream.record_event(), after)
    backoff, most = Backoff(), 0
    while not request.done:
        if not all_to_all.poke():
            backoff.pause()
        most = max(most, len(getattr(request, "sending", ())) + len(getattr(request, "copied_out", ())))
    return request, most


@pytest.mark.mpi
@pytest.mark.parametrize("shape", ["even", "one sends all", "nothing", "to itself"])
@pytest.mark.parametrize("kind", [DirectAllToAll, StagedAllToAll])
def test_every_row_comes_where_it_belongs(comm, monkeypatch, kind, shape):
    size = comm.size
    counts = {
        "even": np.full((size, size), 40),
        "one sends all": np.outer(np.arange(size) == size - 1, np.arange(size) * 50),
        "nothing": np.zeros((size, size), int),
        "to itself": np.eye(size, dtype=int) * 9,
    }[shape]
    monkeypatch.setattr("hpcmoe.comm.staging._PIECE_BYTES", 3 * ROW_BYTES)
    device = PlainDevice()
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        all_to_all = kind(transport, device, *([ROW_BYTES] if kind is StagedAllToAll else []))
        transfer, sends = make_transfer(comm, device, counts), record_sends(transport)
        request, most = run(all_to_all, transfer)
        check_received(comm, transfer)
        assert all_to_all.requests == [] or all_to_all.poke() in (True, False) and all_to_all.requests == []
        if kind is StagedAllToAll:
            sent = sum(-(-int(n) // 3) for peer, n in enumerate(counts[comm.rank]) if peer != comm.rank)
            received = sum(-(-int(n) // 3) for peer, n in enumerate(counts[:, comm.rank]) if peer != comm.rank)
            assert len(sends) == sent
            assert most <= MAX_PIECES and len(all_to_all.free) <= min(sent, MAX_PIECES) + min(received, MAX_PIECES)


@pytest.mark.mpi
def test_staged_copies_and_messages_run_side_by_side(comm, monkeypatch):
    """While a piece is in MPI's hands, later ones leave the device; and none is sent before its copy has ended."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    monkeypatch.setattr("hpcmoe.comm.staging._PIECE_BYTES", ROW_BYTES)
    order = Order()
    device, seen = OrderedDevice(order), []
    slow = itertools.cycle([True] * 9 + [False])  # messages take as long as several looks at them
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        hesitate_to_poke(transport, lambda: next(slow))
        all_to_all, send_rows = StagedAllToAll(transport, device, ROW_BYTES), transport.send_rows

        def watched(rows, peer, tag):
            seen.append((len(request.copied_out), len(request.sending)))
            return send_rows(rows, peer, tag)

        transport.send_rows = watched
        transfer = make_transfer(comm, device, np.full((comm.size, comm.size), 3 * MAX_PIECES))
        ready = device.compute_stream.record_event()
        request = all_to_all.start(transfer, ready, None)
        assert not request.begun and not seen  # the rows are not packed yet
        while not request.done:
            all_to_all.poke()
        check_received(comm, transfer)
    assert ready.asked > ASKED_BEFORE
    assert any(copying and sending for copying, sending in seen)


@pytest.mark.mpi
def test_a_transfer_waits_for_the_one_before(comm):
    device = PlainDevice()
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        all_to_all = DirectAllToAll(transport, device)
        transfer = make_transfer(comm, device, np.full((comm.size, comm.size), 2))

        class Earlier:
            send_done = False

        request = all_to_all.start(transfer, device.compute_stream.record_event(), Earlier)
        for _ in range(20):
            all_to_all.poke()
        assert not request.begun and not request.recv_done
        Earlier.send_done = True
        while not request.done:
            all_to_all.poke()
        check_received(comm, transfer)


@pytest.mark.mpi
def test_nccl_sends_in_groups(comm):
    order = Order()
    device = OrderedDevice(order)
    nccl = StandInNccl(comm, device)
    with Watching(order), open_nccl(comm, {"rows": comm}, device, nccl) as groups:
        all_to_all = NcclAllToAll(groups["rows"])
        transfer = make_transfer(comm, device, np.full((comm.size, comm.size), 5))
        request = all_to_all.start(transfer, device.compute_stream.record_event(), None)
        assert request.recv_done and request.send_done and not request.done
        while all_to_all.requests:
            all_to_all.poke()
        check_received(comm, transfer)
    assert order.races == [] and nccl.num_groups == 1 and nccl.ended == ["destroyed"]


@pytest.mark.mpi
def test_an_error_of_nccl_names_the_ranks_it_may_come_from(comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    device = OrderedDevice(Order())
    nccl = StandInNccl(comm, device)
    counts = np.zeros((comm.size, comm.size), int)
    counts[0, 1] = counts[1, 0] = 4
    with pytest.raises(ClusterError) as seen, open_nccl(comm, {"rows": comm, "world": comm}, device, nccl) as groups:
        all_to_all = NcclAllToAll(groups["rows"])
        all_to_all.start(make_transfer(comm, device, counts), device.compute_stream.record_event(), None)
        nccl.error = RuntimeError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")
        all_to_all.poke()
    peer = {0: "1", 1: "0"}.get(comm.rank, "none")
    named = f"NCCL, dispatch of layer 2, micro-batch 1, with ranks {peer} of the group: NCCL_ERROR_SYSTEM_ERROR"
    assert str(seen.value).startswith(named) and nccl.ended == ["aborted"] * 2
    assert nccl.num_groups == 2  # the transfer, and the end of all at once


@pytest.mark.mpi
def test_ranks_that_cannot_join_are_told_on_all(comm):
    device = OrderedDevice(Order())
    nccl = StandInNccl(comm, device)

    def reject(size, number, rank):
        if rank == size - 1:
            raise RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: out of memory")

    nccl.NcclCommunicator = reject
    told = rf"\[rank {comm.size - 1} of {comm.size}\] NCCL cannot be set up: .*memory"
    with pytest.raises(ClusterError, match=told), open_nccl(comm, {"rows": comm}, device, nccl):
        pass


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_a_self_test_tells_the_rate_and_finds_what_came_wrong(comm, monkeypatch, kind):
    device, entered = PlainDevice(), []
    monkeypatch.setattr(device, "bind_thread", lambda: entered.append(threading.current_thread()))
    assert run_self_test(kind, comm, device) > 0
    assert threading.current_thread() not in entered and len(entered) == (MPI.Query_thread() == MPI.THREAD_MULTIPLE)
    monkeypatch.setattr(
        DirectAllToAll, "start", lambda self, transfer, ready, after: start_wrong(self, transfer, ready, after)
    )
    if kind == "direct":
        with pytest.raises(ClusterError, match=r"rows of ranks 0.* came wrong"):
            run_self_test(kind, comm, PlainDevice())


real_start = DirectAllToAll.start


def start_wrong(all_to_all, transfer, ready, after):
    """Send rows that have been written over."""
    transfer.send.array[:] = 255
    return real_start(all_to_all, transfer, ready, after)


def test_without_cupy_nccl_is_not_found():
    nccl, why = find_nccl()
    assert nccl is not None or "CuPy" in why or "pip install" in why
