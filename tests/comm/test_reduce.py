"""Sums, swaps and gathered parts: the same by MPI as by NCCL, whose order a stand-in for the GPU watches."""

import contextlib
import os
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from standin import Order, OrderedDevice, StandInNccl, Watching

from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.nccl import open_nccl
from hpcmoe.comm.reduce import HostReducer, NcclReducer
from hpcmoe.environment import NCCL_ORDER
from hpcmoe.errors import ClusterError

pytestmark = pytest.mark.mpi


@pytest.fixture
def mesh(comm):
    """Two data-parallel groups where the ranks are even in number, else one."""
    groups = 2 - comm.size % 2
    index, place = divmod(comm.rank, comm.size // groups)
    parts = {"ep": comm.Split(index, place), "dp": comm.Split(place, index)}
    yield SimpleNamespace(world=comm, sums=comm, ep_ranks=parts["ep"].allgather(comm.rank), **parts)
    for part in parts.values():
        part.Free()


@contextlib.contextmanager
def open_reducer(way, mesh):
    """Open a reducer -> (it, what makes a tensor of values in its memory). Nothing may be touched before its time."""
    order = Order()
    device = HostDevice() if way == "host" else OrderedDevice(order)
    with contextlib.ExitStack() as opened:
        reducer = HostReducer(mesh, device, 3)
        if way == "nccl":
            nccl = StandInNccl(mesh.world, device)
            comms = {"world": mesh.world, "dp": mesh.dp}
            reducer = NcclReducer(mesh, device, 3, opened.enter_context(open_nccl(mesh.world, comms, device, nccl)))
        opened.enter_context(Watching(order))

        def make(values):
            tensor = torch.zeros(len(values)) if way == "host" else device.make_buffer(1, 4 * len(values)).tensor
            tensor = tensor.view(torch.float32).flatten()
            return tensor.copy_(torch.tensor(values))

        yield reducer, make
    assert order.races == [] and (way == "host") == (order.num_checked == 0)


WAYS = pytest.mark.parametrize("way", ["host", "by the host", "nccl"])


@WAYS
@pytest.mark.parametrize("name", ["world", "dp"])
def test_sums_reach_all_ranks_of_their_group(mesh, way, name):
    comm = getattr(mesh, name)
    with open_reducer(way, mesh) as (reducer, make):
        values = make([1.0 + comm.rank * number for number in range(8)])
        with reducer.open_for_sums(values) as numbers:
            deque(reducer.all_reduce(name, numbers))
        reducer.poke()
        deque(reducer.finish())
        total = comm.size * (comm.size - 1) / 2
        assert values.mul(2).tolist() == [2 * (comm.size + total * number) for number in range(8)]


@WAYS
def test_swapped_arrays_are_matched_by_tag(mesh, way):
    """Each rank of a group sends two arrays to the next; the lower tag was asked for last."""
    rank, size = mesh.ep.rank, mesh.ep.size
    with open_reducer(way, mesh) as (reducer, make):
        values = make([10.0 * rank, 10.0 * rank + 1, -1.0, -1.0])
        with reducer.open_for_sums(values) as numbers:
            one, two, three, four = numbers.split(1)
            to, of = (rank + 1) % size, (rank - 1) % size
            sides = ([(2, to, two), (1, to, one)], [(1, of, three), (2, of, four)]) if size > 1 else ([], [])
            deque(reducer.send_recv(*sides))
        deque(reducer.finish())
        got = [10.0 * of, 10.0 * of + 1] if size > 1 else [-1.0, -1.0]
        assert values.mul(1).tolist() == [10.0 * rank, 10.0 * rank + 1, *got]


@WAYS
def test_gathered_parts_are_those_of_their_ranks(mesh, way):
    """Rank r has r numbers, the first none."""
    world = mesh.world
    counts = list(range(world.size))
    with open_reducer(way, mesh) as (reducer, make):
        mine = [float(rank if rank == world.rank else -1) for rank in counts for _ in range(rank)] or [0.0]
        values = make(mine)
        with reducer.open_for_sums(values) as numbers:
            deque(reducer.all_gather(numbers, counts if world.size > 1 else [1]))
        deque(reducer.finish())
        assert values.mul(1).tolist() == ([float(rank) for rank in counts for _ in range(rank)] or [0.0])


def test_a_sum_that_nobody_waits_for_is_caught(mesh):
    caught = pytest.raises(AssertionError, match="compute writes what receive has not been seen to write")
    with caught, open_reducer("nccl", mesh) as (reducer, make):
        values = make([1.0, 2.0])
        with reducer.open_for_sums(values) as numbers:
            reducer.all_reduce("world", numbers)
        values.mul_(2)


@pytest.mark.parametrize(("version", "stream"), [(22602, "recv_stream"), (22505, "send_stream")])
def test_nccl_keeps_one_order_or_has_one_stream(mesh, monkeypatch, version, stream):
    monkeypatch.delenv(NCCL_ORDER, raising=False)
    device = OrderedDevice(Order())
    nccl = StandInNccl(mesh.world, device)
    nccl.version = version
    with open_nccl(mesh.world, {"world": mesh.world}, device, nccl) as groups:
        assert NcclReducer(mesh, device, 3, groups).stream is getattr(device, stream)
    assert os.environ[NCCL_ORDER] == "1"


def test_what_nccl_says_of_a_sum_names_it_and_the_ranks(mesh):
    device = OrderedDevice(Order())
    nccl = StandInNccl(mesh.world, device)
    with pytest.raises(ClusterError) as seen, open_nccl(mesh.world, {"world": mesh.world}, device, nccl) as groups:
        reducer = NcclReducer(mesh, device, 3, groups)
        reducer.poke()
        nccl.error = KeyError(6)
        reducer.poke()
    others = ", ".join(str(rank) for rank in range(mesh.world.size) if rank != mesh.world.rank) or "none"
    assert str(seen.value) == f"NCCL, sum of gradients over world, with ranks {others} of the group: 6"
    assert nccl.ended == ["aborted"]
