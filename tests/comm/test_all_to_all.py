"""Carriers take every row where it belongs, in pieces or whole, and say who is with whom when NCCL fails."""

import itertools
import threading

import numpy as np
import pytest
from mpi4py import MPI
from standin import ASKED_BEFORE, Order, OrderedDevice, StandInNccl, Watching

from hpcmoe.comm.all_to_all import DirectCarrier, Leg
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.nccl import NcclCarrier, find_nccl, open_nccl
from hpcmoe.comm.plain import PlainDevice
from hpcmoe.comm.self_test import try_carrier
from hpcmoe.comm.staging import MOST_PIECES, StagedCarrier
from hpcmoe.errors import ClusterError
from hpcmoe.wait import Patience

ROW_BYTES = 16


def make_leg(comm, device, counts):
    """A leg of counts[i][j] rows from rank i to j, filled with i, j and their number."""
    counts, buffers = np.asarray(counts), []
    for own in (counts[comm.rank], counts[:, comm.rank]):
        buffers += [device.make_buffer(max(int(own.sum()), 1), ROW_BYTES), np.concatenate(([0], np.cumsum(own)))]
    send, send_edges, receive, receive_edges = buffers
    for peer in range(comm.size):
        rows = send.array[send_edges[peer] : send_edges[peer + 1]]
        rows[:] = 10 * comm.rank + peer
        rows[:, 0] = np.arange(len(rows)) % 251
    return Leg(tag=3, name="dispatch of layer 2, micro-batch 1", send=send, send_edges=send_edges,
               receive=receive, receive_edges=receive_edges)  # fmt: skip


def check_received(comm, leg):
    """Each rank's rows are there, in order."""
    for peer in range(comm.size):
        rows = leg.receive.array[leg.received_from(peer)]
        assert (rows[:, 1:] == 10 * peer + comm.rank).all()
        assert np.array_equal(rows[:, 0], np.arange(len(rows)) % 251)


def carry(carrier, leg, after=None):
    """Carry a leg to its end -> its Pending, and how many pieces were under way at most."""
    pending, patience, most = carrier.start(leg, carrier.device.compute.record_event(), after), Patience(), 0
    while not pending.is_over():
        if not carrier.poke():
            patience.pause()
        most = max(most, len(getattr(pending, "sending", ())) + len(getattr(pending, "copied_out", ())))
    return pending, most


@pytest.mark.mpi
@pytest.mark.parametrize("shape", ["even", "one sends all", "nothing", "to itself"])
@pytest.mark.parametrize("kind", [DirectCarrier, StagedCarrier])
def test_every_row_comes_where_it_belongs(comm, monkeypatch, kind, shape):
    size = comm.size
    counts = {
        "even": np.full((size, size), 40),
        "one sends all": np.outer(np.arange(size) == size - 1, np.arange(size) * 50),
        "nothing": np.zeros((size, size), int),
        "to itself": np.eye(size, dtype=int) * 9,
    }[shape]
    monkeypatch.setattr("hpcmoe.comm.staging.PIECE_BYTES", 3 * ROW_BYTES)
    device = PlainDevice()
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        carrier = kind(transport, device, *([ROW_BYTES] if kind is StagedCarrier else []))
        leg = make_leg(comm, device, counts)
        pending, most = carry(carrier, leg)
        check_received(comm, leg)
        assert carrier.pending == [] or carrier.poke() in (True, False) and carrier.pending == []
        if kind is StagedCarrier:
            sent = sum(-(-int(n) // 3) for peer, n in enumerate(counts[comm.rank]) if peer != comm.rank)
            received = sum(-(-int(n) // 3) for peer, n in enumerate(counts[:, comm.rank]) if peer != comm.rank)
            assert transport.num_sent == sent
            assert most <= MOST_PIECES and len(carrier.free) <= min(sent, MOST_PIECES) + min(received, MOST_PIECES)


@pytest.mark.mpi
def test_staged_copies_and_messages_run_side_by_side(comm, monkeypatch):
    """While a piece is in MPI's hands, later ones leave the device; and none is sent before its copy has ended."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    monkeypatch.setattr("hpcmoe.comm.staging.PIECE_BYTES", ROW_BYTES)
    order = Order()
    device, seen = OrderedDevice(order), []
    slow = itertools.cycle([True] * 9 + [False])  # messages take as long as several looks at them
    with open_mpi_transport(comm, ROW_BYTES, lambda: next(slow)) as transport:
        carrier, send_rows = StagedCarrier(transport, device, ROW_BYTES), transport.send_rows

        def watched(rows, peer, tag):
            seen.append((len(pending.copied_out), len(pending.sending)))
            return send_rows(rows, peer, tag)

        transport.send_rows = watched
        leg = make_leg(comm, device, np.full((comm.size, comm.size), 3 * MOST_PIECES))
        ready = device.compute.record_event()
        pending = carrier.start(leg, ready, None)
        assert not pending.begun and not seen  # the rows are not packed yet
        while not pending.is_over():
            carrier.poke()
        check_received(comm, leg)
    assert ready.asked > ASKED_BEFORE
    assert any(copying and sending for copying, sending in seen)


@pytest.mark.mpi
def test_a_leg_waits_for_the_one_before(comm):
    device = PlainDevice()
    with open_mpi_transport(comm, ROW_BYTES) as transport:
        carrier = DirectCarrier(transport, device)
        leg = make_leg(comm, device, np.full((comm.size, comm.size), 2))

        class Earlier:
            gone = False

        pending = carrier.start(leg, device.compute.record_event(), Earlier)
        for _ in range(20):
            carrier.poke()
        assert pending.sends is None and not pending.landed
        Earlier.gone = True
        while not pending.is_over():
            carrier.poke()
        check_received(comm, leg)


@pytest.mark.mpi
def test_nccl_carries_in_groups(comm):
    order = Order()
    device = OrderedDevice(order)
    nccl = StandInNccl(comm, device)
    with Watching(order), open_nccl(comm, {"rows": comm}, device, nccl) as groups:
        carrier = NcclCarrier(groups["rows"])
        leg = make_leg(comm, device, np.full((comm.size, comm.size), 5))
        pending = carrier.start(leg, device.compute.record_event(), None)
        assert pending.landed and pending.gone and not pending.is_over()
        while carrier.pending:
            carrier.poke()
        check_received(comm, leg)
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
        carrier = NcclCarrier(groups["rows"])
        carrier.start(make_leg(comm, device, counts), device.compute.record_event(), None)
        nccl.fault = RuntimeError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")
        carrier.poke()
    peer = {0: "1", 1: "0"}.get(comm.rank, "none")
    named = f"NCCL, dispatch of layer 2, micro-batch 1, with ranks {peer} of the group: NCCL_ERROR_SYSTEM_ERROR"
    assert str(seen.value).startswith(named) and nccl.ended == ["aborted"] * 2
    assert nccl.num_groups == 2  # the leg, and the end of all at once


@pytest.mark.mpi
def test_ranks_that_cannot_join_are_told_on_all(comm):
    device = OrderedDevice(Order())
    nccl = StandInNccl(comm, device)

    def refuse(size, number, rank):
        if rank == size - 1:
            raise RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: out of memory")

    nccl.NcclCommunicator = refuse
    told = rf"\[rank {comm.size - 1} of {comm.size}\] NCCL cannot be set up: .*memory"
    with pytest.raises(ClusterError, match=told), open_nccl(comm, {"rows": comm}, device, nccl):
        pass


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_a_trial_tells_the_rate_and_finds_what_came_wrong(comm, monkeypatch, kind):
    device, entered = PlainDevice(), []
    monkeypatch.setattr(device, "enter_thread", lambda: entered.append(threading.current_thread()))
    assert try_carrier(kind, comm, device) > 0
    assert threading.current_thread() not in entered and len(entered) == (MPI.Query_thread() == MPI.THREAD_MULTIPLE)
    monkeypatch.setattr(DirectCarrier, "start", lambda self, leg, ready, after: start_wrong(self, leg, ready, after))
    if kind == "direct":
        with pytest.raises(ClusterError, match=r"rows of ranks 0.* came wrong"):
            try_carrier(kind, comm, PlainDevice())


real_start = DirectCarrier.start


def start_wrong(carrier, leg, ready, after):
    """Send rows that have been written over."""
    leg.send.array[:] = 255
    return real_start(carrier, leg, ready, after)


def test_without_cupy_nccl_is_not_found():
    nccl, why = find_nccl()
    assert nccl is not None or "CuPy" in why or "pip install" in why
