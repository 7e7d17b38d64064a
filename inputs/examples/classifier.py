"""A classifier with two layers of experts, of different size and kind; the first one's router stays as it was drawn.

`python inputs/examples/classifier.py`, or on two ranks `mpirun -n 2 python inputs/examples/classifier.py`. Points on
three arms of a spiral are told apart; each rank takes a share of them, with 3 ranks of uneven size.
"""

import math

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional as F

import hpcmoe

STEPS, POINTS, ARMS = 30, 400, 3


def draw_spiral() -> tuple[Tensor, Tensor]:
    """Draw points -> where they are [POINTS, 2], and on which arm [POINTS]."""
    arm, radius = torch.arange(POINTS) % ARMS, torch.rand(POINTS)
    angle = 2 * math.pi * (arm / ARMS + radius) + 0.2 * torch.randn(POINTS)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm


class Classifier(nn.Module):
    def __init__(self, group: hpcmoe.Group):
        super().__init__()
        self.read, self.narrow, self.write = nn.Linear(2, 32), nn.Linear(32, 16), nn.Linear(16, ARMS)
        self.wide = hpcmoe.MoE(32, 64, num_experts=6, top_k=2, kind="gelu", bias=True, group=group)
        self.small = hpcmoe.MoE(16, 24, num_experts=4, top_k=1, kind="swiglu", group=group)
        self.wide.router.requires_grad_(False)  # frozen: it gets no gradients, the optimizer leaves it alone

    def forward(self, x: Tensor) -> Tensor:  # [points, 2] -> [points, ARMS]
        x = self.read(x).tanh()
        x = self.narrow(x + self.wide(x)).tanh()
        return self.write(x + self.small(x))


with hpcmoe.open() as group:
    torch.manual_seed(0)  # what is not an expert starts alike on all ranks
    points, arms = draw_spiral()
    own = slice(group.rank, None, group.size)  # this rank's share
    model = Classifier(group)
    router = model.wide.router.weight.clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        logits = model(points[own])
        loss = F.cross_entropy(logits, arms[own], reduction="sum") / POINTS
        optimizer.zero_grad()
        loss.backward()
        group.sum_gradients(model)
        optimizer.step()
        right = (logits.argmax(dim=1) == arms[own]).sum().item()
        total, right = MPI.COMM_WORLD.allreduce(loss.item()), MPI.COMM_WORLD.allreduce(right)
        if group.rank == 0:
            print(f"step {step}: loss {total:.6f}, {right} of {POINTS} right")
    if group.rank == 0:
        print("the frozen router has moved:", not torch.equal(router, model.wide.router.weight))
