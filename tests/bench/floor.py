"""The floor under a layer: its experts' GEMMs on prepacked weights, and its bytes there and back, and nothing else.

One call an expert and matrix, on rows that lie there; one MPI call an exchange, on buffers that lie there, the rank's
own rows included. No router, no order, no packing, no weighing of results.
"""

import time

import numpy as np
import torch
from mpi4py import MPI
from torch.nn import functional

from hpcmoe.wait import gather_to_all, wait_all

PACKED = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # whether this torch has oneDNN's packed weights
TRIES = 3


class Floor:
    """What one rank computes and carries in one step of a shape."""

    def __init__(self, comm, shape, rows_of_expert):
        """rows_of_expert [ranks, E]: copies that each rank's tokens have for each expert. Collective over comm."""
        mine = slice(comm.rank * shape.experts_of_rank, (comm.rank + 1) * shape.experts_of_rank)
        dtype = getattr(torch, shape.dtype)
        self.raw = RawExchange(comm, count_bytes(shape, rows_of_expert))
        self.experts = [BareExpert(shape, int(rows), dtype) for rows in rows_of_expert[:, mine].sum(axis=0) if rows]

    def forward(self, polite):
        """Carry, multiply, carry."""
        self.raw.carry(polite)
        for expert in self.experts:
            expert.forward()
        self.raw.carry(polite, back=True)

    def train(self, polite):
        """Do all that, and the same backwards, where each matrix takes two products."""
        self.forward(polite)
        self.raw.carry(polite)
        for expert in self.experts:
            expert.backward()
        self.raw.carry(polite, back=True)


class RawExchange:
    """Alltoallv of a byte matrix, on two buffers."""

    def __init__(self, comm, num_bytes):
        """num_bytes [P, P] from each rank to each."""
        self.comm = comm
        self.send, self.recv = self.lay_out(num_bytes[comm.rank]), self.lay_out(num_bytes[:, comm.rank])

    @staticmethod
    def lay_out(counts):
        """Allocate and touch a buffer -> its specification for MPI."""
        return [np.ones(counts.sum(), np.uint8), (counts, np.cumsum(counts) - counts), MPI.BYTE]

    def carry(self, polite, back=False):
        """Carry all bytes there, or back, with a polite wait or MPI's own. Collective over comm."""
        source, target = (self.recv, self.send) if back else (self.send, self.recv)
        if polite:
            wait_all([self.comm.Ialltoallv(source, target)])
        else:
            self.comm.Alltoallv(source, target)


class BareExpert:
    """The products of one expert: up with the activation, down, and those of the way back."""

    def __init__(self, shape, rows, dtype):
        hidden, inner = shape.hidden, shape.feed_forward
        self.x, self.slope = torch.randn(rows, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
        self.inner_slope = torch.randn(rows, inner).to(dtype)
        self.up, self.down = torch.randn(inner, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)
        self.packed_up, self.packed_down = pack(self.up, rows), pack(self.down, rows)
        if shape.training:
            self.back = choose(BACK, self.slope, self.down)
            self.gradient = choose(GRADIENT, self.slope, self.inner_slope)

    def forward(self):
        """Multiply twice: x [n, H] -> [n, F] -> [n, H]."""
        self.inner = multiply(self.x, self.packed_up, "gelu")
        return multiply(self.inner, self.packed_down, "none")

    def backward(self):
        """Multiply four times: slopes by the inputs of both matrices, and by the matrices."""
        self.back(self.slope, self.down)
        self.gradient(self.slope, self.inner)
        self.back(self.inner_slope, self.up)
        self.gradient(self.inner_slope, self.x)


def pack(weight, rows):
    """Lay a matrix out as products with so many rows like it best, where torch can."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows) if PACKED else weight


def multiply(x, weight, activation):
    """Compute activation(x @ weight.T) -> [n, out], by oneDNN where torch has it."""
    if PACKED:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, activation, [], "none")
    product = functional.linear(x, weight)
    return functional.gelu(product) if activation == "gelu" else product


# Ways to the two products of the way back: slope [n, out] @ weight [out, in], and slope.T @ x [n, in].
BACK = [lambda slope, weight: torch.mm(slope, weight)]
GRADIENT = [lambda slope, x: torch.mm(slope.t(), x)]
if PACKED:
    BACK.append(lambda slope, weight: multiply(slope, weight.t(), "none"))
    GRADIENT.append(lambda slope, x: multiply(slope.t(), x.t(), "none"))


def choose(ways, *operands):
    """Find the fastest of some ways to one product on these operands."""

    def seconds(way):
        taken = []
        for _ in range(1 + TRIES):
            begin = time.perf_counter()
            way(*operands)
            taken.append(time.perf_counter() - begin)
        return min(taken[1:])

    return min(ways, key=seconds)


def count_rows(comm, x, router_weight, shape):
    """Count the copies that each rank's tokens x [T, H] have for each expert -> [ranks, E]. Collective over comm."""
    experts = functional.linear(x, router_weight).topk(shape.top_k, dim=-1).indices
    return np.array(gather_to_all(comm, np.bincount(experts.flatten(), minlength=shape.experts)))


def count_bytes(shape, rows_of_expert):
    """Add up what every rank sends to every rank's experts: copies [ranks, E] -> bytes [from, to]."""
    rows = rows_of_expert.reshape(shape.ranks, shape.ranks, shape.experts_of_rank).sum(axis=2)
    return rows * shape.hidden * getattr(torch, shape.dtype).itemsize
