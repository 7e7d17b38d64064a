"""The tokens of each expert of a library's layers, over all ranks or by node, for each who asks from time to time."""

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

    def __init__(self, comm: MPI.Comm, layers: Sequence[CountingLayer], node_of_rank: np.ndarray) -> None:
        """comm: all ranks, node_of_rank [ranks]; layers: those that there are at each call, of which none goes."""
        self.comm, self.layers = comm, layers
        self.node, self.num_nodes = int(node_of_rank[comm.rank]), int(max(node_of_rank)) + 1
        self.since: dict[str, list[np.ndarray]] = {name: [] for name in _NAMES}  # this rank's by layer, [E]

    def pop(self, name: str, *, by_node: bool = False) -> list[np.ndarray]:
        """Return the tokens by layer since the last call with this name, int64 [E], or [nodes, E] by their home.

        Collective over comm: E numbers a layer travel, or nodes x E.
        """
        self.collect()
        own = self.since[name]
        self.since[name] = [np.zeros_like(each) for each in own]
        sizes = [len(each) for each in own]
        counts = np.zeros((self.num_nodes if by_node else 1, sum(sizes)), np.int64)
        counts[self.node if by_node else 0] = np.concatenate([np.zeros(0, np.int64), *own])
        of_layer = np.split(all_reduce(self.comm, counts), np.cumsum(sizes), axis=1)[: len(sizes)]
        return of_layer if by_node else [each[0] for each in of_layer]

    def collect(self) -> None:
        """Move what this rank's layers have counted to where each name finds it. Not collective."""
        new = [layer.tokens_of_expert.numpy(force=True).copy() for layer in self.layers]
        for layer in self.layers:
            layer.tokens_of_expert.zero_()
        for name, since in self.since.items():
            since += [np.zeros_like(each) for each in new[len(since) :]]
            self.since[name] = [before + each for before, each in zip(since, new, strict=True)]
