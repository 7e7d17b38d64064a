"""Where assignments go, found on the device that has them: the host reads counts alone.

Assignments are sorted by slot, which is also by rank (permutation 1 of hpcmoe.dispatch.plan). A dropped one is
not sent.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from hpcmoe.comm.device import Device
from hpcmoe.comm.transport import Transport
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.plan import LARGEST_POINT, SlotChooser


class DevicePlan:
    """What one micro-batch exchanges in one layer: on the device where each assignment lies, on the host the counts."""

    def __init__(self, slots: Tensor, kept: Tensor | None, num_slots: int, device: Device) -> None:
        """slots [T, K], kept [T, K] bool or None (all), on the device; num_slots of all ranks."""
        self.top_k = slots.shape[1]
        self.assignments, ends = device.row_ops.sort_by_slot(slots, kept, num_slots)  # RowsOfAssignments, [num_slots]
        self.ends, self.event = device.copy_to_host(ends)  # where each slot's rows end, once the event has happened
        self.leaving: np.ndarray  # [P, s] int64, rows from this rank to each slot, once they are known
        self.coming: np.ndarray  # [P, s] int64, rows from each rank to this one's slots
        self.headers: Headers | None = None  # of the exchange that is to start

    def poll_headers(self, transport: Transport, tag: int, word: int) -> bool:
        """Return True if all ranks' counts and words are known.

        Send this rank's to each other rank once the device has counted, before each exchange.
        """
        if self.headers is None:
            if not self.event.query():
                return False
            self.leaving = np.diff(self.ends.numpy(), prepend=0).reshape(transport.size, -1)
            self.headers = Headers(transport, tag, word, self.leaving)
        return self.headers.poll()

    @property
    def notices(self) -> Notices | None:
        """Return the words that have come, once this rank's own is on its way."""
        return None if self.headers is None else self.headers.notices

    def consume_headers(self) -> np.ndarray:
        """Consume all ranks' headers, and return their words [P]: the next exchange has headers of its own."""
        assert self.headers is not None, "an exchange starts once poll_ready has returned True"
        self.coming, words, self.headers = self.headers.received[:, 1:], self.headers.notices.words, None
        return words

    @functools.cached_property
    def send_edges(self) -> np.ndarray:
        """Return which rows at home go to each rank [P + 1]."""
        return edges_of(self.leaving.sum(axis=1))

    @property
    def recv_edges(self) -> np.ndarray:
        """Return which rows here come from each rank [P + 1]."""
        return edges_of(self.coming.sum(axis=1))


class Headers:
    """What all ranks send each other before the rows of one exchange: a word, and the rows for each slot."""

    def __init__(self, transport: Transport, tag: int, word: int, leaving: np.ndarray) -> None:
        """leaving [P, s]: rows from this rank to each slot."""
        self.notices, self.sent = Notices(word, transport.size), np.insert(leaving, 0, word, axis=1)  # [P, 1 + s]
        self.received = self.sent.copy()  # [P, 1 + s]; this rank's own is there
        self.notices.add(np.array([transport.rank]), np.array([word]))
        others = [rank for rank in range(transport.size) if rank != transport.rank]
        self.coming = {rank: transport.recv_words(self.received[rank], rank, tag) for rank in others}
        self.leaving = [transport.send_words(self.sent[rank], rank, tag) for rank in others]

    def poll(self) -> bool:
        """Return True if all headers have come and gone; note the words of those that have come."""
        if fresh := [rank for rank, request in self.coming.items() if request.done]:
            self.notices.add(np.array(fresh), self.received[fresh, 0])
            self.coming = {rank: request for rank, request in self.coming.items() if not request.done}
        return not self.coming and all(request.done for request in self.leaving)


class DeviceBatch:
    """All rows of an exchange, grouped by slot and within it by rank: permutation 2 of hpcmoe.dispatch.plan."""

    __slots__ = ("num_rows", "order", "rows_of_slot")
    key = ()  # it is alone

    def __init__(self, coming: np.ndarray, device: Device) -> None:
        """coming [P, s]: rows from each rank for each slot, which lie by rank and within it by slot."""
        self.rows_of_slot = coming.sum(axis=0)  # [s]
        self.num_rows = int(self.rows_of_slot.sum())
        self.order: Tensor | None = None  # [R] where each row lies; None: they lie so
        if min(coming.shape) > 1:
            first, lengths = edges_of(coming.ravel())[:-1].reshape(coming.shape), coming.T.ravel()
            offsets = first.T.ravel() - edges_of(lengths)[:-1]
            self.order = device.copy_from_host(np.repeat(offsets, lengths) + np.arange(self.num_rows))


class DeviceChooser:
    """A SlotChooser on the device: the same replicas for the same assignments."""

    def __init__(self, chooser: SlotChooser, torch_device: torch.device) -> None:
        self.unique, self.phase = chooser.unique, chooser.phase  # whether each expert has one replica alone
        self.slots = torch.from_numpy(chooser.slots).to(torch_device)
        self.edges = torch.from_numpy(chooser.edges).to(torch_device)

    def choose(self, experts: Tensor) -> Tensor:
        """Return the slots [T, K * shards] for experts [T, K]."""
        if self.unique:
            return self.slots[experts].flatten(1)
        flat = experts.flatten()
        ordered, order = flat.sort(stable=True)
        first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
        place = torch.arange(len(flat), device=flat.device)
        number = torch.empty_like(order).scatter_(0, order, place - first)  # among the assignments of its expert
        count = torch.empty_like(order).scatter_(0, order, end - first)
        point = (number + self.phase) / count.double() * LARGEST_POINT
        chosen = torch.searchsorted(self.edges, flat + point, right=True)
        return self.slots[chosen].view(len(experts), experts.shape[1] * self.slots.shape[1])


def edges_of(counts: np.ndarray) -> np.ndarray:
    """Return where runs of these lengths begin, and the end -> [n + 1] int64."""
    return np.concatenate(([0], np.cumsum(counts)))
