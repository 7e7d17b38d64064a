"""Rows leave for their experts and return: dispatch and combine, each the other's backward.

outward   dispatch, and the backward of combine    home order [N', H]    -> expert order [R, H]
homeward  combine, and the backward of dispatch    expert order [R, H]   -> home order [N', H]
"""

from dataclasses import dataclass

import numpy as np
import torch

from hpcmoe.comm.transport import Direction, make_tag
from hpcmoe.dispatch.plan import cut_into_batches, make_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the message buffers must hold, and how rows meet in batches."""

    hidden: int  # H
    dtype: torch.dtype  # of the rows that travel
    home_rows: int  # the most copies that a micro-batch of this rank has: T x K
    expert_rows: int  # rows expected at this rank's experts, and room for some more
    num_berths: int  # micro-batches in flight
    num_micro_batches: int
    max_batch_rows: int  # B_max
    deterministic: bool  # batches by counts alone, or by arrival

    @property
    def row_bytes(self):
        """Bytes of one token on the wire."""
        return self.hidden * self.dtype.itemsize


class Berth:
    """The message buffers of one micro-batch in flight, at its home and at its experts."""

    def __init__(self, device, row_bytes, home_rows, expert_rows):
        self.device, self.row_bytes = device, row_bytes
        self.home_send = device.make_buffer(home_rows, row_bytes)
        self.home_recv = device.make_buffer(home_rows, row_bytes)
        self.expert_send = device.make_buffer(expert_rows, row_bytes)
        self.expert_recv = device.make_buffer(expert_rows, row_bytes)
        self.outward = self.homeward = None  # the exchange that last used the buffers

    def make_room(self, expert_rows):
        """Grow the experts' buffers when a micro-batch brings more rows than any before."""
        if expert_rows > len(self.expert_recv):
            expert_rows = expert_rows * 5 // 4  # grow seldom
            self.expert_send = self.device.make_buffer(expert_rows, self.row_bytes)
            self.expert_recv = self.device.make_buffer(expert_rows, self.row_bytes)

    @property
    def num_bytes(self):
        """Memory that the four buffers take."""
        return sum(b.numel() for b in (self.home_send, self.home_recv, self.expert_send, self.expert_recv))


class Exchange:
    """Carries the rows of one expert-parallel group for all layers and micro-batches."""

    def __init__(self, transport, device, clock, sizes):
        self.transport, self.device, self.clock, self.sizes = transport, device, clock, sizes
        self.berths = [
            Berth(device, sizes.row_bytes, sizes.home_rows, sizes.expert_rows) for _ in range(sizes.num_berths)
        ]
        self.rows_to_peer = np.zeros((len(Direction), transport.size), dtype=np.int64)  # since the last take_traffic

    @property
    def buffer_bytes(self):
        """Memory that all message buffers take on this rank."""
        return sum(berth.num_bytes for berth in self.berths)

    def take_traffic(self):
        """Return the rows sent to each peer since the last call, by direction. [4, P] int64"""
        rows, self.rows_to_peer = self.rows_to_peer, np.zeros_like(self.rows_to_peer)
        return rows

    def start_outward(self, flight, rows, order, direction):
        """Send rows[order] (all when order is None), home order [N', H], to their experts."""
        berth, plan = self.berths[flight.berth], flight.plan
        with self.clock.stage("dispatch"):
            settle(berth.outward)  # before the buffers of the last exchange are written again
            settle(berth.homeward)
            berth.make_room(plan.num_received)
            ready = self.device.pack(rows, order, berth.home_send)
            berth.outward = self.transport.start(
                berth.home_send,
                plan.send_counts,
                berth.expert_recv,
                plan.recv_counts,
                ready,
                self.tag(flight, direction),
            )
        self.rows_to_peer[direction] += plan.send_counts

    def start_homeward(self, flight, direction):
        """Send the results that put_result has laid down, expert order [R, H], home."""
        berth, plan = self.berths[flight.berth], flight.plan
        with self.clock.stage("combine"):
            ready = self.device.record()
            berth.homeward = self.transport.start(
                berth.expert_send,
                plan.recv_counts,
                berth.home_recv,
                plan.send_counts,
                ready,
                self.tag(flight, direction),
            )
        self.rows_to_peer[direction] += plan.recv_counts

    def arrived_batches(self, flight):
        """Yield (batch, rows [n, H] grouped by slot) as rows reach their experts, until all have."""
        berth, plan = self.berths[flight.berth], flight.plan
        if self.sizes.deterministic:
            groups = cut_into_batches(plan, self.transport.rank, self.sizes.max_batch_rows)
        else:
            groups = self.timed(berth.outward.arrivals())
        for peers in groups:
            batch = make_batch(plan, peers)
            if len(batch.order):
                yield batch, self.take_rows(flight, batch)

    def timed(self, arrivals):
        """Yield from arrivals, and book the time spent on waiting for them to dispatch."""
        while True:
            with self.clock.stage("dispatch"):
                peers = next(arrivals, None)
            if peers is None:
                return
            yield peers

    def take_rows(self, flight, batch):
        """Wait for a batch's rows and copy them out of the receive buffer -> fresh [n, H], grouped by slot."""
        berth = self.berths[flight.berth]
        with self.clock.stage("dispatch"):
            berth.outward.wait_for(batch.peers)
        return self.device.unpack(berth.expert_recv, torch.from_numpy(batch.order), self.sizes.dtype)

    def put_result(self, flight, batch, rows):
        """Lay a batch's results [n, H], grouped by slot, down where start_homeward sends them from."""
        buffer = self.berths[flight.berth].expert_send
        self.device.scatter(rows.to(self.sizes.dtype), torch.from_numpy(batch.order), buffer)

    def finish_homeward(self, flight):
        """Wait for the rows that come home -> fresh tensor [N', H]."""
        berth = self.berths[flight.berth]
        with self.clock.stage("combine"):
            berth.homeward.wait()
        everything = torch.arange(len(flight.plan.copy_of_row))
        return self.device.unpack(berth.home_recv, everything, self.sizes.dtype)

    def tag(self, flight, direction):
        """Number the exchange of this layer, micro-batch and direction."""
        return make_tag(flight.layer, flight.micro_batch, direction, self.sizes.num_micro_batches)


def settle(pending):
    """Wait until an exchange, if there was one, is done with its buffers."""
    if pending is not None:
        pending.wait()
