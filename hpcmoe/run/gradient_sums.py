"""Gradients are summed over the ranks that share a parameter, part by part, while the backward pass goes on.

On GPUs NCCL does so too. Where MPI carries the rows between GPUs, sums go through the host when the pass is over.

A gradient is final when the last micro-batch has completed its op. Gradients become final in one order on all ranks,
under any schedule: head, last layer ... first layer, embedding. So all ranks start the same sums in one order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.comm.reduce import HostReducer, NcclReducer
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.model.language import Block, LanguageModel
from hpcmoe.pipeline.schedule import Op
from hpcmoe.placement.result import Placement
from hpcmoe.wait import Backoff

_FIRST_TAG = 1  # of a layer's sums; MPI keeps the order of the experts in it. 0 is of migrations
_GATHERED = 2**22  # gradients of others that a rank holds at once, 16 MB


class FlatGradients:
    """The gradients of parts of the network in one array, so that one message sums many."""

    def __init__(self, parts: Mapping[Any, Sequence[nn.Parameter]]):
        """parts: parameters by part, in the order of the array."""
        self.parameters = [p for parameters in parts.values() for p in parameters]
        device = self.parameters[0].device if self.parameters else None
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        rows = zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True)
        self.grad_of = {parameter: part.view(parameter.shape) for parameter, part in rows}
        for parameter, grad in self.grad_of.items():
            parameter.grad = grad
        sizes = [sum(p.numel() for p in parameters) for parameters in parts.values()]
        self.end_of_part = dict(zip(parts, np.cumsum(sizes, dtype=int).tolist(), strict=True))


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

    Gradients are in the order of the backward pass, last layer first; in a layer those of owned experts come first.
    """

    def __init__(self, placement: Placement, comm: MPI.Comm, layers: Sequence[Block]):
        """comm: the expert-parallel group."""
        self.of_layer: dict[int, list[HeldReplica]] = {}
        parts, end = {}, 0
        for layer in reversed(range(len(layers))):
            # Find the ranks of the group that hold each expert of this rank.
            held = placement.experts_of_rank(layer, comm.rank).tolist()
            ranks_of = {
                slot: tuple(np.unique(placement.rank_of_replica[placement.expert_of_replica[layer] == expert]).tolist())
                for slot, expert in enumerate(held)
                if expert >= 0
            }

            # Order the gradients: those of owned experts first.
            self.of_layer[layer] = []
            for slot in sorted(ranks_of, key=lambda slot: ranks_of[slot][0] != comm.rank):
                parts[layer, slot] = list(layers[layer].experts.local.replicas[slot].parameters())
                begin, end = end, end + sum(p.numel() for p in parts[layer, slot])
                where = {"layer": layer, "slot": slot, "expert": held[slot], "ranks": ranks_of[slot]}
                owned = ranks_of[slot][0] == comm.rank
                self.of_layer[layer].append(HeldReplica(**where, owned=owned, begin=begin, end=end))
        self.flat = FlatGradients(parts).flat

    def held_replicas(self) -> list[HeldReplica]:
        """List the experts of all slots of this rank."""
        return [replica for held in self.of_layer.values() for replica in held]

    def owns(self, layer: int, slot: int) -> bool:
        """Return True if this rank is the first that holds the expert in its slot."""
        return any(replica.owned and replica.slot == slot for replica in self.of_layer[layer])


class GradientSums:
    """The sums of one step: dense gradients over all ranks, experts' over those that hold the same shard of them."""

    def __init__(
        self,
        dense: FlatGradients,
        experts: SharedExperts,
        network: LanguageModel,
        bucket_bytes: int,
        num_micro_batches: int,
    ):
        """All sums start in finish() where bucket_bytes is 0, and where a GPU's gradients go by MPI."""
        self.dense, self.experts, self.mesh = dense, experts, network.mesh
        groups = network.layers[0].experts.dispatcher.sum_groups
        self.bucket = max(bucket_bytes // FLOAT32_BYTES, 1) if bucket_bytes else 2**31
        self.reducer: Any = (
            HostReducer(self.mesh, network.device, self.bucket)
            if groups is None
            else NcclReducer(self.mesh, network.device, groups)
        )
        self.overlaps = bucket_bytes > 0 and self.reducer.can_overlap
        self.num_micro_batches = num_micro_batches
        self.tasks: list[Iterator] = []
        self.begin()

    def begin(self) -> None:
        """Prepare for the gradients of a step, once the sums of the last are done. Collective over world."""
        self.drain()
        ops = [*self.dense.end_of_part, *(("compute_backward", layer) for layer in self.experts.of_layer)]
        ops.sort(key=lambda op: (op[0] == "embed_backward", op[0] != "head", -op[1]))
        self.left = dict.fromkeys(ops, self.num_micro_batches)  # micro-batches that have yet to complete an op
        self.is_open, self.num_started, self.next_layer = True, 0, max(self.experts.of_layer, default=0)

    def complete_op(self, op: Op) -> None:
        """Callback: a micro-batch has completed an op. Start the sums of gradients that are final now."""
        part = op.stage, op.layer
        if not (self.overlaps and self.is_open and part in self.left):
            return
        self.left[part] -= 1
        if self.left[part] == 0:
            self.start(part)

    def start(self, part: tuple[str, int]) -> None:
        """Start to sum the gradients that an op (stage, layer) has completed."""
        del self.left[part]
        stage, layer = part
        of_experts = stage == "compute_backward"
        self.tasks.append(self.sum_experts(layer) if of_experts else self.sum_dense(self.dense.end_of_part[part]))
        self.poke()

    def poke(self) -> bool:
        """Advance all sums under way without waiting -> whether one has ended."""
        before = len(self.tasks)
        self.reducer.poke()
        self.tasks = [task for task in self.tasks if next(task, "over") != "over"]
        return len(self.tasks) < before

    def finish(self) -> None:
        """Start the sums that have not started and wait for all, once a step. Collective over world."""
        if not self.is_open:
            return
        for part in list(self.left):
            self.start(part)
            if not self.reducer.can_overlap:  # host memory for one part, not for all
                self.drain()
        self.drain()
        self.is_open = False

    def drain(self) -> None:
        """Wait for the sums under way."""
        backoff = Backoff()
        while self.tasks:
            if not self.poke():
                backoff.pause()
        for _ in self.reducer.finish():
            self.reducer.poke()
            backoff.pause()

    def all_gather_dense(self, counts: list[int]) -> None:
        """Gather the dense gradients' array, of which rank r holds the r-th part, counts[r] numbers.

        Collective over world.
        """
        if self.mesh.world.size > 1:
            with self.reducer.open_for_sums(self.dense.flat) as flat:
                self.tasks.append(iter(self.reducer.all_gather(flat, counts)))
                self.drain()

    def sum_dense(self, end: int) -> Iterator:
        """Sum the dense gradients that are final, up to number `end`, in whole buckets but for the last."""
        if end < len(self.dense.flat):
            end -= end % self.bucket
        gradients, self.num_started = self.dense.flat[self.num_started : end], max(end, self.num_started)
        if len(gradients) and self.mesh.world.size > 1:
            with self.reducer.open_for_sums(gradients) as flat:
                yield from self.reducer.all_reduce("world", flat)

    def sum_experts(self, layer: int) -> Iterator:
        """Sum the gradients of a layer's experts; all replicas of one get the same bits.

        In each group the first rank that holds an expert adds the others' gradients in rank order; these ranks sum over
        the data-parallel groups; then each sends the sum back.
        """
        held = self.experts.of_layer[layer]
        replicas = sorted((replica for replica in held if len(replica.ranks) > 1), key=lambda replica: replica.expert)
        if not replicas and self.mesh.dp.size == 1:
            return
        first, end = (held[0].begin, held[-1].end) if held else (0, 0)
        with self.reducer.open_for_sums(self.experts.flat[first:end]) as flat:
            gradient_of = {replica: flat[replica.begin - first : replica.end - first] for replica in held}
            for replica in replicas:
                yield from self.gather_replica(replica, gradient_of[replica])
            yield from self.sum_groups(layer, flat[: sum(r.end - r.begin for r in held if r.owned)])
            tag = _FIRST_TAG + layer
            to_others = [(tag, rank, gradient_of[r]) for r in replicas if r.owned for rank in r.ranks[1:]]
            from_first = [(tag, r.ranks[0], gradient_of[r]) for r in replicas if not r.owned]
            yield from self.reducer.send_recv(outgoing=to_others, incoming=from_first)

    def gather_replica(self, replica: HeldReplica, gradient: torch.Tensor) -> Iterator:
        """Add the others' gradients on the first rank that holds an expert, piece by piece in little memory.

        All ranks take replicas in the order of their experts, which prevents deadlock.
        """
        tag, others = _FIRST_TAG + replica.layer, replica.ranks[1:]
        pieces = gradient.split(max(_GATHERED // len(others), 1))
        if not replica.owned:
            for piece in pieces:
                yield from self.reducer.send_recv(outgoing=[(tag, replica.ranks[0], piece)], incoming=())
            return
        gathered = gradient.new_empty(len(others), len(pieces[0]))
        for piece in pieces:
            rows = gathered[:, : len(piece)]
            incoming = [(tag, rank, row) for rank, row in zip(others, rows, strict=True)]
            yield from self.reducer.send_recv(outgoing=(), incoming=incoming)
            for row in rows:
                piece += row

    def sum_groups(self, layer: int, owned: torch.Tensor) -> Iterator:
        """Sum over the data-parallel groups, layer after layer: all ranks of a communicator start in one order."""
        if self.mesh.dp.size > 1:
            while self.next_layer != layer:
                yield
            self.next_layer -= 1
            yield from self.reducer.all_reduce("dp", owned)
