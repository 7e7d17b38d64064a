"""Where assignments go, found on the device that has them: the host is told counts alone.

Assignments are sorted in the order of their slots, which is that of the ranks; a dropped one is not sent.
"""

import functools

import numpy as np
import torch

from hpcmoe.comm.transport import Direction, MessageKind, make_message_tag, make_tag
from hpcmoe.dispatch.plan import LARGEST_POINT


class DevicePlan:
    """What one micro-batch exchanges in one layer: on the device which assignment lies where, on the host how many go."""

    def __init__(self, slots, kept, num_slots, device):
        """slots [T, K], kept [T, K] bool or None (all), tensors on the device; num_slots of all ranks."""
        self.top_k = slots.shape[1]
        self.assignments, ends = device.row_ops.sort_by_slot(
            slots, kept, num_slots
        )  # which assignment lies where at home
        self.counts = Counts(*device.copy_to_host(ends))


class Counts:
    """How many rows go from this rank to each slot, and how many come to its own from each rank: first asked for."""

    def __init__(self, fetched, event):
        """fetched: int64 tensor [P * s] on the host, where each slot's rows end, there when the event has happened."""
        self.fetched, self.event = fetched, event
        self.leaving = self.coming = None  # [P, s] int64, once they are known
        self.requests = None

    def poll(self, transport, tag):
        """Whether both are known, and go on asking: a message to each rank. Here, and nowhere else, the host waits."""
        if self.requests is None:
            if not self.event.query():
                return False
            self.ask(transport, tag)
        return all(request.done for request in self.requests)

    def ask(self, transport, tag):
        """Tell each rank what goes to its slots, and begin to hear what comes from it."""
        self.leaving = np.diff(self.fetched.numpy(), prepend=0).reshape(transport.size, -1)
        self.coming = np.empty_like(self.leaving)
        self.coming[transport.rank] = self.leaving[transport.rank]
        others = [rank for rank in range(transport.size) if rank != transport.rank]
        self.requests = [transport.recv_words(self.coming[rank], rank, tag) for rank in others]
        self.requests += [transport.send_words(self.leaving[rank], rank, tag) for rank in others]

    @functools.cached_property
    def send_edges(self):
        """Which rows at home go to each rank -> [P + 1]."""
        return edges_of(self.leaving.sum(axis=1))

    @functools.cached_property
    def recv_edges(self):
        """Which rows here come from each rank -> [P + 1]."""
        return edges_of(self.coming.sum(axis=1))


class DeviceBatch:
    """All rows of an exchange on which the local experts work, grouped by slot and within it by rank."""

    def __init__(self, coming, device):
        """coming [P, s]: rows from each rank for each slot, which lie by rank and within it by slot."""
        self.rows_of_slot = coming.sum(axis=0)  # [s]
        self.num_rows = int(self.rows_of_slot.sum())
        self.order = None  # [R] where each row lies; None: they lie so
        if min(coming.shape) > 1:
            first, lengths = edges_of(coming.ravel())[:-1].reshape(coming.shape), coming.T.ravel()
            shifts = first.T.ravel() - edges_of(lengths)[:-1]
            self.order = device.copy_from_host(np.repeat(shifts, lengths) + np.arange(self.num_rows))

    def split_chunks(self, about_rows, apart=False):
        """There is one chunk: the GEMMs of all slots are one -> (slice, ((slot, rows), ...)), if there are rows.

        In it no slot's rows depend on another's; so apart, as about_rows, changes nothing.
        """
        if self.num_rows:
            slots = [(slot, rows) for slot, rows in enumerate(self.rows_of_slot.tolist()) if rows]
            yield slice(0, self.num_rows), slots


class DeviceChooser:
    """A SlotChooser on the device: the same replicas for the same assignments."""

    def __init__(self, chooser, torch_device):
        self.unique, self.phase = chooser.unique, chooser.phase  # whether each expert has one replica alone
        self.slots = torch.from_numpy(chooser.slots).to(torch_device)
        self.edges = torch.from_numpy(chooser.edges).to(torch_device)

    def choose(self, experts):
        """experts [T, K] -> slots [T, K * shards]."""
        if self.unique:
            return self.slots[experts].flatten(1)
        flat = experts.flatten()
        ordered, order = flat.sort(stable=True)
        first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
        place = torch.arange(len(flat), device=flat.device)
        number = torch.empty_like(order).scatter_(
            0, order, place - first
        )  # of an assignment, among those of its expert
        count = torch.empty_like(order).scatter_(0, order, end - first)
        point = (number + self.phase) / count.double() * LARGEST_POINT
        chosen = torch.searchsorted(self.edges, flat + point, right=True)
        return self.slots[chosen].view(len(experts), experts.shape[1] * self.slots.shape[1])


def edges_of(counts):
    """Where runs of these lengths begin, and the end -> [n + 1] int64."""
    return np.concatenate(([0], np.cumsum(counts)))


def tag_of(handle, direction, part):
    """Number the messages of one transfer, or of the counts before it."""
    return make_message_tag(make_tag(handle.micro_batch, direction), part, 0, 1)


def tag_of_counts(handle):
    """Number the messages that tell the counts of a handle."""
    return tag_of(handle, Direction.DISPATCH, MessageKind.HEADER)
