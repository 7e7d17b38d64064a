"""Rows leave for their experts and return: dispatch and combine, each the other's backward.

outward   dispatch, and the backward of combine    tokens [T, H] at home         -> gathered by their experts
homeward  combine, and the backward of dispatch    results scattered to the home -> summed by token [T, H]

On one node a row is copied once each way: an expert gathers tokens straight from their home's part of the window, and
scatters results straight into it. Between nodes the same rows travel in messages (hpcmoe.dispatch.inbound).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcmoe.clock import Clock
from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.transport import Direction, Request, Transport
from hpcmoe.comm.window import Window
from hpcmoe.dispatch.arrivals import Arrivals, Batch, Key
from hpcmoe.dispatch.dispatcher import Chunk, ExchangeId, ExchangeProgress
from hpcmoe.dispatch.inbound import InboundReceiver, ReceivePool, view_trailer
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.outbound import InFlightBuffers, MessageSender
from hpcmoe.dispatch.plan import Plan, SlotChooser, make_plan
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import MIN_BATCH_ROWS, HostSizes, group_peers, make_pools, round_rows
from hpcmoe.wait import poke_all


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostHandle:
    """An exchange that has been dispatched: what receive, return_batch and combine need to know of it."""

    exchange: ExchangeId
    plan: Plan
    buffers: InFlightBuffers
    number: int  # of the exchange in these buffers, from 1
    arrivals: Arrivals
    returns: tuple[Request, ...]  # of messages that bring other nodes' sums home
    words: np.ndarray  # [P] int64 of all ranks, complete once all rows have come


class HostDispatcher(ExchangeProgress[InFlightBuffers]):
    """Carries rows through the node's window, and between nodes by MPI (see TokenDispatcher)."""

    sum_groups: dict[str, Any] | None = None
    works_at_once = False

    def __init__(
        self, transport: Transport, window: Window, device: HostDevice, clock: Clock, sizes: HostSizes, routes: Routes
    ) -> None:
        super().__init__(transport, clock)
        self.window, self.device, self.sizes, self.routes = window, device, sizes, routes
        self.repeats_order = sizes.deterministic
        self.table = window.table(sizes.dtype)  # [rows of all local peers, H]
        self.in_flight_buffers = [
            InFlightBuffers(index, sizes, window.first_row, device) for index in range(sizes.num_in_flight)
        ]
        pools = make_pools(sizes, window.first_row)
        self.receive_pool = ReceivePool(transport, window, routes, pools, sizes, self.count_rows)
        self.receivers: list[InboundReceiver] = []
        self.sender = MessageSender(transport, window, routes, sizes.row_bytes)
        self.groups = group_peers(routes, sizes)
        self.last_sequence_number = 0  # of the window, when it was last poked

    def poke(self) -> bool:
        """Advance messages, tasks and what this rank receives for others; return True if anything moved."""
        self.last_sequence_number = self.window.read_sequence_number()
        return self.poke_messages() | poke_all(self.receivers)

    def has_changed(self) -> bool:
        """Return True if any local peer has written to the descriptor table since the last poke."""
        return self.window.read_sequence_number() != self.last_sequence_number

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of this rank's share of the window, and of what it sends from."""
        sent = sum(buffers.send.numel() for buffers in self.in_flight_buffers)
        return self.window.num_bytes // self.window.num_local_peers + sent

    @property
    def is_idle(self) -> bool:
        """Return True if this rank has nothing left to do for others."""
        under_way = self.receivers or self.background_tasks
        return not under_way and all(request.done for buffers in self.in_flight_buffers for request in buffers.requests)

    def plan(self, experts: Tensor, kept: Tensor | None, chooser: SlotChooser) -> Plan:
        """Choose a replica for each assignment to experts [T, K], kept [T, K] bool, and return their plan."""
        # Host waits for the device here: it must know where the tokens go.
        slots = chooser.choose(experts.cpu().numpy())
        if kept is None:
            return self.make_plan(slots, np.ones(slots.shape, bool))
        return self.make_plan(slots, repeat_for_shards(kept, slots.shape[1] // experts.shape[1]).cpu().numpy())

    def make_plan(self, slots: np.ndarray, kept: np.ndarray) -> Plan:
        """Return the plan for assignments to slots [T, K], kept [T, K] bool."""
        return make_plan(slots, kept, self.routes, self.sizes.message_tokens, self.sizes.row_bytes)

    def poll_ready(self, plan: Plan, exchange: ExchangeId) -> bool:
        """Return True if an exchange can be announced: its local peers have read what it would overwrite."""
        self.raise_conflict()
        buffers = self.find_buffers(exchange)
        can_publish = self.window.may_post(buffers.index, buffers.num_exchanges + 1)
        return can_publish and all(request.done for request in buffers.requests)

    def dispatch(self, plan: Plan, rows: Tensor, gates: Tensor, exchange: ExchangeId) -> HostHandle:
        """Announce rows [T, H], and gates [T, K] beside them, to their experts; send what goes to other nodes."""
        buffers, window = self.find_buffers(exchange), self.window
        buffers.num_exchanges += 1
        number = buffers.num_exchanges
        notices = Notices(exchange.word, len(self.routes.publishers))
        arrivals = Arrivals(window, self.routes, buffers.index, number, notices)
        gate_values = gates.numpy(force=True).ravel()
        ready = self.device.put(rows, self.table[buffers.tokens : buffers.tokens + len(rows)])

        # Write beside each result row what it is computed from: permutation 1 (hpcmoe.dispatch.plan).
        results = slice(buffers.results, buffers.results + len(plan.assignments))
        window.sources[results] = buffers.tokens + plan.assignments // plan.top_k
        window.gate_values[results] = gate_values[plan.assignments]
        ready.synchronize()  # host waits for the device here: local peers read the rows from now on
        window.post(buffers.index, number, 0, (buffers.results, 1, exchange.word), plan.counts)

        # Send to other nodes, and receive from them.
        tag_of = functools.partial(exchange.tag, max_messages=window.sizes.max_messages)
        returns = self.sender.send(plan, buffers, gate_values, tag_of, exchange.word)
        if self.routes.senders:
            self.receivers.append(InboundReceiver(self.receive_pool, arrivals, exchange.direction, tag_of))
        self.count_dispatch(plan, exchange)
        return HostHandle(
            exchange=exchange,
            plan=plan,
            buffers=buffers,
            number=number,
            arrivals=arrivals,
            returns=tuple(returns),
            words=notices.words,
        )

    def count_dispatch(self, plan: Plan, exchange: ExchangeId) -> None:
        """Count what leaves for the experts."""
        self.count_rows(exchange.direction, self.routes.local_peers, plan.counts.sum(axis=1))
        for message in plan.messages:
            self.count_rows(exchange.direction, self.routes.receivers[message.receiver], message.num_tokens)
        self.count_assignments(exchange, plan.assignments_to_rank)

    def receive(self, handle: HostHandle) -> Iterator[Batch | None]:
        """Yield batches as rows reach this rank's experts, and None while there are none, until all have come."""
        read = self.read_in_order if self.sizes.in_order else self.read_by_arrival
        for descriptors in read(handle.arrivals):
            if descriptors is None:
                yield None
            elif descriptors:
                yield handle.arrivals.build_batch(descriptors)

    def poll_arrivals(self, arrivals: Arrivals) -> list[Key]:
        """Read new descriptors, and return those with rows for this rank. Raises ClusterError where calls differ."""
        found = arrivals.poll()
        self.raise_conflict(arrivals.notices)
        return found

    def read_by_arrival(self, arrivals: Arrivals) -> Iterator[list[Key] | None]:
        """Yield lists of descriptors as they come, enough of them for a GEMM of some rows, and None while too few.

        Messages wait for others only while these keep coming: room must become free for those that have none.
        """
        found, enough = list[Key](), MIN_BATCH_ROWS * self.routes.num_slots
        while len(arrivals.expected):
            fresh = self.poll_arrivals(arrivals)
            found += fresh
            fills_pool = any(descriptor > 0 for _, descriptor in found)  # a message's, which the next may wait for
            if len(arrivals.expected) and arrivals.count_rows(found) < enough and (fresh or not fills_pool):
                yield None
            else:
                yield found
                found = []

    def read_in_order(self, arrivals: Arrivals) -> Iterator[list[Key] | None]:
        """Yield lists of descriptors that are the same at every run, None while none is complete.

        They come in order if the run is to be deterministic, otherwise whichever group of peers is there.
        """
        groups = [arrivals.read_in_order(peers, self.sizes.messages_at_once) for peers in self.groups]
        while groups:
            self.poll_arrivals(arrivals)
            for group in groups[:1] if self.sizes.deterministic else list(groups):
                try:
                    found = next(group)
                except StopIteration:
                    groups.remove(group)
                    break
                if found is not None:
                    yield found
                    break
            else:
                yield None

    def receive_again(self, handle: HostHandle, batches: Sequence[Batch]) -> Iterator[int | None]:
        """Yield the indices of an earlier exchange's batches, of the same plans, as their rows come again, and None."""
        arrivals, left = handle.arrivals, list(enumerate(batches))
        while left or len(arrivals.expected):
            self.poll_arrivals(arrivals)
            ahead = left[:1] if self.sizes.deterministic else left
            ready = next((entry for entry in ahead if arrivals.has(entry[1])), None)
            if ready is not None:
                left.remove(ready)
            yield None if ready is None else ready[0]

    def split(self, handle: HostHandle, batch: Batch) -> Iterator[Chunk]:
        """Yield the chunks of a batch, their rows those of the results in the window [n]."""
        rows = handle.arrivals.find_rows(batch)
        for part, slots in batch.split(self.sizes.batch_rows, apart=self.routes.same_order):
            yield Chunk(rows=rows[part], slots=slots)

    def gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the tokens [m, H] from which result rows [n] are computed, and their gates [m]: permutation 2.

        m is n or a little more: a few different sizes of GEMM serve all. What is too much has the gate 0.
        """
        window, num_rows = self.window, round_rows(len(rows))
        sources, gates = np.full(num_rows, self.in_flight_buffers[0].zero), np.zeros(num_rows, np.float32)
        sources[: len(rows)], gates[: len(rows)] = window.sources[rows], window.gate_values[rows]
        tokens = self.device.gather(self.table, torch.from_numpy(sources))
        return tokens, torch.from_numpy(gates).to(self.device.torch_device)

    def scatter(self, results: Tensor, rows: np.ndarray, grad_gates: Tensor | None = None) -> None:
        """Write results [m, H], and gradients of gates [m] if any, to these rows [n]; those beyond n are padding."""
        self.device.scatter(results[: len(rows)].to(self.sizes.dtype), self.table, rows)
        if grad_gates is not None:
            self.window.gate_values[rows] = grad_gates[: len(rows)].numpy(force=True)

    def return_batch(self, handle: HostHandle, batch: Batch) -> None:
        """Mark a batch as done for the homes of its rows."""
        handle.arrivals.finish(batch)
        for publisher, descriptor in batch.descriptors:
            if descriptor == 0 or publisher != self.routes.local_index:  # a message that this rank received stays here
                num_rows = handle.arrivals.count_rows([(publisher, descriptor)])
                self.count_rows(handle.exchange.back().direction, self.routes.local_peers[publisher], num_rows)

    def poll_results(self, handle: HostHandle) -> bool:
        """Return True if all results of a micro-batch are home."""
        if not all(request.done for request in handle.returns):
            return False
        return self.window.is_done(handle.buffers.index, handle.number, 0, handle.plan.counts)

    def find_missing(self, handle: HostHandle) -> list[int]:
        """List the ranks without whose rows, or else results, an exchange cannot go on."""
        routes, index, plan = self.routes, handle.buffers.index, handle.plan
        if len(handle.arrivals.expected):
            return np.unique(handle.arrivals.expected[:, 2]).tolist()
        is_done = self.window.done[:, index, routes.local_index, 0] >= handle.number
        sent = zip(plan.messages, handle.returns, strict=False)
        of_others = [routes.receivers[message.receiver] for message, request in sent if not request.done]
        return np.unique([*routes.local_peers[plan.counts.any(axis=1) & ~is_done], *of_others]).tolist()

    def combine(self, handle: HostHandle, gates: Tensor) -> Tensor:
        """Return the results, times gates [T, K], summed by token -> fresh [T, H] of the rows' dtype: permutation 3."""
        plan, first, zero = handle.plan, handle.buffers.results, handle.buffers.zero
        rows = np.where(plan.row_of_assignment < 0, zero, first + plan.row_of_assignment)
        is_forward = handle.exchange.direction == Direction.DISPATCH
        if self.routes.same_order and len(self.routes.receivers) and is_forward:
            # As at receivers: products are rounded before they are added, whichever way they have come.
            own = self.table[first : first + len(plan.assignments)]
            own *= gates.cpu().flatten()[torch.from_numpy(plan.assignments)].to(own.dtype)[:, None]
            gates = torch.ones_like(gates)
        weights = torch.where(torch.from_numpy(plan.is_sum), 1.0, gates.cpu())
        return self.device.sum_rows(self.table, torch.from_numpy(rows), weights)

    def gather_gate_grads(self, handle: HostHandle) -> Tensor:
        """Return the gradients of the gates that came with the results -> [T, K] float32, 0 where none was sent."""
        plan, first = handle.plan, handle.buffers.results
        grads = np.zeros(plan.row_of_assignment.size, np.float32)
        grads[plan.assignments] = self.window.gate_values[first : first + len(plan.assignments)]
        for message in plan.messages:
            begin, end = first + message.first, first + message.first + message.num_rows(self.sizes.row_bytes)
            trailer = self.window.rows[begin + message.num_tokens : end]
            grads[message.assignments] = view_trailer(trailer, message.num_assignments)[1]
        return torch.from_numpy(grads).view(plan.row_of_assignment.shape).to(self.device.torch_device)
