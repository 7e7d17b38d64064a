"""Gradients are summed where parameters are shared, clipped by their global norm, and given to AdamW.

AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; clipping: Pascanu et al. 2013 (arXiv:1211.5063);
optimizer state sharded over the ranks: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5.1.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.run.gradient_sums import GradientSums

MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}  # our name: AdamW's


class FlatGradients:
    """The gradients of some parts of the network as one array, so that one message sums many."""

    def __init__(self, parts):
        """parts: name of a part: its parameters, laid one part after the other."""
        parts = {name: list(parameters) for name, parameters in parts.items()}
        self.parameters = [p for parameters in parts.values() for p in parameters]
        where = self.parameters[0].device if self.parameters else None
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=where)
        pieces = self.flat.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)
        sizes = [sum(p.numel() for p in parameters) for parameters in parts.values()]
        self.end_of_part = dict(zip(parts, np.cumsum(sizes, dtype=int).tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldReplica:
    """What one slot of this rank holds of an expert, and who else in the group holds the same."""

    layer: int
    slot: int
    expert: int
    ranks: tuple[int, ...]  # of the expert-parallel group, ascending
    owned: bool  # this rank is the first of them
    begin: int  # where its gradients lie in the flat array
    end: int

    @property
    def size(self):
        """Numbers in its parameters."""
        return self.end - self.begin


class SharedExperts:
    """The experts of this rank, which of them have replicas on other ranks of the group, and all their gradients.

    Gradients lie as the backward pass ends them, last layer first; in a layer those of owned experts come first.
    """

    def __init__(self, placement, comm, layers):
        """comm: the expert-parallel group."""
        self.of_layer, parts, end = {}, {}, 0
        for layer in reversed(range(len(layers))):
            held = placement.experts_of_rank(layer, comm.rank).tolist()
            ranks_of = {
                slot: tuple(np.unique(placement.rank_of_replica[placement.expert_of_replica[layer] == expert]).tolist())
                for slot, expert in enumerate(held)
                if expert >= 0
            }
            self.of_layer[layer] = []
            for slot in sorted(ranks_of, key=lambda slot: ranks_of[slot][0] != comm.rank):
                parts[layer, slot] = list(layers[layer].experts.replicas[slot].parameters())
                begin, end = end, end + sum(p.numel() for p in parts[layer, slot])
                where = {"layer": layer, "slot": slot, "expert": held[slot], "ranks": ranks_of[slot]}
                owned = ranks_of[slot][0] == comm.rank
                self.of_layer[layer].append(HeldReplica(**where, owned=owned, begin=begin, end=end))
        self.flat = FlatGradients(parts).flat

    def held_replicas(self):
        """List what all slots of this rank hold."""
        return [replica for held in self.of_layer.values() for replica in held]

    def owns(self, layer, slot):
        """Whether this rank is the first that holds what is in its slot."""
        return any(replica.owned and replica.slot == slot for replica in self.of_layer[layer])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteppedRows:
    """Rows of a parameter that AdamW steps here, a view of them; with its state in Optimizer.adamw."""

    rows: nn.Parameter
    first: int


class AdamW(torch.optim.AdamW):
    """torch's own, without the wrappers that keep torch's compiler out of it: these import the compiler, which takes
    each rank two seconds of CPU."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Optimizer:
    """AdamW over this rank's parameters, dense and expert.

    stepped_rows[parameter] says what of it is stepped here, and so whose state is here: all of an expert that this rank
    holds; all of a dense parameter, or with shard_optimizer its rows that are this rank's share, if any.
    """

    def __init__(self, network, placement, config, mesh):
        self.network, self.train, self.mesh = network, config.train, mesh
        self.num_micro_batches = config.pipeline.micro_batches
        self.dense = FlatGradients(network.dense_parts())
        self.share_gradients(placement)

        self.stepped_rows = {p: [SteppedRows(rows=p, first=0)] for p in network.parameters()}
        if self.train.shard_optimizer:
            self.stepped_rows |= cut_stepped_rows(self.dense.parameters, mesh.world.rank, mesh.world.size)

        # Norms and biases are not decayed.
        stepped = [piece.rows for pieces in self.stepped_rows.values() for piece in pieces]
        groups = [{"params": [p for p in stepped if p.dim() > 1], "weight_decay": self.train.weight_decay},
                  {"params": [p for p in stepped if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
        betas = (self.train.beta1, self.train.beta2)
        self.adamw = AdamW(groups, lr=self.train.learning_rate, betas=betas, eps=self.train.epsilon, fused=True)

    def share_gradients(self, placement):
        """Sum the experts' gradients from now on as a placement has them, between two steps."""
        self.shared = SharedExperts(placement, self.mesh.ep, self.network.layers)
        self.sums = self.network.sums = GradientSums(
            self.dense, self.shared, self.network, self.train.bucket_bytes, self.num_micro_batches
        )

    def follow_placement(self, placement, step):
        """Take on what this rank has under another placement, after so many steps; moments of a new expert are zero."""
        held = {p for layer in self.network.layers for p in layer.experts.parameters()}
        gone = self.stepped_rows.keys() - held - set(self.dense.parameters)
        for parameter in gone | held:
            parameter.grad = None
        self.shared = self.sums = self.network.sums = None  # their memory is free before more is taken
        self.share_gradients(placement)

        new = [p for layer in self.network.layers for p in layer.experts.parameters() if p not in self.stepped_rows]
        for parameter in gone:
            del self.stepped_rows[parameter]
            self.adamw.state.pop(parameter, None)
        self.stepped_rows |= {p: [SteppedRows(rows=p, first=0)] for p in new}
        for group, wanted in zip(self.adamw.param_groups, (lambda p: p.dim() > 1, lambda p: p.dim() <= 1), strict=True):
            group["params"] = [p for p in group["params"] if p not in gone] + [p for p in new if wanted(p)]
        for parameter in new:
            self.adamw.state[parameter] = make_zero_state(parameter, step)

    def zero_gradients(self):
        """Start a step's sums from zero. Collective over all ranks."""
        self.sums.begin()
        self.dense.flat.zero_()
        self.shared.flat.zero_()

    def step(self, number):
        """Sum, clip and apply the gradients of step `number` (from 1) -> their global norm before clipping.

        Collective over all ranks.
        """
        self.sum_gradients()
        norm = self.global_norm()
        if 0 < self.train.clip_norm < norm:
            self.dense.flat *= self.train.clip_norm / norm
            self.shared.flat *= self.train.clip_norm / norm
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate_at(number, self.train)
        self.adamw.step()
        if self.train.shard_optimizer:
            self.gather_dense()
        for layer in self.network.layers:
            layer.experts.refresh()
        return norm

    def sum_gradients(self):
        """Wait for the sums of gradients over the ranks that share a parameter. Collective over all ranks."""
        self.sums.finish()

    def gather_dense(self):
        """Give every rank the rows that others have stepped, through the memory of the gradients, which are applied.

        Collective over all ranks.
        """
        for parameter in self.dense.parameters:
            for piece in self.stepped_rows[parameter]:
                parameter.grad[piece.first : piece.first + len(piece.rows)] = piece.rows.detach()
        shares = [cut_rows(self.dense.parameters, rank, self.mesh.world.size) for rank in range(self.mesh.world.size)]
        counts = [sum((end - first) * p[0].numel() for p, first, end in share) for share in shares]
        self.sums.all_gather_dense(counts)
        for parameter in self.dense.parameters:
            parameter.data.copy_(parameter.grad)

    def global_norm(self):
        """Norm of all gradients, every logical parameter counted once. Collective over all ranks."""
        owned = [replica for replica in self.shared.held_replicas() if replica.owned]
        dense, *own = sum_squares(
            [self.dense.flat, *(self.shared.flat[replica.begin : replica.end] for replica in owned)]
        )

        # Laid out by expert, so that their sum does not depend on who holds which.
        squares = np.zeros((len(self.network.layers), len(self.network.layers[0].router.weight)))
        for replica, square in zip(owned, own, strict=True):
            squares[replica.layer, replica.expert] = square
        return float(all_reduce(self.mesh.world, squares).sum() / self.mesh.data_parallel + dense) ** 0.5


def make_zero_state(rows, step):
    """Make AdamW's state of what it is to step for the first time, after so many steps: moments of zero -> dict."""
    moments = {name: torch.zeros_like(rows) for name in MOMENTS.values()}
    return {"step": torch.tensor(float(step), device=rows.device)} | moments


def cut_rows(parameters, index, num_shares):
    """Deal the rows of parameters out in nearly equal shares -> list of (parameter, first row, end) of one share."""
    total, before, rows = sum(p.numel() for p in parameters), 0, []
    for parameter in parameters:
        width = parameter[0].numel()
        edges = (total * edge // num_shares - before for edge in (index, index + 1))
        first, end = (min(max(-(-edge // width), 0), len(parameter)) for edge in edges)
        if first < end:
            rows.append((parameter, first, end))
        before += parameter.numel()
    return rows


def cut_stepped_rows(parameters, index, num_shares):
    """Make one share's rows into what AdamW can step -> dict parameter: list of SteppedRows."""
    pieces = {parameter: [] for parameter in parameters}
    for parameter, first, end in cut_rows(parameters, index, num_shares):
        rows = nn.Parameter(parameter.data[first:end])
        rows.grad = parameter.grad[first:end]
        pieces[parameter].append(SteppedRows(rows=rows, first=first))
    return pieces


def sum_squares(tensors):
    """Sum the squares of each tensor in float64 -> array; the host waits for their device once."""
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).cpu().numpy() ** 2


def learning_rate_at(number, train):
    """Learning rate of step `number` (from 1): a linear rise, then constant."""
    return train.learning_rate * min(1.0, number / max(train.learning_rate_warmup_steps, 1))
