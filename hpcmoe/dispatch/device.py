"""Rows leave for their experts and return, on GPUs: the same two ways as on the host, from device to device.

outward   dispatch, and the backward of combine    tokens gathered by destination, sent, gathered by expert
homeward  combine, and the backward of dispatch    results sent from where the tokens lay, to where these were packed

A row is as wide as a token and ends in a gate. The host knows how many rows go where, and nothing else: packing,
transfer, experts, return and sum follow each other by events.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcmoe.clock import Clock
from hpcmoe.comm.all_to_all import AllToAll, Transfer, TransferRequest
from hpcmoe.comm.device import Device
from hpcmoe.comm.rows import RowView, replace_none_by_last
from hpcmoe.comm.transport import MessageKind, Transport
from hpcmoe.dispatch.device_plan import DeviceBatch, DeviceChooser, DevicePlan
from hpcmoe.dispatch.dispatcher import Chunk, ExchangeId, ExchangeProgress
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import DeviceSizes, round_rows
from hpcmoe.wait import Backoff


class Table:
    """A buffer of message rows, as typed views of the same memory."""

    def __init__(self, sizes: DeviceSizes, device: Device, num_rows: int) -> None:
        self.buffer = device.make_buffer(num_rows, sizes.row_bytes)
        self.rows = self.buffer.tensor.view(sizes.dtype)[:, : sizes.hidden]  # [n, H]
        self.gate_values = self.buffer.tensor.view(torch.float32)[:, -1]  # [n], at the end of each row

    def __len__(self) -> int:
        return len(self.buffer)

    def view(self, order: Tensor | None = None, num_rows: int | None = None) -> RowView:
        """Return rows in an order, or the first num_rows, or all, as row ops read or write them."""
        end = num_rows if order is None else None
        return RowView(values=self.rows[:end], gate_values=self.gate_values[:end], order=order)


class DeviceInFlightBuffers:
    """Where one micro-batch in flight has its rows, at home and at this rank's experts."""

    def __init__(self, sizes: DeviceSizes, device: Device) -> None:
        self.home = Table(sizes, device, sizes.home_rows)  # assignments out, and their results back
        self.away = Table(sizes, device, sizes.away_rows)  # others' assignments, and their results
        self.outward: TransferRequest | None = None
        self.homeward: TransferRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceHandle:
    """An exchange that has been dispatched: what receive, return_batch and combine need to know of it."""

    exchange: ExchangeId
    plan: DevicePlan
    buffers: DeviceInFlightBuffers
    outward: TransferRequest
    words: np.ndarray  # [P] int64 of all ranks


class DeviceDispatcher(ExchangeProgress[DeviceInFlightBuffers]):
    """Carries rows from device to device (see TokenDispatcher)."""

    works_at_once = repeats_order = True

    def __init__(
        self,
        all_to_all: AllToAll,
        transport: Transport,
        device: Device,
        clock: Clock,
        sizes: DeviceSizes,
        routes: Routes,
        sum_groups: dict[str, Any] | None = None,
    ) -> None:
        """all_to_all carries the rows; transport, by MPI, the counts.

        sum_groups: NCCL's groups that sum gradients, by name, where it carries the rows of a training.
        """
        super().__init__(transport, clock, all_to_all)
        self.all_to_all, self.device, self.sizes, self.routes = all_to_all, device, sizes, routes
        self.sum_groups = sum_groups
        self.num_slots = len(routes.place_of_slot)
        self.in_flight_buffers = [DeviceInFlightBuffers(sizes, device) for _ in range(sizes.num_in_flight)]
        device.row_ops.prepare(self.in_flight_buffers[0].home.rows)
        self.choosers = weakref.WeakKeyDictionary[SlotChooser, DeviceChooser]()

    def poke(self) -> bool:
        """Advance messages and tasks without waiting, and return True if anything moved."""
        return self.poke_messages()

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of this rank's buffers on the device."""
        tables = [table for buffers in self.in_flight_buffers for table in (buffers.home, buffers.away)]
        return sum(map(len, tables)) * self.sizes.row_bytes

    @property
    def is_idle(self) -> bool:
        """Return True if this rank has nothing left to do for others."""
        requests = [request for buffers in self.in_flight_buffers for request in (buffers.outward, buffers.homeward)]
        return not self.background_tasks and all(request is None or request.done for request in requests)

    def plan(self, experts: Tensor, kept: Tensor | None, chooser: SlotChooser) -> DevicePlan:
        """Choose a replica for each assignment to experts [T, K], kept [T, K] bool, and return their plan."""
        if chooser not in self.choosers:
            self.choosers[chooser] = DeviceChooser(chooser, self.device.torch_device)
        slots = self.choosers[chooser].choose(experts)
        num_shards = slots.shape[1] // experts.shape[1]
        return self.make_plan(slots, None if kept is None else repeat_for_shards(kept, num_shards))

    def make_plan(self, slots: Any, kept: Any) -> DevicePlan:
        """Return the plan for assignments to slots [T, K], kept [T, K] bool, or None where all are."""
        slots = torch.as_tensor(slots, device=self.device.torch_device)
        kept = None if kept is None else torch.as_tensor(kept, device=self.device.torch_device)
        return DevicePlan(slots, kept, self.num_slots, self.device)

    def poll_ready(self, plan: DevicePlan, exchange: ExchangeId) -> bool:
        """Return True if an exchange can start: its rows are free, and all headers here. Send this rank's.

        No row is sent or received before all ranks are known to make the same call.
        """
        self.raise_conflict()
        are_known = plan.poll_headers(self.transport, exchange.tag(MessageKind.HEADER), exchange.word)
        self.raise_conflict(plan.notices)
        homeward = self.find_buffers(exchange).homeward
        return are_known and (homeward is None or homeward.send_done)

    def dispatch(self, plan: DevicePlan, rows: Tensor, gates: Tensor, exchange: ExchangeId) -> DeviceHandle:
        """Pack rows [T, H], and gates [T, K] beside them, by destination, and send them to their experts."""
        buffers, words = self.find_buffers(exchange), plan.consume_headers()
        self.pack(plan, rows, gates, buffers)
        buffers.outward = buffers.homeward = None
        self.reserve(buffers, int(plan.recv_edges[-1]))
        outward = Transfer(
            tag=exchange.tag(MessageKind.ROWS),
            name=str(exchange),
            send=buffers.home.buffer,
            send_edges=plan.send_edges,
            recv=buffers.away.buffer,
            recv_edges=plan.recv_edges,
        )
        buffers.outward = self.all_to_all.start(outward, self.device.compute_stream.record_event(), None)
        leaving = plan.leaving.sum(axis=1)
        self.count_rows(exchange.direction, slice(None), leaving)
        self.count_assignments(exchange, leaving)
        return DeviceHandle(exchange=exchange, plan=plan, buffers=buffers, outward=buffers.outward, words=words)

    def reserve(self, buffers: DeviceInFlightBuffers, num_rows: int) -> None:
        """Allocate more rows for others where these are too many; the host then waits for the device."""
        if num_rows > len(buffers.away):
            self.settle()
            del buffers.away  # so that its memory can be had again
            buffers.away = Table(self.sizes, self.device, round_rows(num_rows))

    def settle(self) -> None:
        """Wait until the device has done what it was given, while messages go on and errors are noticed."""
        streams, backoff = (self.device.compute_stream, self.device.send_stream, self.device.recv_stream), Backoff()
        events = [stream.record_event() for stream in streams]
        while not all(event.query() for event in events):
            self.poke()
            backoff.pause()
        self.all_to_all.poke()  # which holds a transfer's buffers until it has seen that it is over

    def pack(self, plan: DevicePlan, rows: Tensor, gates: Tensor, buffers: DeviceInFlightBuffers) -> None:
        """Write a row for each assignment that is sent, and its gate, into the buffer at home: permutation 1."""
        assignments = plan.assignments.limit_to(int(plan.send_edges[-1]))
        self.device.row_ops.permute(rows.contiguous(), gates, assignments, buffers.home.view())

    def receive(self, handle: DeviceHandle) -> Iterator[DeviceBatch | None]:
        """Yield None until the rows for this rank's experts are on their way in order, then all of them as a batch."""
        yield from self.until_received(handle)
        yield DeviceBatch(handle.plan.coming, self.device)

    def receive_again(self, handle: DeviceHandle, batches: Sequence[DeviceBatch]) -> Iterator[int | None]:
        """Yield None until the rows are here again, then the index of the one batch."""
        yield from self.until_received(handle)
        yield from range(len(batches))

    def until_received(self, handle: DeviceHandle) -> Iterator[None]:
        """Yield None until rows may be read by whatever the compute stream is given next, which is made to wait."""
        while not handle.outward.recv_done:
            yield None
        self.device.compute_stream.wait_event(handle.outward.event)

    def split(self, handle: DeviceHandle, batch: DeviceBatch) -> Iterator[Chunk]:
        """Yield the one chunk of a batch, if it has rows: the GEMMs of all slots are one."""
        if batch.num_rows:
            slots = [(slot, rows) for slot, rows in enumerate(batch.rows_of_slot.tolist()) if rows]
            yield Chunk(rows=handle.buffers.away.view(batch.order, batch.num_rows), slots=slots)

    def gather(self, rows: RowView) -> tuple[Tensor, Tensor]:
        """Return these rows [n, H] and their gates [n], both fresh: permutation 2."""
        num_rows = len(rows.values if rows.order is None else rows.order)
        values = rows.values.new_empty(num_rows, self.sizes.hidden)
        gates = rows.values.new_empty(num_rows, dtype=torch.float32)
        self.device.row_ops.move(rows, RowView(values=values, gate_values=gates))
        return values, gates

    def scatter(self, results: Tensor, rows: RowView, grad_gates: Tensor | None = None) -> None:
        """Write results [n, H], and gradients of gates [n] if any, to the rows from which they were computed."""
        self.device.row_ops.move(RowView(values=results.contiguous(), gate_values=grad_gates), rows)

    def return_batch(self, handle: DeviceHandle, batch: DeviceBatch) -> None:
        """Send the results home, to where their tokens were packed."""
        exchange, plan, buffers = handle.exchange, handle.plan, handle.buffers
        homeward = Transfer(
            tag=exchange.back().tag(MessageKind.ROWS),
            name=str(exchange.back()),
            send=buffers.away.buffer,
            send_edges=plan.recv_edges,
            recv=buffers.home.buffer,
            recv_edges=plan.send_edges,
        )
        buffers.homeward = self.all_to_all.start(homeward, self.device.compute_stream.record_event(), handle.outward)
        self.count_rows(exchange.back().direction, slice(None), plan.coming.sum(axis=1))

    def poll_results(self, handle: DeviceHandle) -> bool:
        """Return True if all results are home; the compute stream is then made to wait for them."""
        homeward = handle.buffers.homeward
        if homeward is None or not homeward.recv_done:
            return False
        self.device.compute_stream.wait_event(homeward.event)
        return True

    def combine(self, handle: DeviceHandle, gates: Tensor) -> Tensor:
        """Return the results, times gates [T, K], summed by token -> fresh [T, H] float32: permutation 3."""
        return self.device.row_ops.sum(handle.buffers.home.rows, handle.plan.assignments.row_of_assignment, gates)

    def gather_gate_grads(self, handle: DeviceHandle) -> Tensor:
        """Return the gradients of the gates that came with the results -> [T, K] float32, 0 where none was sent."""
        gate_values = handle.buffers.home.gate_values
        rows = replace_none_by_last(handle.plan.assignments.row_of_assignment, gate_values)
        return gate_values.index_select(0, rows.flatten()).view(rows.shape)
