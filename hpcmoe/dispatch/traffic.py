"""What a rank has sent, counted as it leaves, and in which batches its experts have worked on what came."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcmoe.comm.transport import Direction

BatchCount = tuple[int, int, int, int]  # number of batches, rows in all, in the smallest, in the largest


@dataclass(slots=True, kw_only=True)
class Traffic:
    """What this rank has sent to each of P ranks."""

    assignments: dict[int, np.ndarray]  # layer: [P] int64, assignments dispatched
    rows: np.ndarray  # [4, P] int64, by direction: through the window, or in messages to their receivers
    batches: dict[tuple[int, int], BatchCount] = field(default_factory=dict)  # (layer, slot): its batches, forward

    def count_batches(self, layer: int, slots: Iterable[tuple[int, int]]) -> None:
        """Count the batches that the experts of a layer work on at once: (slot, rows) of each."""
        for slot, rows in slots:
            add_batches(self.batches, (layer, slot), (1, rows, rows, rows))


def add_batches(batches: dict[Any, BatchCount], key: Any, more: BatchCount) -> None:
    """Add the counts of some batches to those under a key, in place."""
    number, rows, least, most = batches.get(key, (0, 0, more[2], more[3]))
    batches[key] = number + more[0], rows + more[1], min(least, more[2]), max(most, more[3])


def make_traffic(num_ranks: int) -> Traffic:
    """Return zero counts for so many ranks."""
    return Traffic(assignments={}, rows=np.zeros((len(Direction), num_ranks), np.int64))
