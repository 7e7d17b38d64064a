"""The library's face in plain torch and one process: what an example computes where this is in hpcmoe's place.

Weights begin as hpcmoe's do; all experts compute all tokens; gates and losses are written as their papers have them.
"""

import contextlib

import torch
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F

import hpcmoe

open_library, LibraryMoE = hpcmoe.open, hpcmoe.MoE  # whatever stands in their place later


class Group:
    """A group of one, which has nothing to sum."""

    def __init__(self, library):
        """library: the group from whose layers the first weights are taken."""
        self.library, self.rank, self.size, self.layers = library, 0, 1, []

    def lanes(self, step, micro_batches):
        return [step(micro_batch) for micro_batch in micro_batches]

    def sum_gradients(self, model):
        """Leave the gradients as they are: there is no other rank."""

    def clip_grad_norm_(self, model, max_norm):
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()

    def save(self, folder, model, optimizer=None, extra=None):
        """Save nothing: nobody goes on from a twin."""

    @torch.no_grad()
    def update_routers(self):
        for layer in self.layers:
            layer.router.bias += layer.bias_update_speed * (layer.counts.float().mean() - layer.counts).sign()
            layer.counts.zero_()


@contextlib.contextmanager
def open_group(**_):
    """Open a group of plain torch: in place of hpcmoe.open."""
    with open_library(MPI.COMM_SELF, threads=1) as library:
        yield Group(library)


class AddLoss(torch.autograd.Function):
    """Pass y on; backward, a loss is added to whatever y leads to."""

    @staticmethod
    def forward(ctx, y, loss):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, grad_y.new_ones(())


class MoE(nn.Module):
    """Every expert on every token, times a gate weight that is mostly zero: in place of hpcmoe.MoE."""

    def __init__(
        self, *sizes, group, top_k=2, kind="swiglu", aux_loss_weight=0, z_loss_weight=0, bias_update_speed=0, **others
    ):
        super().__init__()
        self.top_k, self.kind, self.bias_update_speed = top_k, kind, bias_update_speed
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight
        weights = LibraryMoE(*sizes, group=group.library, top_k=top_k, kind=kind, **others).state_dict()
        self.router = nn.Module()
        self.router.weight = nn.Parameter(weights["router.weight"].clone())
        self.router.register_buffer("bias", weights["router.bias"].clone())
        self.register_buffer("load", weights["load"].clone())
        self.experts = nn.ModuleList(nn.ParameterDict() for _ in range(len(self.load)))
        for name, weight in weights.items():
            if name.startswith("experts."):
                _, expert, key = name.split(".")
                self.experts[int(expert)][key] = weight.clone()
        self.counts = torch.zeros(len(self.load))  # of tokens by expert
        group.layers.append(self)

    def forward(self, x):
        """Shazeer et al. 2017 with the losses of Fedus et al. 2021 and Zoph et al. 2022."""
        rows = x.reshape(-1, x.shape[-1])
        logits = rows @ self.router.weight.T
        probabilities = logits.softmax(dim=1)
        choices = (logits + self.router.bias).topk(self.top_k).indices
        gates = probabilities.gather(1, choices)
        if self.top_k > 1:
            gates = gates / gates.sum(dim=1, keepdim=True)
        y = sum((gates * (choices == e)).sum(dim=1, keepdim=True) * self.expert(e, rows) for e in range(len(self.load)))

        counts = choices.flatten().bincount(minlength=len(self.load))
        self.counts += counts
        aux_loss = len(counts) * (counts / counts.sum() * probabilities.mean(dim=0)).sum()
        z_loss = logits.logsumexp(dim=1).square().mean()
        return AddLoss.apply(y, self.aux_loss_weight * aux_loss + self.z_loss_weight * z_loss).view(x.shape)

    def expert(self, expert, x):
        up = self.linear(expert, "up", x)
        hidden = F.silu(self.linear(expert, "gate", x)) * up if self.kind == "swiglu" else F.gelu(up)
        return self.linear(expert, "down", hidden)

    def linear(self, expert, name, x):
        weights = self.experts[expert]
        return F.linear(x, weights[name], weights.get(f"{name}_bias"))
