"""Gradients are summed where parameters are shared, clipped by their global norm, and given to AdamW.

AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; clipping: Pascanu et al. 2013 (arXiv:1211.5063).
"""

import numpy as np
import torch

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.comm.sums import Sums
from hpcmoe.wait import wait_all


class FlatGradients:
    """The gradients of some parameters as one array, so that one message sums them all."""

    def __init__(self, parameters, sums=None):
        self.parameters, self.sums = list(parameters), sums or Sums()
        total = sum(p.numel() for p in self.parameters)
        where = self.parameters[0].device if self.parameters else None
        self.flat = torch.zeros(total, device=where)
        pieces = self.flat.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)

    def all_reduce(self, comm, scale=1.0):
        """Sum over the ranks of comm, in place, and scale. Collective over comm."""
        if comm.size > 1 and len(self.flat):
            self.sums.all_reduce(comm, self.flat)
        if scale != 1.0:
            self.flat *= scale


class SharedExperts:
    """The experts of this rank that have copies on other ranks of the group, and the sum of their gradients."""

    def __init__(self, placement, comm):
        self.comm = comm
        self.ranks_of = {}  # (layer, slot on this rank): (expert, ranks that hold it, ascending)
        for layer, experts in enumerate(placement.expert_of_replica):
            for slot, expert in enumerate(placement.experts_of_rank(layer, comm.rank).tolist()):
                ranks = np.sort(placement.rank_of_replica[experts == expert]).tolist()
                if expert >= 0:
                    self.ranks_of[layer, slot] = (expert, ranks)

    def owns(self, layer, slot):
        """Whether this rank is the first that holds what is in its slot."""
        return (layer, slot) in self.ranks_of and self.ranks_of[layer, slot][1][0] == self.comm.rank

    def sum_gradients(self, layers):
        """Give every copy of an expert the same sum, bit for bit. Collective over ep.

        The first rank that holds an expert adds the others' gradients in rank order and sends the sum back.
        """
        shared = [
            (layer * len(layers[0].router.weight) + expert, ranks, layers[layer].experts.replicas[slot])
            for (layer, slot), (expert, ranks) in self.ranks_of.items()
            if len(ranks) > 1
        ]
        mine = {tag: flatten_gradients(replica) for tag, _, replica in shared}
        others = {tag: np.empty((len(ranks) - 1, len(mine[tag])), np.float32) for tag, ranks, _ in shared}

        # Copies' gradients travel to the first rank of each expert.
        requests = []
        for tag, (first, *rest), _ in shared:
            if self.comm.rank == first:
                requests += [self.comm.Irecv(row, rank, tag) for row, rank in zip(others[tag], rest, strict=True)]
            else:
                requests.append(self.comm.Isend(mine[tag], first, tag))
        wait_all(requests)

        # It sums them and sends every copy the result.
        requests = []
        for tag, (first, *rest), _ in shared:
            if self.comm.rank == first:
                for row in others[tag]:
                    mine[tag] += row
                requests += [self.comm.Isend(mine[tag], rank, tag) for rank in rest]
            else:
                requests.append(self.comm.Irecv(mine[tag], first, tag))
        wait_all(requests)
        for tag, _, replica in shared:
            spread_gradients(replica, mine[tag])


def flatten_gradients(module):
    """Join a module's gradients -> NumPy array."""
    return torch.cat([p.grad.flatten() for p in module.parameters()]).cpu().numpy()


def spread_gradients(module, flat):
    """Write a flat array back into a module's gradients."""
    parameters = list(module.parameters())
    pieces = torch.from_numpy(flat).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad.copy_(piece.view(parameter.shape))


class Optimizer:
    """AdamW over this rank's parameters, dense and expert."""

    def __init__(self, network, placement, config, mesh):
        self.network, self.train, self.mesh = network, config.train, mesh
        self.shared = SharedExperts(placement, mesh.ep)
        experts = {p for layer in network.layers for p in layer.experts.parameters()}
        self.dense = FlatGradients((p for p in network.parameters() if p not in experts), network.sums)
        self.expert = FlatGradients((p for layer in network.layers for p in layer.experts.parameters()), network.sums)

        # Norms and biases are not decayed.
        matrices = [p for p in network.parameters() if p.dim() > 1]
        vectors = [p for p in network.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": self.train.weight_decay},
                  {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
        betas = (self.train.beta1, self.train.beta2)
        self.adamw = torch.optim.AdamW(
            groups, lr=self.train.learning_rate, betas=betas, eps=self.train.epsilon, fused=True
        )

    def zero_gradients(self):
        """Start a step's sums from zero."""
        self.dense.flat.zero_()
        self.expert.flat.zero_()

    def step(self, number):
        """Sum, clip and apply the gradients of step `number` (from 1) -> their global norm before clipping.

        Collective over all ranks.
        """
        self.sum_gradients()
        norm = self.global_norm()
        if 0 < self.train.clip_norm < norm:
            self.dense.flat *= self.train.clip_norm / norm
            self.expert.flat *= self.train.clip_norm / norm
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate_at(number, self.train)
        self.adamw.step()
        for layer in self.network.layers:
            layer.experts.refresh()
        return norm

    def sum_gradients(self):
        """Sum gradients over the ranks that share the parameter. Collective over all ranks."""
        # The ranks of a tensor-parallel group all hold the dense gradients of the same tokens.
        self.dense.all_reduce(self.mesh.world, 1 / self.mesh.tensor_parallel)
        self.shared.sum_gradients(self.network.layers)
        self.expert.all_reduce(self.mesh.dp)

    def global_norm(self):
        """Norm of all gradients, every logical parameter counted once. Collective over all ranks."""
        square = 0.0
        for (layer, slot), (_, ranks) in self.shared.ranks_of.items():
            for p in self.network.layers[layer].experts.replicas[slot].parameters():
                square += square_of(p.grad) / len(ranks)
        square = all_reduce(self.mesh.world, np.array([square / self.mesh.data_parallel]))[0]
        return float(square + square_of(self.dense.flat)) ** 0.5


def square_of(tensor):
    """Sum of squares in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


def learning_rate_at(number, train):
    """Learning rate of step `number` (from 1): a linear rise, then constant."""
    return train.learning_rate * min(1.0, number / max(train.learning_rate_warmup_steps, 1))
