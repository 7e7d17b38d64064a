"""Gradients are summed over the ranks that share a parameter, part by part, while the backward pass goes on.

On GPUs NCCL does so too. Where MPI carries the rows between GPUs, sums go through the host when the pass is over.

A part of the model is final when each of its parameters has had the backward passes that are expected, which hooks
count. All ranks start the same sums in one order: a part that is final early waits for those before it.
"""

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.comm.reduce import Reducer
from hpcmoe.experts.feed_forward import LocalExperts
from hpcmoe.wait import Backoff

_FIRST_TAG = 1  # of a layer's sums; MPI keeps the order of the experts in it. 0 is of migrations
_GATHERED = 2**22  # gradients of others that a rank holds at once, 16 MB


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
        for parameter, grad in self.grad_of.items():
            parameter.grad = grad
        sizes = [sum(p.numel() for p in parameters) for parameters in parts.values()]
        self.end_of_part = dict(zip(parts, np.cumsum(sizes, dtype=int).tolist(), strict=True))


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
        self.local_of_layer = {placed.layer: placed.local for placed in layers}
        self.of_layer: dict[int, list[HeldReplica]] = {}
        parts, end = {}, 0
        for placed in layers:
            layer, held = placed.layer, placed.ranks_of_slots(comm.rank)
            self.of_layer[layer] = []
            for slot, (expert, ranks) in sorted(held.items(), key=lambda entry: entry[1][1][0] != comm.rank):
                parts[layer, slot] = list(placed.local.replicas[slot].parameters())
                begin, end = end, end + sum(p.numel() for p in parts[layer, slot])
                owned = ranks[0] == comm.rank
                where = HeldReplica(
                    layer=layer, slot=slot, expert=expert, ranks=ranks, owned=owned, begin=begin, end=end
                )
                self.of_layer[layer].append(where)
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
        self, dense: FlatGradients, experts: SharedExperts, order: Sequence[str | int], reducer: Reducer
    ) -> None:
        """order: names of the dense parts, in their order, and layers of experts, in theirs; the same on all ranks."""
        self.dense, self.experts, self.order, self.reducer = dense, experts, order, reducer
        self.mesh, self.bucket = reducer.mesh, reducer.bucket
        self.tasks: list[Iterator] = []
        sources = [(place, source) for place, part in enumerate(order) for source in self.list_sources(part)]
        self.place_of_source = [place for place, _ in sources]
        remove_hooks = count_passes([source for _, source in sources], self.add_pass)
        weakref.finalize(self, remove_hooks)
        self.begin(0)

    def list_sources(self, part: str | int) -> Sequence[nn.Parameter | LocalExperts]:
        """List what tells of the backward passes of a part: dense parameters, or a layer's experts."""
        return self.dense.parts[part] if isinstance(part, str) else [self.experts.local_of_layer[part]]

    def begin(self, num_passes: int) -> None:
        """Prepare for the gradients of so many backward passes, once the sums of the last step are done.

        No sum starts before finish() where num_passes is 0, or where MPI sums a GPU's gradients. Collective over world.
        """
        self.drain()
        self.passes_left = [num_passes if self.reducer.can_overlap else 0] * len(self.place_of_source)
        self.sources_left = np.bincount(self.place_of_source, minlength=len(self.order)).tolist()
        self.waiting = collections.deque(enumerate(self.order))  # parts whose sums have not started
        self.is_open, self.num_started = True, 0
        self.next_layers = collections.deque(self.experts.of_layer)  # whose sums over data-parallel groups are to start

    def add_pass(self, source: int) -> None:
        """Callback: a backward pass has added to the gradients of a source. Start the sums that may start now."""
        if not self.is_open or self.passes_left[source] == 0:
            return
        self.passes_left[source] -= 1
        if self.passes_left[source] == 0:
            self.sources_left[self.place_of_source[source]] -= 1
        while self.waiting and self.sources_left[self.waiting[0][0]] == 0:
            self.start_next()

    def start_next(self) -> None:
        """Start the sums of the next part in the order."""
        _, part = self.waiting.popleft()
        if isinstance(part, str):
            self.tasks.append(self.sum_dense(self.dense.end_of_part[part]))
        else:
            self.tasks.append(self.sum_experts(part))
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
        while self.waiting:
            self.start_next()
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
            while self.next_layers[0] != layer:
                yield
            self.next_layers.popleft()
            yield from self.reducer.all_reduce("dp", owned)


def count_passes(sources: Sequence[nn.Parameter | LocalExperts], add_pass: Callable[[int], None]) -> Callable[[], None]:
    """Call a method with a source's index after each backward pass that has added to its gradients.

    The hooks keep neither the method's object nor the sources alive. -> a function that removes them.
    """
    method, removals = weakref.WeakMethod(add_pass), contextlib.ExitStack()
    for index, source in enumerate(sources):

        def added(_: Any = None, index: int = index) -> None:
            if (alive := method()) is not None:
                alive(index)

        if isinstance(source, LocalExperts):
            source.listeners.append(added)
            removals.callback(source.listeners.remove, added)
        else:
            removals.callback(source.register_post_accumulate_grad_hook(added).remove)
    return removals.close
