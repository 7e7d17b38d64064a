"""What a rank has sent, counted as it leaves."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.comm.transport import Direction


@dataclass(slots=True, kw_only=True)
class Traffic:
    """What this rank has sent to each of P ranks."""

    copies: dict  # layer: [P] int64, tokens' copies in dispatch
    rows: np.ndarray  # [4, P] int64, by direction: through the window, or in parcels to who lands them


def no_traffic(num_ranks):
    """Start counting what goes to each of so many ranks -> Traffic."""
    return Traffic(copies={}, rows=np.zeros((len(Direction), num_ranks), np.int64))
