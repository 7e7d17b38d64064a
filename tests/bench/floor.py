"""The floor under a layer: its experts' GEMMs on prepacked weights, and its bytes there and back, and nothing else.

Each product is made by whoever is fastest at it on this processor, as tried before anything is timed: one call an
expert and matrix, on rows that lie there; one MPI call an exchange, on buffers that lie there, the rank's own rows
included. No router, no order, no packing, no weighing of results.
"""

import contextlib
import time

import numpy as np
import torch
from mpi4py import MPI
from torch.nn import functional

from hpcmoe.wait import gather_to_all, wait_all

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
        self.x, self.grad_y = torch.randn(rows, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
        self.grad_inner = torch.randn(rows, inner).to(dtype)
        up, down = torch.randn(inner, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)
        self.up = choose(FORWARD, (up, rows, "gelu"), self.x)
        self.down = choose(FORWARD, (down, rows, "none"), self.grad_inner)
        if shape.training:
            self.back_down, self.back_up = choose(BACK, (down,), self.grad_y), choose(BACK, (up,), self.grad_inner)
            self.gradient = choose(GRADIENT, (), self.grad_y, self.grad_inner)

    def forward(self):
        """Multiply twice: x [n, H] -> [n, F] -> [n, H]."""
        self.inner = self.up(self.x)
        return self.down(self.inner)

    def backward(self):
        """Multiply four times: gradients of the inputs of both matrices, and of the matrices."""
        self.back_down(self.grad_y)
        self.gradient(self.grad_y, self.inner)
        self.back_up(self.grad_inner)
        self.gradient(self.grad_inner, self.x)


def pack(weight, rows, activation):
    """Multiply by oneDNN, on a weight laid out for so many rows -> a way to activation(x [n, in] weight^T)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, activation, [], "none")


def ask_torch(weight, rows, activation):
    """Multiply by torch, which asks MKL for float32."""
    return lambda x: activate(functional.linear(x, weight), activation)


def widen(weight, rows, activation):
    """Multiply in float32, for processors that have no products in bfloat16."""
    wide = weight.float()
    return lambda x: activate(functional.linear(x.float(), wide), activation).to(weight.dtype)


def activate(product, activation):
    """Apply gelu, if it is that, in place."""
    return torch.ops.aten.gelu_(product) if activation == "gelu" else product


def by_onednn(x, weight):
    """x weight^T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "none")


def widen_back(weight):
    """Multiply gradients in float32."""
    wide = weight.float()
    return lambda grad_y: torch.mm(grad_y.float(), wide).to(weight.dtype)


# Makers of ways: to activation(x weight^T), to grad_y [n, out] weight [out, in], and to grad_y^T x [n, in].
FORWARD = [pack, ask_torch, widen]
BACK = [
    lambda weight: lambda grad_y: torch.mm(grad_y, weight),
    lambda weight: lambda grad_y: by_onednn(grad_y, weight.t()),
    widen_back,
]
GRADIENT = [
    lambda: lambda grad_y, x: torch.mm(grad_y.t(), x),
    lambda: lambda grad_y, x: by_onednn(grad_y.t(), x.t()),
    lambda: lambda grad_y, x: torch.mm(grad_y.float().t(), x.float()),
]


def choose(makers, given, *operands):
    """Make the fastest way to one product on these operands, of those that this processor and torch have."""
    ways = {}
    for make in makers:
        with contextlib.suppress(RuntimeError, AttributeError):
            way = make(*given)
            ways[clock(way, operands)] = way
    return ways[min(ways)]


def clock(way, operands):
    """Take the least seconds of a few products, after one that warms up."""
    taken = []
    for _ in range(1 + TRIES):
        begin = time.perf_counter()
        way(*operands)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def count_rows(comm, x, router_weight, shape):
    """Count the copies that each rank's tokens x [T, H] have for each expert -> [ranks, E]. Collective over comm."""
    experts = functional.linear(x, router_weight).topk(shape.top_k, dim=-1).indices
    return np.array(gather_to_all(comm, np.bincount(experts.flatten(), minlength=shape.experts)))


def count_bytes(shape, rows_of_expert):
    """Add up what every rank sends to every rank's experts: copies [ranks, E] -> bytes [from, to]."""
    rows = rows_of_expert.reshape(shape.ranks, shape.ranks, shape.experts_of_rank).sum(axis=2)
    return rows * shape.hidden * getattr(torch, shape.dtype).itemsize
