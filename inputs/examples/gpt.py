"""A small GPT whose feed-forward layers are mixtures of experts, trained on the source of Python's standard library.

`python inputs/examples/gpt.py` runs it in one process; `mpirun -n 2 python inputs/examples/gpt.py` starts this script
twice, as two ranks. Each holds half of the experts and takes every second sequence of a batch; the losses are the same.
"""

from pathlib import Path
from sysconfig import get_path

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional as F

import hpcmoe

STEPS, BATCH, CONTEXT, WIDTH, HEADS = 40, 8, 64, 64, 4


class Block(nn.Module):
    def __init__(self, group: hpcmoe.Group):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = hpcmoe.MoE(WIDTH, 2 * WIDTH, num_experts=8, top_k=2, group=group, aux_loss_weight=0.01)

    def forward(self, x: Tensor) -> Tensor:  # [batch, CONTEXT, WIDTH]
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, group: hpcmoe.Group):
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(group), Block(group), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:  # [batch, CONTEXT] bytes
        logits = self.blocks(self.token(x) + self.place.weight).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum") / (BATCH * CONTEXT)


data = b"".join(file.read_bytes() for file in sorted(Path(get_path("stdlib")).glob("*.py")))
with hpcmoe.open() as group:
    torch.manual_seed(0)  # what is not an expert starts alike on all ranks, and all draw the same batches
    model = GPT(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))[group.rank :: group.size].tolist()  # this rank's share
        batch = torch.tensor([list(data[start : start + CONTEXT + 1]) for start in starts])
        optimizer.zero_grad()
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        group.sum_gradients(model)  # over the ranks; of an expert, over those that hold it
        optimizer.step()
        loss = MPI.COMM_WORLD.allreduce(loss.item())
        if group.rank == 0:
            print(f"step {step}: loss {loss:.6f} nats/byte")
