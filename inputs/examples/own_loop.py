"""A training loop of one's own: micro-batches that overlap, clipping, a checkpoint for any number of ranks.

    mpirun -n 3 python inputs/examples/own_loop.py out/own_loop 10    # ten steps, and a checkpoint
    mpirun -n 2 python inputs/examples/own_loop.py out/own_loop 20    # ten more, as if nothing had happened

or `python inputs/examples/own_loop.py` in one process. While a micro-batch waits for its rows, another computes.
"""

import sys
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpcmoe

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "out/own_loop")
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 20
BATCH, MICRO_BATCHES, WIDTH = 40, 4, 16


class Layer(nn.Module):
    def __init__(self, group: hpcmoe.Group):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = hpcmoe.MoE(WIDTH, 32, num_experts=4, group=group, bias_update_speed=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def take_micro_batch(x: Tensor) -> float:
    """Add to the gradients those of this rank's share of a micro-batch -> its part of the loss."""
    loss = (model(x) - x.norm(dim=1, keepdim=True)).square().sum() / BATCH
    loss.backward()
    return loss.item()


with hpcmoe.open(in_flight=2) as group:
    torch.manual_seed(0)  # what is not an expert starts alike on all ranks
    model = nn.Sequential(Layer(group), Layer(group), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = group.load(FOLDER, model, optimizer)["step"] if FOLDER.is_dir() else 0
    for step in range(first, STEPS):
        batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))  # the same on all ranks
        micro_batches = [part[group.rank :: group.size] for part in batch.chunk(MICRO_BATCHES)]  # this rank's shares
        optimizer.zero_grad()
        losses = list(group.lanes(take_micro_batch, micro_batches))
        group.sum_gradients(model)
        norm = group.clip_grad_norm_(model, 1.0)
        optimizer.step()
        group.update_routers()  # biases that even out the experts' loads
        loss = MPI.COMM_WORLD.allreduce(sum(losses))
        if group.rank == 0:
            print(f"step {step}: loss {loss:.6f}, gradient norm {norm:.6f}")
    group.save(FOLDER, model, optimizer, {"step": STEPS})
