"""Rows leave for their experts and return, on GPUs: the same two ways as on the host, from device to device.

outward   dispatch, and the backward of combine    tokens gathered by destination, sent, sorted by expert
homeward  combine, and the backward of dispatch    results sent from where the tokens lay, to where these were packed

A row is as wide as a token and ends in a number of its own. The host knows how many rows go where, and nothing else:
packing, transfer, experts, return and sum follow each other by events.
"""

import weakref
from dataclasses import dataclass

import torch

from hpcmoe.comm.all_to_all import Transfer
from hpcmoe.comm.rows import RowView, replace_none_by_last
from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind
from hpcmoe.dispatch.device_plan import DeviceBatch, DeviceChooser, DevicePlan, tag_of, tag_of_counts
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.dispatch.sizes import Sizes, round_rows
from hpcmoe.dispatch.traffic import make_traffic
from hpcmoe.wait import Backoff, poke_all

ALIGNMENT = 16  # bytes; GEMMs and memory assignments read no row faster than those that begin there
PAUSES = 16  # between two looks at everything


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSizes(Sizes):
    """What buffers on a device hold."""

    buffer_factor: float  # room for rows at the experts / those expected

    @property
    def row_bytes(self):
        """Bytes of a token and its number on the wire."""
        return -(-(self.hidden * self.dtype.itemsize + 4) // ALIGNMENT) * ALIGNMENT

    @property
    def home_rows(self):
        """Rows of a micro-batch's assignments, and one that is zero."""
        return self.tokens * self.top_k + 1

    @property
    def away_rows(self):
        """Rows that find room at this rank's experts without growth."""
        return max(int(self.expert_rows * self.buffer_factor), 1)

    def buffer_bytes(self, _routes):
        """Memory that messages take on this rank's device."""
        return self.num_in_flight * (self.home_rows + self.away_rows) * self.row_bytes


class Table:
    """A buffer of message rows, seen as scalars."""

    def __init__(self, sizes, device, num_rows):
        self.buffer = device.make_buffer(num_rows, sizes.row_bytes)
        self.rows = self.buffer.tensor.view(sizes.dtype)[:, : sizes.hidden]  # [n, H]
        self.gate_values = self.buffer.tensor.view(torch.float32)[:, -1]  # [n], one a row

    def __len__(self):
        return len(self.buffer)

    def part(self, order=None, num_rows=None):
        """See rows in an order, or the first num_rows, or all, as a move reads or writes them -> RowView."""
        end = num_rows if order is None else None
        return RowView(values=self.rows[:end], gate_values=self.gate_values[:end], order=order)


class DeviceInFlightBuffers:
    """Where one micro-batch in flight has its rows, at home and at this rank's experts."""

    def __init__(self, sizes, device):
        self.home = Table(sizes, device, sizes.home_rows)  # assignments out, and their results back
        self.away = Table(sizes, device, sizes.away_rows)  # others' assignments, and their results
        self.direction = None
        self.outward = self.homeward = None  # Request

    def is_over(self):
        """Whether nothing is under way from or to these rows."""
        return all(request is None or request.done for request in (self.outward, self.homeward))


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of a buffers: where a batch's rows lie."""

    buffers: DeviceInFlightBuffers
    order: torch.Tensor | None  # [n] int64; None: the first n
    num_rows: int

    def __getitem__(self, part):
        """Mean a chunk: all of them, for a batch has no other."""
        if part != slice(0, self.num_rows):
            raise IndexError(f"{part} of {self.num_rows} rows that are worked on at once")
        return self


class DeviceDispatcher:
    """Carries the rows of one expert-parallel group for all layers and micro-batches."""

    def __init__(self, all_to_all, transport, device, clock, ways, sum_groups=None):
        """all_to_all takes the rows; transport, by MPI, the counts; ways are (DeviceSizes, Routes).

        sum_groups: NCCL's Groups that sum gradients, by name, where it carries the rows of a training.
        """
        self.all_to_all, self.transport, self.device, self.clock = all_to_all, transport, device, clock
        (self.sizes, self.routes), self.sum_groups = ways, sum_groups
        self.num_slots = len(self.routes.place_of_slot)
        self.in_flight_buffers = [DeviceInFlightBuffers(self.sizes, device) for _ in range(self.sizes.num_in_flight)]
        device.row_ops.prepare(self.in_flight_buffers[0].home.rows)
        self.choosers, self.background_tasks = weakref.WeakKeyDictionary(), []
        self.traffic = make_traffic(self.transport.size)

    def pop_traffic(self):
        """Return what was sent since the last call -> Traffic."""
        traffic, self.traffic = self.traffic, make_traffic(self.transport.size)
        return traffic

    def register(self, task):
        """Poke this too from now on, until it is over."""
        self.background_tasks.append(task)

    def poke(self):
        """Let messages and background tasks progress, without waiting -> whether anything moved."""
        return self.transport.poke() | self.all_to_all.poke() | poke_all(self.background_tasks)

    def read_sequence_number(self):
        """Nothing is told but by messages."""
        return 0

    def wait_for_change(self, backoff, before):
        """Pause, a few times at most, until a message has moved."""
        for _ in range(PAUSES):
            backoff.pause()
            if self.poke():
                return

    @property
    def buffer_bytes(self):
        """Memory that messages take on this rank's device."""
        return (
            sum(len(buffer) for buffers in self.in_flight_buffers for buffer in (buffers.home, buffers.away))
            * self.sizes.row_bytes
        )

    @property
    def is_idle(self):
        """Whether this rank has nothing left to do for others."""
        return not self.background_tasks and all(buffers.is_over() for buffers in self.in_flight_buffers)

    def plan(self, routing, chooser):
        """Choose a replica for each assignment of a Routing, and find its way -> DevicePlan, made on the device."""
        if chooser not in self.choosers:
            self.choosers[chooser] = DeviceChooser(chooser, self.device.torch_device)
        slots = self.choosers[chooser].choose(routing.experts)
        return self.make_plan(slots, repeat_for_shards(routing.kept, slots.shape[1] // routing.experts.shape[1]))

    def make_plan(self, slots, kept):
        """Find the way of each kept assignment -> DevicePlan: slots [T, K], kept [T, K] bool, or None where all are."""
        slots = torch.as_tensor(slots, device=self.device.torch_device)
        kept = None if kept is None else torch.as_tensor(kept, device=self.device.torch_device)
        return DevicePlan(slots, kept, self.num_slots, self.device)

    def poll_ready(self, handle):
        """Whether the next transfer of a micro-batch can begin: all counts are known, and its rows are free."""
        buffers, counts = self.in_flight_buffers[handle.buffer_index], handle.plan.counts
        known = counts.poll(self.transport, tag_of_counts(handle))
        return known and (buffers.homeward is None or buffers.homeward.send_done)

    def dispatch(self, handle, rows, gates, direction):
        """Pack the tokens' rows [T, H], and each assignment's gate [T, K], and send them to their experts."""
        buffers, counts = self.in_flight_buffers[handle.buffer_index], handle.plan.counts
        self.pack(handle, rows, gates)
        buffers.direction, buffers.outward, buffers.homeward = direction, None, None
        self.make_room(buffers, int(counts.recv_edges[-1]))
        sides = {"send": buffers.home.buffer, "send_edges": counts.send_edges,
                 "recv": buffers.away.buffer, "recv_edges": counts.recv_edges}  # fmt: skip
        transfer, ready = self.make_transfer(handle, direction, **sides), self.device.compute_stream.record_event()
        buffers.outward = self.all_to_all.start(transfer, ready, None)
        self.count(handle, direction)

    def make_room(self, buffers, num_rows):
        """Have room for as many rows of others; where a buffer must grow the host waits for the device."""
        if num_rows > len(buffers.away):
            self.settle()
            buffers.away = None  # so that its memory can be had again
            buffers.away = Table(self.sizes, self.device, round_rows(num_rows))

    def settle(self):
        """Wait until the device has done what it was given, while messages go on and errors are noticed."""
        streams, backoff = (self.device.compute_stream, self.device.send_stream, self.device.recv_stream), Backoff()
        events = [stream.record_event() for stream in streams]
        while not all(event.query() for event in events):
            self.poke()
            backoff.pause()
        self.all_to_all.poke()  # which holds a transfer's buffers until it has seen that it is over

    def count(self, handle, direction):
        """Count what leaves for the experts."""
        leaving = handle.plan.counts.leaving.sum(axis=1)
        self.traffic.rows[direction] += leaving
        if direction == Direction.DISPATCH:
            self.traffic.assignments[handle.layer] = self.traffic.assignments.get(handle.layer, 0) + leaving

    def pack(self, handle, rows, gates):
        """Lay a row for each assignment that is sent, and its gate, into the buffer at home, by destination."""
        buffers, plan = self.in_flight_buffers[handle.buffer_index], handle.plan
        assignments = plan.assignments.limit_to(int(plan.counts.send_edges[-1]))
        self.device.row_ops.permute(rows.contiguous(), gates, assignments, buffers.home.part())

    def make_transfer(self, handle, direction, **sides):
        """Describe one way of a handle's rows -> Transfer."""
        name = f"{direction.name.lower()} of layer {handle.layer}, micro-batch {handle.micro_batch}"
        return Transfer(tag=tag_of(handle, direction, MessageKind.ROWS), name=name, **sides)

    def receive(self, handle):
        """Yield None until the rows for this rank's experts are on their way in order, then all of them as a batch."""
        yield from self.until_landed(handle)
        yield DeviceBatch(handle.plan.counts.coming, self.device)

    def receive_again(self, handle, batches):
        """Yield None until the rows are here again, then the number of the one batch."""
        yield from self.until_landed(handle)
        yield from range(len(batches))

    def until_landed(self, handle):
        """Yield None until what came out may be worked on, by whatever the compute stream does next."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        while not buffers.outward.recv_done:
            yield None
        self.device.compute_stream.wait_event(buffers.outward.event)

    def find_rows(self, handle, batch):
        """Find where a batch's rows lie, and its results are to be laid -> Places."""
        return Places(self.in_flight_buffers[handle.buffer_index], batch.order, batch.num_rows)

    def gather(self, places):
        """Gather the rows at these places [n] -> (fresh [n, H], their gate values [n])."""
        away = places.buffers.away
        rows = away.rows.new_empty(places.num_rows, self.sizes.hidden)
        gate_values = away.gate_values.new_empty(places.num_rows)
        self.device.row_ops.move(
            away.part(places.order, places.num_rows), RowView(values=rows, gate_values=gate_values)
        )
        return rows, gate_values

    def scatter(self, rows, places, gate_values=None):
        """Lay rows [n, H], and gate values [n] if any, down where the rows were from which they were computed."""
        source = RowView(values=rows.contiguous(), gate_values=gate_values)
        self.device.row_ops.move(source, places.buffers.away.part(places.order))

    def return_batch(self, handle, batch):
        """Send the results home, to where their tokens were packed."""
        buffers, counts = self.in_flight_buffers[handle.buffer_index], handle.plan.counts
        direction = HOMEWARD[buffers.direction]
        sides = {"send": buffers.away.buffer, "send_edges": counts.recv_edges,
                 "recv": buffers.home.buffer, "recv_edges": counts.send_edges}  # fmt: skip
        buffers.homeward = self.all_to_all.start(
            self.make_transfer(handle, direction, **sides), self.device.compute_stream.record_event(), buffers.outward
        )
        self.traffic.rows[direction] += counts.coming.sum(axis=1)

    def poll_results(self, handle):
        """Whether a micro-batch's results are home for whatever the compute stream does next."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        if buffers.homeward is None or not buffers.homeward.recv_done:
            return False
        self.device.compute_stream.wait_event(buffers.homeward.event)
        return True

    def combine(self, handle, gates):
        """Sum the rows that came home by token, an assignment's times its gate [T, K] -> fresh [T, H] float32."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        return self.device.row_ops.sum(buffers.home.rows, handle.plan.assignments.row_of_assignment, gates)

    def gather_gate_grads(self, handle):
        """Gather the gradients of the gates -> [T, K] float32, 0 where there is no assignment."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        gate_values = buffers.home.gate_values
        rows = replace_none_by_last(handle.plan.assignments.row_of_assignment, gate_values)
        return gate_values.index_select(0, rows.flatten()).view(rows.shape)
