"""Rows leave for their experts and return: dispatch and combine, each the other's backward.

outward   dispatch, and the backward of combine    tokens [T, H] at home      -> gathered by their experts
homeward  combine, and the backward of dispatch    results laid at home       -> summed by token [T, H]

On one node a row is copied once each way: an expert gathers tokens straight from their homes' part of the window, and
lays results straight into it. Between nodes the same rows pass through a parcel (hpcmoe.dispatch.inbound).
"""

import numpy as np
import torch

from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind, make_message_tag, make_tag
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.inbound import Hall, Landing, see_trailer
from hpcmoe.dispatch.plan import make_plan
from hpcmoe.dispatch.router import for_shards
from hpcmoe.dispatch.sizes import MIN_BATCH_ROWS, group_peers, make_pools, round_rows
from hpcmoe.dispatch.traffic import no_traffic
from hpcmoe.wait import poke_all

END = object()  # of a group of peers
PAUSES = 16  # between two looks at everything: looking costs more than asking whether there is anything new


class Berth:
    """Where one micro-batch in flight keeps its tokens and results, and the exchange that is under way there."""

    def __init__(self, number, sizes, first_row, device):
        self.number = number
        self.tokens = first_row + number * sizes.home_window_rows  # first row in the window
        self.results = self.tokens + sizes.tokens
        self.zero = self.tokens + sizes.home_window_rows - 1  # a row that nobody writes
        self.send = device.make_buffer(sizes.parcel_rows, sizes.row_bytes)
        self.exchange, self.direction = 0, None  # number of the one under way, from 1; which way it goes out
        self.requests, self.returns = [], []  # of messages from here, and of those that come back
        self.arrivals = None


class Exchange:
    """Carries the rows of one expert-parallel group for all layers and micro-batches."""

    sum_groups = None  # NCCL's, on GPUs

    def __init__(self, transport, window, device, clock, sizes, routes):
        self.transport, self.window, self.device, self.clock = transport, window, device, clock
        self.sizes, self.routes = sizes, routes
        self.table = window.table(sizes.dtype)  # all its rows as scalars
        self.berths = [Berth(number, sizes, window.first_row, device) for number in range(sizes.num_berths)]
        pools = make_pools(sizes, window.first_row)
        self.hall = Hall(transport, window, routes, pools, sizes, self.tally)
        self.landings, self.background_tasks = [], []
        self.groups = group_peers(routes, sizes)
        self.traffic = no_traffic(self.transport.size)

    def take_traffic(self):
        """Return what was sent since the last call -> Traffic."""
        traffic, self.traffic = self.traffic, no_traffic(self.transport.size)
        return traffic

    def register(self, task):
        """Poke this too from now on, until it is over."""
        self.background_tasks.append(task)

    def poke(self):
        """Let messages progress, and all that this rank lands for others, without waiting -> whether anything moved."""
        return self.transport.poke() | poke_all(self.background_tasks) | poke_all(self.landings)

    def count_news(self):
        """Count how often any mate has told anything."""
        return self.window.count_news()

    def wait_for_news(self, backoff, before):
        """Pause, a few times at most, until a message has moved or a mate has told more than `before`."""
        for _ in range(PAUSES):
            backoff.pause()
            if self.transport.poke() or poke_all(self.background_tasks) or self.window.count_news() != before:
                return

    @property
    def buffer_bytes(self):
        """Memory that messages take on this rank: its share of the window, and what it sends from."""
        return self.window.num_bytes // self.window.num_mates + sum(berth.send.numel() for berth in self.berths)

    @property
    def is_idle(self):
        """Whether this rank has nothing left to do for others."""
        under_way = self.landings or self.background_tasks
        return not under_way and all(request.done for berth in self.berths for request in berth.requests)

    def plan(self, routing, chooser):
        """Choose a replica for each copy of a Routing, and find its way -> Plan."""
        # Host waits for the device here: it must know where the tokens go.
        experts = routing.experts.cpu().numpy()
        slots = chooser.choose(experts)
        kept = for_shards(routing.kept, slots.shape[1] // experts.shape[1])
        return self.make_plan(slots, np.ones(slots.shape, bool) if kept is None else kept.cpu().numpy())

    def make_plan(self, slots, kept):
        """Find the way of each kept copy -> Plan: slots [T, K], kept [T, K] bool."""
        return make_plan(slots, kept, self.routes, self.sizes.parcel_tokens, self.sizes.row_bytes)

    def may_start(self, flight):
        """Whether the next exchange of a micro-batch can be announced: its mates have read what it would overwrite."""
        berth = self.berths[flight.berth]
        return self.window.may_post(berth.number, berth.exchange + 1) and all(t.done for t in berth.requests)

    def start_outward(self, flight, rows, gates, direction):
        """Offer the tokens' rows [T, H], and each copy's gate [T, K], to the experts that the flight's plan names."""
        berth, plan, window = self.berths[flight.berth], flight.plan, self.window
        berth.exchange, berth.direction = berth.exchange + 1, direction
        berth.arrivals = Arrivals(window, self.routes, berth.number, berth.exchange)
        gates = gates.numpy(force=True).ravel()
        ready = self.device.put(rows, self.table[berth.tokens : berth.tokens + len(rows)])

        # Say of each result row what it is computed from.
        results = slice(berth.results, berth.results + len(plan.copies))
        window.sources[results] = berth.tokens + plan.copies // plan.top_k
        window.gate_values[results] = gates[plan.copies]
        ready.synchronize()  # host waits for the device here: mates read the rows from now on
        window.post(berth.number, berth.exchange, 0, berth.results, 1, plan.counts)

        if len(self.routes.landings):
            self.send_parcels(flight, gates, direction)
        if self.routes.senders:
            self.landings.append(
                Landing(self.hall, berth.number, berth.exchange, direction, self.tags(flight, direction))
            )
        self.count(flight, direction)

    def send_parcels(self, flight, gates, direction):
        """Send the headers of all parcels to their landings, and the parcels; expect their sums."""
        berth, plan, transport = self.berths[flight.berth], flight.plan, self.transport
        tag_of, window, row_bytes = self.tags(flight, direction), self.window, self.sizes.row_bytes
        of_landing = [[] for _ in self.routes.landings]
        for parcel in plan.parcels:
            of_landing[parcel.landing].append(parcel)
        berth.requests, berth.returns = [], []
        for peer, parcels in zip(self.routes.landings.tolist(), of_landing, strict=True):
            header = [[len(parcels)], *([parcel.num_tokens, *parcel.counts.ravel()] for parcel in parcels)]
            berth.requests.append(transport.send_words(np.concatenate(header), peer, tag_of(MessageKind.HEADER)))
            for number, parcel in enumerate(parcels):
                num_rows = parcel.num_rows(row_bytes)
                home = berth.results + parcel.first
                rows = window.rows[home : home + num_rows]
                berth.returns.append(transport.recv_rows(rows, peer, tag_of(MessageKind.RETURN, number)))
                first = parcel.first - len(plan.copies)
                rows = berth.send[first : first + num_rows].numpy()
                self.pack(rows, berth.tokens, parcel, gates)
                berth.requests.append(transport.send_rows(rows, peer, tag_of(MessageKind.PARCEL, number)))

    def pack(self, rows, first, parcel, gates):
        """Lay a parcel's tokens, of those from window row `first` on, and its copies' gate values into a message."""
        np.take(self.window.rows, first + parcel.tokens, axis=0, out=rows[: parcel.num_tokens], mode="clip")
        tokens, gate_values = see_trailer(rows[parcel.num_tokens :], parcel.num_copies)
        tokens[:], gate_values[:] = parcel.token_of_copy, gates[parcel.copies]

    def count(self, flight, direction):
        """Count what leaves for the experts."""
        plan = flight.plan
        self.tally(direction, self.routes.mates, plan.counts.sum(axis=1))
        for parcel in plan.parcels:
            self.tally(direction, self.routes.landings[parcel.landing], parcel.num_tokens)
        if direction == Direction.DISPATCH:
            self.traffic.copies[flight.layer] = self.traffic.copies.get(flight.layer, 0) + plan.copies_to_rank

    def tally(self, direction, ranks, rows):
        """Count rows that go from here to other ranks."""
        self.traffic.rows[direction, ranks] += rows

    def batches(self, flight):
        """Yield Batches as rows reach this rank's experts, and None while there are none, until all have come."""
        arrivals = self.berths[flight.berth].arrivals
        runs = self.runs_in_order(arrivals) if self.sizes.in_order else self.runs_by_arrival(arrivals)
        for run in runs:
            if run is None:
                yield None
            elif run:
                yield arrivals.batch_of(run)

    def runs_by_arrival(self, arrivals):
        """Yield lists of slips as they come, enough of them for a GEMM of some rows; None while there are too few.

        Parcels wait for others only while these keep coming: room must become free for those that have none.
        """
        run, enough = [], MIN_BATCH_ROWS * self.routes.num_slots
        while len(arrivals.expected):
            fresh = arrivals.look()
            run += fresh
            takes_room = any(slip > 0 for _, slip in run)  # a parcel's, which the next may be waiting for
            if len(arrivals.expected) and arrivals.count_rows(run) < enough and (fresh or not takes_room):
                yield None
            else:
                yield run
                run = []

    def runs_in_order(self, arrivals):
        """Yield lists of slips that are the same at every run, None while none is complete.

        They come in order if the run is to be deterministic, otherwise whichever group of peers is there.
        """
        groups = [arrivals.runs(peers, self.sizes.parcels_at_once) for peers in self.groups]
        while groups:
            arrivals.look()
            run = None
            for group in groups[:1] if self.sizes.deterministic else list(groups):
                run = next(group, END)
                if run is END:
                    groups.remove(group)
                if run is not None:
                    break
            if run is not END:
                yield run

    def batches_again(self, flight, batches):
        """Yield the indices of these batches, of the same plans, as their rows come again, and None meanwhile."""
        arrivals, left = self.berths[flight.berth].arrivals, list(enumerate(batches))
        while left or len(arrivals.expected):
            arrivals.look()
            ahead = left[:1] if self.sizes.deterministic else left
            ready = next((entry for entry in ahead if arrivals.has(entry[1])), None)
            if ready is not None:
                left.remove(ready)
            yield None if ready is None else ready[0]

    def rows_of(self, flight, batch):
        """Find where a batch's results are to be laid -> rows of the window [n] int64."""
        return self.berths[flight.berth].arrivals.rows(batch)

    def take(self, results):
        """Gather the tokens from which these result rows [n] are computed -> (fresh [m, H], their gate values [m]).

        m is n or a little more: a few different sizes of GEMM serve all. What is too much has the number 0.
        """
        window, num_rows = self.window, round_rows(len(results))
        sources, gate_values = np.full(num_rows, self.berths[0].zero), np.zeros(num_rows, np.float32)
        sources[: len(results)], gate_values[: len(results)] = window.sources[results], window.gate_values[results]
        rows = self.device.gather(self.table, torch.from_numpy(sources))
        return rows, torch.from_numpy(gate_values).to(self.device.torch_device)

    def lay(self, rows, results, gate_values=None):
        """Lay rows [m, H], and gate values [m] if any, down at these result rows [n]; those beyond n are dropped."""
        rows = rows[: len(results)].to(self.sizes.dtype)
        self.device.scatter(rows, self.table, results)
        if gate_values is not None:
            self.window.gate_values[results] = gate_values[: len(results)].numpy(force=True)

    def finish(self, flight, batch):
        """Tell the homes of a batch's rows that its results are there."""
        berth = self.berths[flight.berth]
        berth.arrivals.finish(batch)
        for slip in batch.slips:
            if slip[1] == 0 or slip[0] != self.routes.mate:  # what this rank has landed itself stays with it
                home = self.routes.mates[slip[0]]
                self.tally(HOMEWARD[berth.direction], home, berth.arrivals.count_rows([slip]))

    def is_home(self, flight):
        """Whether all results of a micro-batch are home."""
        berth = self.berths[flight.berth]
        if not all(request.done for request in berth.returns):
            return False
        return self.window.is_done(berth.number, berth.exchange, 0, flight.plan.counts)

    def sum_home(self, flight, gates):
        """Sum the rows that came home by token, a copy's times its gate [T, K] -> fresh [T, H] of the rows' dtype."""
        berth, plan = self.berths[flight.berth], flight.plan
        rows = np.where(plan.row_of_entry < 0, berth.zero, berth.results + plan.row_of_entry)
        if self.routes.same_order and len(self.routes.landings) and berth.direction == Direction.DISPATCH:
            # As where parcels land: products are rounded before they are added, whichever way they have come.
            own = self.table[berth.results : berth.results + len(plan.copies)]
            own *= gates.cpu().flatten()[torch.from_numpy(plan.copies)].to(own.dtype)[:, None]
            gates = torch.ones_like(gates)
        weights = torch.where(torch.from_numpy(plan.is_sum), 1.0, gates.cpu())
        return self.device.sum_rows(self.table, torch.from_numpy(rows), weights)

    def gather_gate_grads(self, flight):
        """Gather the gradients of the gates -> [T, K] float32, 0 where there is no copy."""
        berth, plan = self.berths[flight.berth], flight.plan
        gate_values = np.zeros(plan.row_of_entry.size, np.float32)
        gate_values[plan.copies] = self.window.gate_values[berth.results : berth.results + len(plan.copies)]
        for parcel in plan.parcels:
            first = berth.results + parcel.first + parcel.num_tokens
            trailer = self.window.rows[first : berth.results + parcel.first + parcel.num_rows(self.sizes.row_bytes)]
            gate_values[parcel.copies] = see_trailer(trailer, parcel.num_copies)[1]
        return torch.from_numpy(gate_values).view(plan.row_of_entry.shape).to(self.device.torch_device)

    def tags(self, flight, direction):
        """Number the messages of a micro-batch's exchange -> tag_of(part, parcel=0)."""
        tag = make_tag(flight.micro_batch, direction)
        max_parcels = self.window.sizes.max_parcels
        return lambda part, parcel=0: make_message_tag(tag, part, parcel, max_parcels)
