"""A stand-in for a GPU that knows what may be read when: every access to message memory must lie behind the last write.

Work is done at once, but each stream, and the host, has a vector clock: it knows of others' work only by the events for
which it has waited, and a launch knows what the host knows. An access to bytes whose last writer (or, when it writes,
whose readers) the actor does not know of is a race on a real device, whatever came of it here. Events happen late: the
host must ask for each several times. So must what MPI has under way be left alone until it is done.
"""

import contextlib
import ctypes
import functools
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcmoe.comm.device import PlainDevice
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.run.flat_gradients import FlatGradients

ASKED_BEFORE = 2  # times that the host must ask for an event


@dataclass(frozen=True, slots=True)
class Access:
    """Who has touched which bytes, and when by his own clock."""

    begin: int
    end: int
    actor: str
    tick: int
    writes: bool


class Order:
    """The clocks of the host and the streams, and what was done to message memory."""

    def __init__(self):
        self.clocks = {actor: {actor: 0} for actor in ("host", "compute", "send", "receive")}
        self.current = "compute"
        self.memory = {}  # address: (bytes, what keeps it there)
        self.accesses, self.in_flight = [], []
        self.num_checked, self.races = 0, []
        self.entered = []  # the threads that have made the device theirs

    def know(self, actor, clock):
        """Let an actor know what a clock knows."""
        own = self.clocks[actor]
        own.update({other: max(own.get(other, 0), tick) for other, tick in clock.items()})

    def launch(self, actor):
        """Begin a piece of work -> its tick."""
        if actor != "host":
            self.know(actor, self.clock_at_launch())
        self.clocks[actor][actor] += 1
        return self.clocks[actor][actor]

    def clock_at_launch(self):
        """What a stream knows by a launch -> clock."""
        return self.clocks["host"]

    def watch(self, array):
        """Keep an eye on an array's memory."""
        self.memory[array.ctypes.data] = (array.nbytes, array)

    def touch(self, actor, begin, num_bytes, writes, tick):
        """Note an access to bytes, if they are message memory, and a race where it may not be."""
        if not num_bytes or not any(at <= begin < at + size for at, (size, _) in self.memory.items()):
            return
        end, known = begin + num_bytes, self.clocks[actor]
        self.num_checked += 1
        for access in self.accesses:
            both = access.begin < end and begin < access.end and (writes or access.writes)
            if both and known.get(access.actor, 0) < access.tick:
                did, does = ("write" if write else "read" for write in (access.writes, writes))
                self.races.append(f"{actor} {does}s what {access.actor} has not been seen to {did}")
        self.in_flight = [entry for entry in self.in_flight if not entry[3].done]
        for first, last, written, _ in self.in_flight:
            if first < end and begin < last and (writes or written):
                self.races.append(f"{actor} touches what MPI still {'receives' if written else 'sends'}")
        if writes:
            self.accesses = [a for a in self.accesses if not (begin <= a.begin and a.end <= end)]
        self.accesses.append(Access(begin, end, actor, tick, writes))


class Event:
    """What a stream had done when it was recorded."""

    def __init__(self, order, clock, happens=lambda: None):
        self.order, self.clock, self.happens, self.asked = order, clock, happens, 0

    def query(self):
        """Whether it has happened; it has not at first."""
        self.asked += 1
        if self.asked <= ASKED_BEFORE:
            return False
        self.synchronize()
        return True

    def synchronize(self):
        """Wait for it."""
        self.happens()
        self.happens = lambda: None
        self.order.know("host", self.clock)


class Stream:
    """A stream with a clock."""

    def __init__(self, order, name):
        self.order, self.name, self.cuda_stream = order, name, id(self)

    def record_event(self):
        """Remember what has been launched."""
        return Event(self.order, dict(self.order.clocks[self.name]))

    def wait_event(self, event):
        """Have what is launched later know what the event knows."""
        event.happens()
        self.order.know(self.name, event.clock)


class OrderedDevice(PlainDevice):
    """A device whose memory is watched; `gpu`, if any, is what it calls itself."""

    def __init__(self, order, gpu=None):
        self.order, self.gpu = order, gpu
        self.compute_stream, self.send_stream, self.recv_stream = (
            Stream(order, name) for name in ("compute", "send", "receive")
        )

    def bind_thread(self):
        """Remember the thread, and watch it from now on: torch's modes are each thread's own."""
        thread = threading.current_thread()
        if thread not in self.order.entered:
            self.order.entered.append(thread)
            Watching(self.order).__enter__()

    @contextlib.contextmanager
    def use(self, stream):
        """Work on a stream."""
        before, self.order.current = self.order.current, stream.name
        yield
        self.order.current = before

    def make_buffer(self, num_rows, row_bytes):
        """Watch a new buffer."""
        buffer = super().make_buffer(num_rows, row_bytes)
        self.order.watch(buffer.array)
        return buffer

    def make_pinned(self, num_rows, row_bytes):
        """Watch pinned memory too."""
        tensor = super().make_pinned(num_rows, row_bytes)
        self.order.watch(tensor.numpy())
        return tensor

    def copy_to_host(self, tensor):
        """Have the copy arrive with its event, and nothing but rubbish before."""
        arriving, source = torch.full_like(tensor, -(10**6)), tensor.clone()
        event = self.compute_stream.record_event()
        event.happens = lambda: arriving.copy_(source)
        return arriving, event

    def synchronize(self):
        """Let the host know all."""
        for clock in list(self.order.clocks.values()):
            self.order.know("host", clock)

    def read_memory(self):
        """Tell of much memory."""
        return self.gpu and (self.gpu, 10**12)


class Watching(TorchDispatchMode):
    """Shows an Order every access of torch's to memory."""

    @classmethod
    def _should_skip_dynamo(cls):
        """Leave torch's compiler out, whose import takes two seconds of each rank."""
        return False

    def __init__(self, order):
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        tick = self.order.launch(self.order.current)
        for number, name, writes in find_accesses(function):
            value = keywords.get(name, arguments[number] if number < len(arguments) else None)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:  # which has no address
                    spread = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                    num_bytes = spread * tensor.itemsize if tensor.numel() else 0
                    self.order.touch(self.order.current, tensor.data_ptr(), num_bytes, writes, tick)
        return function(*arguments, **keywords)


@functools.cache
def find_accesses(function):
    """Find which arguments torch reads or writes, not only looks at in another way -> (number, name, writes)."""
    infos = [(number, argument.name, argument.alias_info) for number, argument in enumerate(function._schema.arguments)]
    return tuple((number, name, info is not None) for number, name, info in infos if info is None or info.is_write)


class WatchedTransport:
    """A transport that shows an Order what MPI touches, and for how long."""

    def __init__(self, transport, order):
        self.inner, self.order = transport, order
        self.rank, self.size = transport.rank, transport.size
        self.poke, self.send_words, self.recv_words = transport.poke, transport.send_words, transport.recv_words

    def begin(self, rows, writes, start):
        """Note an access by MPI that lasts until its request is done."""
        begin = rows.ctypes.data
        self.order.touch("host", begin, rows.nbytes, writes, self.order.launch("host"))
        request = start()
        self.order.in_flight.append((begin, begin + rows.nbytes, writes, request))
        return request

    def send_rows(self, rows, peer, tag):
        """MPI reads."""
        return self.begin(rows, False, lambda: self.inner.send_rows(rows, peer, tag))

    def recv_rows(self, rows, peer, tag):
        """MPI writes."""
        return self.begin(rows, True, lambda: self.inner.recv_rows(rows, peer, tag))


class StandInNccl:
    """NCCL's calls as CuPy has them, by MPI on the host: each touches memory as its stream would."""

    NCCL_UINT8, NCCL_FLOAT32, NCCL_SUM = 1, 7, 0
    available, version = True, 23203

    def __init__(self, comm, device):
        self.mpi, self.device, self.waiting, self.error = comm, device, [], None
        self.num_ids, self.num_groups, self.sums, self.ended = 0, 0, [], []

    def get_version(self):
        return self.version

    def get_unique_id(self):
        """Give a number that no other rank gives, nor this one again."""
        self.num_ids += 1
        return (self.mpi.rank, self.num_ids) + (7,) * 126

    def groupStart(self):
        assert not self.waiting
        self.num_groups += 1

    def groupEnd(self):
        """Do what was asked for at once."""
        from mpi4py import MPI

        MPI.Request.Waitall([start() for start in self.waiting])
        self.waiting.clear()

    def NcclCommunicator(self, size, number, rank):
        return StandInCommunicator(self, size, number, rank)


class StandInCommunicator:
    """One rank of StandInNccl's."""

    def __init__(self, nccl, size, number, rank):
        """All ranks make one at a time, each in its own group."""
        root, turn, *_ = number
        self.nccl, self.comm = nccl, nccl.mpi.Split(root, rank)
        assert self.comm.size == size and set(self.comm.allgather((root, turn))) == {(root, turn)}

    def touch(self, address, num_bytes, writes, stream):
        """Show who touches what -> the bytes."""
        order = self.nccl.device.order
        streams = (self.nccl.device.compute_stream, self.nccl.device.send_stream, self.nccl.device.recv_stream)
        (name,) = [s.name for s in streams if s.cuda_stream == stream]
        order.touch(name, address, num_bytes, writes, order.launch(name))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def send(self, address, count, dtype, peer, stream):
        assert dtype == self.nccl.NCCL_UINT8
        rows = self.touch(address, count, False, stream)
        self.nccl.waiting.append(lambda: self.comm.Isend(rows, peer))

    def recv(self, address, count, dtype, peer, stream):
        assert dtype == self.nccl.NCCL_UINT8
        rows = self.touch(address, count, True, stream)
        self.nccl.waiting.append(lambda: self.comm.Irecv(rows, peer))

    def allReduce(self, source, target, count, dtype, op, stream):
        from mpi4py import MPI

        assert (source, dtype, op) == (target, self.nccl.NCCL_FLOAT32, self.nccl.NCCL_SUM)
        self.nccl.sums.append((self.comm.size, count))
        values = self.touch(target, 4 * count, True, stream).view(np.float32)
        self.comm.Allreduce(MPI.IN_PLACE, values)

    def bcast(self, address, count, dtype, root, stream):
        assert dtype == self.nccl.NCCL_UINT8
        values = self.touch(address, count, self.comm.rank != root, stream)
        self.nccl.waiting.append(lambda: self.comm.Ibcast(values, root))

    def check_async_error(self):
        if self.nccl.error is not None:
            raise self.nccl.error

    def destroy(self):
        self.nccl.ended.append("destroyed")
        self.comm.Free()

    def abort(self):
        self.nccl.ended.append("aborted")


@contextlib.contextmanager
def watch_job(monkeypatch, gpu=None, nccl_comm=None):
    """Have jobs run on a stand-in, its accesses watched -> its Order; NCCL's calls go by nccl_comm, if any."""
    order = Order()
    device = OrderedDevice(order, gpu)

    @contextlib.contextmanager
    def open_watched(comm, row_bytes, bind_thread):
        with open_mpi_transport(comm, row_bytes, bind_thread=bind_thread) as transport:
            yield WatchedTransport(transport, order)

    monkeypatch.setattr("hpcmoe.run.job.open_device", lambda kind, rank: device)
    monkeypatch.setattr("hpcmoe.run.dispatchers.open_mpi_transport", open_watched)
    init = FlatGradients.__init__

    def init_watched(gradients, parts):
        init(gradients, parts)
        order.watch(gradients.flat.numpy())

    monkeypatch.setattr(FlatGradients, "__init__", init_watched)
    nccl = StandInNccl(nccl_comm, device) if nccl_comm else None
    for module in ("hpcmoe.comm.select", "hpcmoe.run.dispatchers"):
        monkeypatch.setattr(f"{module}.find_nccl", lambda: (nccl, None if nccl else "there is none here"))
    order.nccl = nccl
    with Watching(order):
        yield order
