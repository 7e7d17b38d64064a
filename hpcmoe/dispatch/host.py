"""Rows leave for their experts and return: dispatch and combine, each the other's backward.

outward   dispatch, and the backward of combine    tokens [T, H] at home      -> gathered by their experts
homeward  combine, and the backward of dispatch    results laid at home       -> summed by token [T, H]

On one node a row is copied once each way: an expert gathers tokens straight from their homes' part of the window, and
lays results straight into it. Between nodes the same rows pass through a message (hpcmoe.dispatch.inbound).
"""

import numpy as np
import torch

from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind, make_message_tag, make_tag
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.inbound import ReceivePool, Receiver, see_trailer
from hpcmoe.dispatch.plan import make_plan
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.dispatch.sizes import MIN_BATCH_ROWS, group_peers, make_pools, round_rows
from hpcmoe.dispatch.traffic import make_traffic
from hpcmoe.wait import poke_all

END = object()  # of a group of peers
PAUSES = 16  # between two looks at everything: looking costs more than asking whether there is anything new


class InFlightBuffers:
    """Where one micro-batch in flight keeps its tokens and results, and the exchange that is under way there."""

    def __init__(self, number, sizes, first_row, device):
        self.number = number
        self.tokens = first_row + number * sizes.home_window_rows  # first row in the window
        self.results = self.tokens + sizes.tokens
        self.zero = self.tokens + sizes.home_window_rows - 1  # a row that nobody writes
        self.send = device.make_buffer(sizes.sent_message_rows, sizes.row_bytes).tensor
        self.exchange, self.direction = 0, None  # number of the one under way, from 1; which way it goes out
        self.requests, self.returns = [], []  # of messages from here, and of those that come back
        self.arrivals = None


class HostDispatcher:
    """Carries the rows of one expert-parallel group for all layers and micro-batches."""

    sum_groups = None  # NCCL's, on GPUs

    def __init__(self, transport, window, device, clock, sizes, routes):
        self.transport, self.window, self.device, self.clock = transport, window, device, clock
        self.sizes, self.routes = sizes, routes
        self.table = window.table(sizes.dtype)  # all its rows as scalars
        self.in_flight_buffers = [
            InFlightBuffers(number, sizes, window.first_row, device) for number in range(sizes.num_in_flight)
        ]
        pools = make_pools(sizes, window.first_row)
        self.receive_pool = ReceivePool(transport, window, routes, pools, sizes, self.tally)
        self.receivers, self.background_tasks = [], []
        self.groups = group_peers(routes, sizes)
        self.traffic = make_traffic(self.transport.size)

    def pop_traffic(self):
        """Return what was sent since the last call -> Traffic."""
        traffic, self.traffic = self.traffic, make_traffic(self.transport.size)
        return traffic

    def register(self, task):
        """Poke this too from now on, until it is over."""
        self.background_tasks.append(task)

    def poke(self):
        """Let messages progress, and all that this rank lands for others, without waiting -> whether anything moved."""
        return self.transport.poke() | poke_all(self.background_tasks) | poke_all(self.receivers)

    def read_sequence_number(self):
        """Count how often any local peer has told anything."""
        return self.window.read_sequence_number()

    def wait_for_change(self, backoff, before):
        """Pause, a few times at most, until a message has moved or a local peer has told more than `before`."""
        for _ in range(PAUSES):
            backoff.pause()
            if self.transport.poke() or poke_all(self.background_tasks) or self.window.read_sequence_number() != before:
                return

    @property
    def buffer_bytes(self):
        """Memory that messages take on this rank: its share of the window, and what it sends from."""
        return self.window.num_bytes // self.window.num_local_peers + sum(
            buffers.send.numel() for buffers in self.in_flight_buffers
        )

    @property
    def is_idle(self):
        """Whether this rank has nothing left to do for others."""
        under_way = self.receivers or self.background_tasks
        return not under_way and all(request.done for buffers in self.in_flight_buffers for request in buffers.requests)

    def plan(self, routing, chooser):
        """Choose a replica for each assignment of a Routing, and find its way -> Plan."""
        # Host waits for the device here: it must know where the tokens go.
        experts = routing.experts.cpu().numpy()
        slots = chooser.choose(experts)
        kept = repeat_for_shards(routing.kept, slots.shape[1] // experts.shape[1])
        return self.make_plan(slots, np.ones(slots.shape, bool) if kept is None else kept.cpu().numpy())

    def make_plan(self, slots, kept):
        """Find the way of each kept assignment -> Plan: slots [T, K], kept [T, K] bool."""
        return make_plan(slots, kept, self.routes, self.sizes.message_tokens, self.sizes.row_bytes)

    def poll_ready(self, handle):
        """Whether the next exchange of a micro-batch can be announced: its local peers have read what it would overwrite."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        return self.window.may_post(buffers.number, buffers.exchange + 1) and all(t.done for t in buffers.requests)

    def dispatch(self, handle, rows, gates, direction):
        """Offer the tokens' rows [T, H], and each assignment's gate [T, K], to the experts that the handle's plan names."""
        buffers, plan, window = self.in_flight_buffers[handle.buffer_index], handle.plan, self.window
        buffers.exchange, buffers.direction = buffers.exchange + 1, direction
        buffers.arrivals = Arrivals(window, self.routes, buffers.number, buffers.exchange)
        gates = gates.numpy(force=True).ravel()
        ready = self.device.put(rows, self.table[buffers.tokens : buffers.tokens + len(rows)])

        # Say of each result row what it is computed from.
        results = slice(buffers.results, buffers.results + len(plan.assignments))
        window.sources[results] = buffers.tokens + plan.assignments // plan.top_k
        window.gate_values[results] = gates[plan.assignments]
        ready.synchronize()  # host waits for the device here: local peers read the rows from now on
        window.post(buffers.number, buffers.exchange, 0, buffers.results, 1, plan.counts)

        if len(self.routes.receivers):
            self.send_messages(handle, gates, direction)
        if self.routes.senders:
            self.receivers.append(
                Receiver(self.receive_pool, buffers.number, buffers.exchange, direction, self.tags(handle, direction))
            )
        self.count(handle, direction)

    def send_messages(self, handle, gates, direction):
        """Send the headers of all messages to their receivers, and the messages; expect their sums."""
        buffers, plan, transport = self.in_flight_buffers[handle.buffer_index], handle.plan, self.transport
        tag_of, window, row_bytes = self.tags(handle, direction), self.window, self.sizes.row_bytes
        of_receiver = [[] for _ in self.routes.receivers]
        for message in plan.messages:
            of_receiver[message.receiver].append(message)
        buffers.requests, buffers.returns = [], []
        for peer, messages in zip(self.routes.receivers.tolist(), of_receiver, strict=True):
            header = [[len(messages)], *([message.num_tokens, *message.counts.ravel()] for message in messages)]
            buffers.requests.append(transport.send_words(np.concatenate(header), peer, tag_of(MessageKind.HEADER)))
            for number, message in enumerate(messages):
                num_rows = message.num_rows(row_bytes)
                home = buffers.results + message.first
                rows = window.rows[home : home + num_rows]
                buffers.returns.append(transport.recv_rows(rows, peer, tag_of(MessageKind.RETURN, number)))
                first = message.first - len(plan.assignments)
                rows = buffers.send[first : first + num_rows].numpy()
                self.pack(rows, buffers.tokens, message, gates)
                buffers.requests.append(transport.send_rows(rows, peer, tag_of(MessageKind.ROWS, number)))

    def pack(self, rows, first, message, gates):
        """Lay a message's tokens, of those from window row `first` on, and its assignments' gate values into a message."""
        np.take(self.window.rows, first + message.tokens, axis=0, out=rows[: message.num_tokens], mode="clip")
        tokens, gate_values = see_trailer(rows[message.num_tokens :], message.num_assignments)
        tokens[:], gate_values[:] = message.token_of_assignment, gates[message.assignments]

    def count(self, handle, direction):
        """Count what leaves for the experts."""
        plan = handle.plan
        self.tally(direction, self.routes.local_peers, plan.counts.sum(axis=1))
        for message in plan.messages:
            self.tally(direction, self.routes.receivers[message.receiver], message.num_tokens)
        if direction == Direction.DISPATCH:
            self.traffic.assignments[handle.layer] = (
                self.traffic.assignments.get(handle.layer, 0) + plan.assignments_to_rank
            )

    def tally(self, direction, ranks, rows):
        """Count rows that go from here to other ranks."""
        self.traffic.rows[direction, ranks] += rows

    def receive(self, handle):
        """Yield Batches as rows reach this rank's experts, and None while there are none, until all have come."""
        arrivals = self.in_flight_buffers[handle.buffer_index].arrivals
        runs = self.runs_in_order(arrivals) if self.sizes.in_order else self.runs_by_arrival(arrivals)
        for run in runs:
            if run is None:
                yield None
            elif run:
                yield arrivals.batch_of(run)

    def runs_by_arrival(self, arrivals):
        """Yield lists of descriptors as they come, enough of them for a GEMM of some rows; None while there are too few.

        Messages wait for others only while these keep coming: room must become free for those that have none.
        """
        run, enough = [], MIN_BATCH_ROWS * self.routes.num_slots
        while len(arrivals.expected):
            fresh = arrivals.poll()
            run += fresh
            takes_room = any(descriptor > 0 for _, descriptor in run)  # a message's, which the next may be waiting for
            if len(arrivals.expected) and arrivals.count_rows(run) < enough and (fresh or not takes_room):
                yield None
            else:
                yield run
                run = []

    def runs_in_order(self, arrivals):
        """Yield lists of descriptors that are the same at every run, None while none is complete.

        They come in order if the run is to be deterministic, otherwise whichever group of peers is there.
        """
        groups = [arrivals.runs(peers, self.sizes.messages_at_once) for peers in self.groups]
        while groups:
            arrivals.poll()
            run = None
            for group in groups[:1] if self.sizes.deterministic else list(groups):
                run = next(group, END)
                if run is END:
                    groups.remove(group)
                if run is not None:
                    break
            if run is not END:
                yield run

    def receive_again(self, handle, batches):
        """Yield the indices of these batches, of the same plans, as their rows come again, and None meanwhile."""
        arrivals, left = self.in_flight_buffers[handle.buffer_index].arrivals, list(enumerate(batches))
        while left or len(arrivals.expected):
            arrivals.poll()
            ahead = left[:1] if self.sizes.deterministic else left
            ready = next((entry for entry in ahead if arrivals.has(entry[1])), None)
            if ready is not None:
                left.remove(ready)
            yield None if ready is None else ready[0]

    def find_rows(self, handle, batch):
        """Find where a batch's results are to be laid -> rows of the window [n] int64."""
        return self.in_flight_buffers[handle.buffer_index].arrivals.rows(batch)

    def gather(self, results):
        """Gather the tokens from which these result rows [n] are computed -> (fresh [m, H], their gate values [m]).

        m is n or a little more: a few different sizes of GEMM serve all. What is too much has the number 0.
        """
        window, num_rows = self.window, round_rows(len(results))
        sources, gate_values = np.full(num_rows, self.in_flight_buffers[0].zero), np.zeros(num_rows, np.float32)
        sources[: len(results)], gate_values[: len(results)] = window.sources[results], window.gate_values[results]
        rows = self.device.gather(self.table, torch.from_numpy(sources))
        return rows, torch.from_numpy(gate_values).to(self.device.torch_device)

    def scatter(self, rows, results, gate_values=None):
        """Lay rows [m, H], and gate values [m] if any, down at these result rows [n]; those beyond n are dropped."""
        rows = rows[: len(results)].to(self.sizes.dtype)
        self.device.scatter(rows, self.table, results)
        if gate_values is not None:
            self.window.gate_values[results] = gate_values[: len(results)].numpy(force=True)

    def return_batch(self, handle, batch):
        """Tell the homes of a batch's rows that its results are there."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        buffers.arrivals.finish(batch)
        for descriptor in batch.descriptors:
            if (
                descriptor[1] == 0 or descriptor[0] != self.routes.local_index
            ):  # what this rank has landed itself stays with it
                home = self.routes.local_peers[descriptor[0]]
                self.tally(HOMEWARD[buffers.direction], home, buffers.arrivals.count_rows([descriptor]))

    def poll_results(self, handle):
        """Whether all results of a micro-batch are home."""
        buffers = self.in_flight_buffers[handle.buffer_index]
        if not all(request.done for request in buffers.returns):
            return False
        return self.window.is_done(buffers.number, buffers.exchange, 0, handle.plan.counts)

    def combine(self, handle, gates):
        """Sum the rows that came home by token, an assignment's times its gate [T, K] -> fresh [T, H] of the rows' dtype."""
        buffers, plan = self.in_flight_buffers[handle.buffer_index], handle.plan
        rows = np.where(plan.row_of_entry < 0, buffers.zero, buffers.results + plan.row_of_entry)
        if self.routes.same_order and len(self.routes.receivers) and buffers.direction == Direction.DISPATCH:
            # As where messages land: products are rounded before they are added, whichever way they have come.
            own = self.table[buffers.results : buffers.results + len(plan.assignments)]
            own *= gates.cpu().flatten()[torch.from_numpy(plan.assignments)].to(own.dtype)[:, None]
            gates = torch.ones_like(gates)
        weights = torch.where(torch.from_numpy(plan.is_sum), 1.0, gates.cpu())
        return self.device.sum_rows(self.table, torch.from_numpy(rows), weights)

    def gather_gate_grads(self, handle):
        """Gather the gradients of the gates -> [T, K] float32, 0 where there is no assignment."""
        buffers, plan = self.in_flight_buffers[handle.buffer_index], handle.plan
        gate_values = np.zeros(plan.row_of_entry.size, np.float32)
        gate_values[plan.assignments] = self.window.gate_values[
            buffers.results : buffers.results + len(plan.assignments)
        ]
        for message in plan.messages:
            first = buffers.results + message.first + message.num_tokens
            trailer = self.window.rows[first : buffers.results + message.first + message.num_rows(self.sizes.row_bytes)]
            gate_values[message.assignments] = see_trailer(trailer, message.num_assignments)[1]
        return torch.from_numpy(gate_values).view(plan.row_of_entry.shape).to(self.device.torch_device)

    def tags(self, handle, direction):
        """Number the messages of a micro-batch's exchange -> tag_of(part, message=0)."""
        tag = make_tag(handle.micro_batch, direction)
        max_messages = self.window.sizes.max_messages
        return lambda part, message=0: make_message_tag(tag, part, message, max_messages)
