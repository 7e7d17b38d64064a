"""What a rank has sent, counted as it leaves, and in which batches its experts have worked on what came."""

from dataclasses import dataclass, field

import numpy as np

from hpcmoe.comm.transport import Direction


@dataclass(slots=True, kw_only=True)
class Traffic:
    """What this rank has sent to each of P ranks."""

    assignments: dict  # layer: [P] int64, assignments in dispatch
    rows: np.ndarray  # [4, P] int64, by direction: through the window, or in messages to who lands them
    batches: dict = field(default_factory=dict)  # (layer, slot): (number, rows, least, most) of its batches, forward

    def count_batches(self, layer: int, slots) -> None:
        """Count the batches that the experts of a layer work on at once: (slot, rows) of each."""
        for slot, rows in slots:
            add_batches(self.batches, (layer, slot), (1, rows, rows, rows))


def add_batches(batches: dict, key, more) -> None:
    """Add (number, rows, least, most) of some batches to those under a key, in place."""
    number, rows, least, most = batches.get(key, (0, 0, more[2], more[3]))
    batches[key] = number + more[0], rows + more[1], min(least, more[2]), max(most, more[3])


def make_traffic(num_ranks):
    """Start counting what goes to each of so many ranks -> Traffic."""
    return Traffic(assignments={}, rows=np.zeros((len(Direction), num_ranks), np.int64))
