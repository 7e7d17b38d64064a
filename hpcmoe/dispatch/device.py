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
from hpcmoe.dispatch.router import for_shards
from hpcmoe.dispatch.sizes import Sizes, round_rows
from hpcmoe.dispatch.traffic import no_traffic
from hpcmoe.wait import Backoff, poke_all

ALIGNMENT = 16  # bytes; GEMMs and copies read no row faster than those that begin there
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
        """Rows of a micro-batch's copies, and one that is zero."""
        return self.tokens * self.top_k + 1

    @property
    def away_rows(self):
        """Rows that find room at this rank's experts without growth."""
        return max(int(self.expert_rows * self.buffer_factor), 1)

    def buffer_bytes(self, _routes):
        """Memory that messages take on this rank's device."""
        return self.num_berths * (self.home_rows + self.away_rows) * self.row_bytes


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


class DeviceBerth:
    """Where one micro-batch in flight has its rows, at home and at this rank's experts."""

    def __init__(self, sizes, device):
        self.home = Table(sizes, device, sizes.home_rows)  # copies out, and their results back
        self.away = Table(sizes, device, sizes.away_rows)  # others' copies, and their results
        self.direction = None
        self.outward = self.homeward = None  # Request

    def is_over(self):
        """Whether nothing is under way from or to these rows."""
        return all(request is None or request.is_over() for request in (self.outward, self.homeward))


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of a berth: where a batch's rows lie."""

    berth: DeviceBerth
    order: torch.Tensor | None  # [n] int64; None: the first n
    num_rows: int

    def __getitem__(self, part):
        """Mean a portion: all of them, for a batch has no other."""
        if part != slice(0, self.num_rows):
            raise IndexError(f"{part} of {self.num_rows} rows that are worked on at once")
        return self


class DeviceExchange:
    """Carries the rows of one expert-parallel group for all layers and micro-batches."""

    def __init__(self, all_to_all, transport, device, clock, ways, sum_groups=None):
        """all_to_all takes the rows; transport, by MPI, the counts; ways are (DeviceSizes, Routes).

        sum_groups: NCCL's Groups that sum gradients, by name, where it carries the rows of a training.
        """
        self.all_to_all, self.transport, self.device, self.clock = all_to_all, transport, device, clock
        (self.sizes, self.routes), self.sum_groups = ways, sum_groups
        self.num_slots = len(self.routes.place_of_slot)
        self.berths = [DeviceBerth(self.sizes, device) for _ in range(self.sizes.num_berths)]
        device.row_ops.prepare(self.berths[0].home.rows)
        self.choosers, self.background_tasks = weakref.WeakKeyDictionary(), []
        self.traffic = no_traffic(self.transport.size)

    def take_traffic(self):
        """Return what was sent since the last call -> Traffic."""
        traffic, self.traffic = self.traffic, no_traffic(self.transport.size)
        return traffic

    def register(self, task):
        """Poke this too from now on, until it is over."""
        self.background_tasks.append(task)

    def poke(self):
        """Let messages and background tasks progress, without waiting -> whether anything moved."""
        return self.transport.poke() | self.all_to_all.poke() | poke_all(self.background_tasks)

    def count_news(self):
        """Nothing is told but by messages."""
        return 0

    def wait_for_news(self, backoff, before):
        """Pause, a few times at most, until a message has moved."""
        for _ in range(PAUSES):
            backoff.pause()
            if self.poke():
                return

    @property
    def buffer_bytes(self):
        """Memory that messages take on this rank's device."""
        return sum(len(buffer) for berth in self.berths for buffer in (berth.home, berth.away)) * self.sizes.row_bytes

    @property
    def is_idle(self):
        """Whether this rank has nothing left to do for others."""
        return not self.background_tasks and all(berth.is_over() for berth in self.berths)

    def plan(self, routing, chooser):
        """Choose a replica for each copy of a Routing, and find its way -> DevicePlan, made on the device."""
        if chooser not in self.choosers:
            self.choosers[chooser] = DeviceChooser(chooser, self.device.torch_device)
        slots = self.choosers[chooser].choose(routing.experts)
        return self.make_plan(slots, for_shards(routing.kept, slots.shape[1] // routing.experts.shape[1]))

    def make_plan(self, slots, kept):
        """Find the way of each kept copy -> DevicePlan: slots [T, K], kept [T, K] bool, or None where all are."""
        slots = torch.as_tensor(slots, device=self.device.torch_device)
        kept = None if kept is None else torch.as_tensor(kept, device=self.device.torch_device)
        return DevicePlan(slots, kept, self.num_slots, self.device)

    def may_start(self, flight):
        """Whether the next transfer of a micro-batch can begin: all counts are known, and its rows are free."""
        berth, counts = self.berths[flight.berth], flight.plan.counts
        known = counts.are_known(self.transport, tag_of_counts(flight))
        return known and (berth.homeward is None or berth.homeward.send_done)

    def start_outward(self, flight, rows, gates, direction):
        """Pack the tokens' rows [T, H], and each copy's gate [T, K], and send them to their experts."""
        berth, counts = self.berths[flight.berth], flight.plan.counts
        self.pack(flight, rows, gates)
        berth.direction, berth.outward, berth.homeward = direction, None, None
        self.make_room(berth, int(counts.recv_edges[-1]))
        sides = {"send": berth.home.buffer, "send_edges": counts.send_edges,
                 "recv": berth.away.buffer, "recv_edges": counts.recv_edges}  # fmt: skip
        transfer, ready = self.make_transfer(flight, direction, **sides), self.device.compute_stream.record_event()
        berth.outward = self.all_to_all.start(transfer, ready, None)
        self.count(flight, direction)

    def make_room(self, berth, num_rows):
        """Have room for as many rows of others; where a buffer must grow the host waits for the device."""
        if num_rows > len(berth.away):
            self.settle()
            berth.away = None  # so that its memory can be had again
            berth.away = Table(self.sizes, self.device, round_rows(num_rows))

    def settle(self):
        """Wait until the device has done what it was given, while messages go on and errors are noticed."""
        streams, backoff = (self.device.compute_stream, self.device.send_stream, self.device.recv_stream), Backoff()
        events = [stream.record_event() for stream in streams]
        while not all(event.query() for event in events):
            self.poke()
            backoff.pause()
        self.all_to_all.poke()  # which holds a transfer's buffers until it has seen that it is over

    def count(self, flight, direction):
        """Count what leaves for the experts."""
        leaving = flight.plan.counts.leaving.sum(axis=1)
        self.traffic.rows[direction] += leaving
        if direction == Direction.DISPATCH:
            self.traffic.copies[flight.layer] = self.traffic.copies.get(flight.layer, 0) + leaving

    def pack(self, flight, rows, gates):
        """Lay a row for each copy that is sent, and its gate, into the buffer at home, by destination."""
        berth, plan = self.berths[flight.berth], flight.plan
        copies = plan.copies.limit_to(int(plan.counts.send_edges[-1]))
        self.device.row_ops.permute(rows.contiguous(), gates, copies, berth.home.part())

    def make_transfer(self, flight, direction, **sides):
        """Describe one way of a flight's rows -> Transfer."""
        name = f"{direction.name.lower()} of layer {flight.layer}, micro-batch {flight.micro_batch}"
        return Transfer(tag=tag_of(flight, direction, MessageKind.PARCEL), name=name, **sides)

    def batches(self, flight):
        """Yield None until the rows for this rank's experts are on their way in order, then all of them as a batch."""
        yield from self.until_landed(flight)
        yield DeviceBatch(flight.plan.counts.coming, self.device)

    def batches_again(self, flight, batches):
        """Yield None until the rows are here again, then the number of the one batch."""
        yield from self.until_landed(flight)
        yield from range(len(batches))

    def until_landed(self, flight):
        """Yield None until what came out may be worked on, by whatever the compute stream does next."""
        berth = self.berths[flight.berth]
        while not berth.outward.recv_done:
            yield None
        self.device.compute_stream.wait_event(berth.outward.event)

    def rows_of(self, flight, batch):
        """Find where a batch's rows lie, and its results are to be laid -> Places."""
        return Places(self.berths[flight.berth], batch.order, batch.num_rows)

    def take(self, places):
        """Gather the rows at these places [n] -> (fresh [n, H], their gate values [n])."""
        away = places.berth.away
        rows = away.rows.new_empty(places.num_rows, self.sizes.hidden)
        gate_values = away.gate_values.new_empty(places.num_rows)
        self.device.row_ops.move(
            away.part(places.order, places.num_rows), RowView(values=rows, gate_values=gate_values)
        )
        return rows, gate_values

    def lay(self, rows, places, gate_values=None):
        """Lay rows [n, H], and gate values [n] if any, down where the rows were from which they were computed."""
        source = RowView(values=rows.contiguous(), gate_values=gate_values)
        self.device.row_ops.move(source, places.berth.away.part(places.order))

    def finish(self, flight, batch):
        """Send the results home, to where their tokens were packed."""
        berth, counts = self.berths[flight.berth], flight.plan.counts
        direction = HOMEWARD[berth.direction]
        sides = {"send": berth.away.buffer, "send_edges": counts.recv_edges,
                 "recv": berth.home.buffer, "recv_edges": counts.send_edges}  # fmt: skip
        berth.homeward = self.all_to_all.start(
            self.make_transfer(flight, direction, **sides), self.device.compute_stream.record_event(), berth.outward
        )
        self.traffic.rows[direction] += counts.coming.sum(axis=1)

    def is_home(self, flight):
        """Whether a micro-batch's results are home for whatever the compute stream does next."""
        berth = self.berths[flight.berth]
        if berth.homeward is None or not berth.homeward.recv_done:
            return False
        self.device.compute_stream.wait_event(berth.homeward.event)
        return True

    def sum_home(self, flight, gates):
        """Sum the rows that came home by token, a copy's times its gate [T, K] -> fresh [T, H] float32."""
        berth = self.berths[flight.berth]
        return self.device.row_ops.sum(berth.home.rows, flight.plan.copies.row_of_assignment, gates)

    def gather_gate_grads(self, flight):
        """Gather the gradients of the gates -> [T, K] float32, 0 where there is no copy."""
        berth = self.berths[flight.berth]
        gate_values = berth.home.gate_values
        rows = replace_none_by_last(flight.plan.copies.row_of_assignment, gate_values)
        return gate_values.index_select(0, rows.flatten()).view(rows.shape)
