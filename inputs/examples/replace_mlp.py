"""The MLPs of a model that exists become mixtures of experts, whose outputs at first are those of the MLPs.

`python inputs/examples/replace_mlp.py`, or on two ranks `mpirun -n 2 python inputs/examples/replace_mlp.py`. Each
expert starts as a copy of the MLP; the gates of a token sum to 1. From then on training makes the experts differ.
"""

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpcmoe

WIDTH, DEPTH, TOKENS, NUM_EXPERTS, STEPS = 24, 3, 30, 4, 5


class Block(nn.Module):
    """A block of some model of yours, which knows nothing of hpcmoe."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def make_moe(mlp: nn.Sequential, group: hpcmoe.Group) -> hpcmoe.MoE:
    """Build experts that all compute what an MLP does; each rank takes those that it holds."""
    up, _, down = mlp
    sizes = up.in_features, up.out_features, NUM_EXPERTS
    moe = hpcmoe.MoE(*sizes, top_k=2, kind="gelu", bias=True, group=group, z_loss_weight=0.001)
    weights = {"up": up.weight, "up_bias": up.bias, "down": down.weight, "down_bias": down.bias}
    copies = {f"experts.{e}.{name}": weight for e in range(NUM_EXPERTS) for name, weight in weights.items()}
    moe.load_state_dict(moe.state_dict() | copies)  # the router stays as it was drawn
    return moe


torch.manual_seed(0)  # the same model and the same tokens on all ranks
model, tokens = nn.Sequential(*(Block() for _ in range(DEPTH))), torch.randn(TOKENS, WIDTH)
with hpcmoe.open() as group:
    tokens = tokens[group.rank :: group.size]  # this rank's share
    wanted = model(tokens)
    for block in model:
        block.mlp = make_moe(block.mlp, group)
    differences = (model(tokens) - wanted).abs().flatten().tolist()
    furthest = MPI.COMM_WORLD.allreduce(max(differences, default=0.0), MPI.MAX)
    if group.rank == 0:
        print(f"outputs of the experts and of the MLPs differ by {furthest:.1e} at most")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)  # made now: the model has other parameters
    for step in range(STEPS):
        loss = (model(tokens) - tokens.roll(1, dims=1)).square().sum() / (TOKENS * WIDTH)
        optimizer.zero_grad()
        loss.backward()
        group.sum_gradients(model)
        optimizer.step()
        total = MPI.COMM_WORLD.allreduce(loss.item())
        if group.rank == 0:
            print(f"step {step}: loss {total:.6f}")
