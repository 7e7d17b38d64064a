"""The tokens of each expert of a library's layers, over all ranks, for each of those who ask from time to time."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from mpi4py import MPI
from torch import Tensor

from hpcmoe.comm.mpi import all_reduce

_NAMES = ("loads", "update_routers", "rebalance")


class CountingLayer(Protocol):
    """A layer that counts the assignments of this rank."""

    tokens_of_expert: Tensor  # [E] int64


class TokenCounts:
    """What layers have counted, since each of _NAMES was last popped."""

    def __init__(self, comm: MPI.Comm, layers: Sequence[CountingLayer]) -> None:
        """comm: all ranks; layers: those that there are at each call, of which none goes."""
        self.comm, self.layers = comm, layers
        self.since: dict[str, list[np.ndarray]] = {name: [] for name in _NAMES}  # by layer, [E]

    def pop(self, name: str) -> list[np.ndarray]:
        """Return the tokens by layer [E] since the last call with this name. Collective over comm."""
        own = [layer.tokens_of_expert.numpy(force=True).copy() for layer in self.layers]
        counts = all_reduce(self.comm, np.concatenate([np.zeros(0, np.int64), *own]))
        of_layer = np.split(counts, np.cumsum([len(each) for each in own]))[: len(own)]
        for layer in self.layers:
            layer.tokens_of_expert.zero_()
        for other, since in self.since.items():
            since += [np.zeros_like(each) for each in own[len(since) :]]
            self.since[other] = [before + new for before, new in zip(since, of_layer, strict=True)]
        popped = self.since[name]
        self.since[name] = [np.zeros_like(each) for each in own]
        return popped
