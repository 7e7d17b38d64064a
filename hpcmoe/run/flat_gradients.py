"""Where gradients lie while they are summed: dense parameters' in one array, experts' in another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.experts.feed_forward import LocalExperts


class FlatGradients:
    """The gradients of parts of the network in one array, so that one message sums many."""

    def __init__(self, parts: Mapping[Any, Sequence[nn.Parameter]]):
        """parts: parameters by part, in the order of the array."""
        self.parts = parts
        self.parameters = [p for parameters in parts.values() for p in parameters]
        device = self.parameters[0].device if self.parameters else None
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        rows = zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True)
        self.grad_of = {parameter: part.view(parameter.shape) for parameter, part in rows}
        self.taken: set[nn.Parameter] = set()  # that had a gradient when take() came
        self.take(self.parameters)
        self.attach(self.parameters)
        sizes = [sum(p.numel() for p in parameters) for parameters in parts.values()]
        self.end_of_part = dict(zip(parts, np.cumsum(sizes, dtype=int).tolist(), strict=True))

    @torch.no_grad()
    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move parameters' gradients into the array, zeros where one has none, and leave them without."""
        for parameter in parameters:
            here, grad = self.grad_of[parameter], parameter.grad
            if grad is None:
                here.zero_()
            else:
                if grad is not here:
                    here.copy_(grad)
                self.taken.add(parameter)
                parameter.grad = None

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Return True if this step has brought a parameter a gradient."""
        return parameter in self.taken or parameter.grad is not None

    @torch.no_grad()
    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set parameters' gradients to what the array has: a view of it, or a copy in a parameter's own precision."""
        for parameter in parameters:
            parameter.grad = self.grad_of[parameter].to(parameter.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedExperts:
    """This rank's experts of a layer, and where all replicas of the layer's experts are."""

    layer: int
    local: LocalExperts
    expert_of_replica: np.ndarray  # [S] int64, -1 in an empty slot
    rank_of_replica: np.ndarray  # [S] int64, of the expert-parallel group

    def ranks_of_slots(self, rank: int) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Find what a rank's slots hold -> {slot: (expert, the ranks that hold it, ascending)}."""
        held = self.expert_of_replica[self.rank_of_replica == rank].tolist()
        return {
            slot: (expert, tuple(np.unique(self.rank_of_replica[self.expert_of_replica == expert]).tolist()))
            for slot, expert in enumerate(held)
            if expert >= 0
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldReplica:
    """The expert in one slot of this rank, and the ranks of the group that hold it."""

    layer: int
    slot: int
    expert: int
    ranks: tuple[int, ...]  # of the expert-parallel group, ascending
    owned: bool  # this rank is the first of them
    begin: int  # of its gradients in the flat array
    end: int


class SharedExperts:
    """The experts of this rank, the ranks of the group that hold replicas of them, and their gradients.

    Gradients are in the order of the layers given; in a layer those of owned experts come first.
    """

    def __init__(self, layers: Sequence[PlacedExperts], comm: MPI.Comm):
        """layers: in the order in which their sums start; comm: the expert-parallel group."""
        self.num_experts = {placed.layer: int(placed.expert_of_replica.max(initial=-1)) + 1 for placed in layers}
        self.local_of_layer = {placed.layer: placed.local for placed in layers}
        self.of_layer: dict[int, list[HeldReplica]] = {}
        parts, end = {}, 0
        for placed in layers:
            layer, held = placed.layer, placed.ranks_of_slots(comm.rank)
            self.of_layer[layer] = []
            for slot, (expert, ranks) in sorted(held.items(), key=lambda entry: entry[1][1][0] != comm.rank):
                parts[layer, slot] = [p for p in placed.local.replicas[slot].parameters() if p.requires_grad]
                begin, end = end, end + sum(p.numel() for p in parts[layer, slot])
                owned = ranks[0] == comm.rank
                where = HeldReplica(
                    layer=layer, slot=slot, expert=expert, ranks=ranks, owned=owned, begin=begin, end=end
                )
                self.of_layer[layer].append(where)
        self.gradients = FlatGradients(parts)
        self.flat = self.gradients.flat

    def list_parameters(self, layer: int) -> list[nn.Parameter]:
        """List the parameters whose gradients a layer's sums are of."""
        return [p for held in self.of_layer[layer] for p in self.gradients.parts[layer, held.slot]]

    def held_replicas(self) -> list[HeldReplica]:
        """List the experts of all slots of this rank."""
        return [replica for held in self.of_layer.values() for replica in held]

    def owns(self, layer: int, slot: int) -> bool:
        """Return True if this rank is the first that holds the expert in its slot."""
        return any(replica.owned and replica.slot == slot for replica in self.of_layer[layer])
