"""Gradients are summed over the ranks that share a parameter, part by part, while the backward pass goes on.

On GPUs NCCL does so too. Where MPI carries the rows between GPUs, sums go through the host when the pass is over.

A part of the model is final when each of its parameters has had the backward passes that are expected, which hooks
count. All ranks start the same sums in one order: a part that is final early waits for those before it. From then until
the end of the sums its parameters have no gradient: one that comes late does not get into a sum under way.
"""

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.comm.reduce import Reducer
from hpcmoe.experts.feed_forward import LocalExperts
from hpcmoe.run.flat_gradients import FlatGradients, HeldReplica, SharedExperts
from hpcmoe.wait import Backoff

_FIRST_TAG = 1  # of a layer's sums; MPI keeps the order of the experts in it. 0 is of migrations
_GATHERED = 2**22  # gradients of others that a rank holds at once, 16 MB


class GradientSums:
    """The sums of one step: dense gradients over all ranks, experts' over those that hold the same shard of them."""

    def __init__(
        self, dense: FlatGradients, experts: SharedExperts, order: Sequence[str | int], reducer: Reducer
    ) -> None:
        """order: names of the dense parts, in their order, and layers of experts, in theirs; the same on all ranks."""
        self.dense, self.experts, self.order, self.reducer = dense, experts, order, reducer
        self.arrays = (dense, experts.gradients)
        self.mesh, self.bucket = reducer.mesh, reducer.bucket
        self.tasks: list[Iterator] = []
        sources = [(place, source) for place, part in enumerate(order) for source in self.list_sources(part)]
        self.place_of_source = [place for place, _ in sources]
        remove_hooks = count_passes([source for _, source in sources], self.add_pass)
        weakref.finalize(self, remove_hooks)
        self.begin(None)

    def list_parameters(self, part: str | int) -> Sequence[nn.Parameter]:
        """List the parameters of a part."""
        return self.dense.parts[part] if isinstance(part, str) else self.experts.list_parameters(part)

    def list_sources(self, part: str | int) -> Sequence[nn.Parameter | LocalExperts]:
        """List what tells of the backward passes of a part: dense parameters, or a layer's experts."""
        return self.dense.parts[part] if isinstance(part, str) else [self.experts.local_of_layer[part]]

    def begin(self, expected: Sequence[int] | int | None) -> None:
        """Prepare for the gradients of a step, once the sums of the last are done. Collective over world.

        expected: passes of all sources, or of each. No sum starts before finish() where it is None, or where MPI sums a
        GPU's gradients.
        """
        self.drain()
        if expected is None or not self.reducer.can_overlap:
            expected = -1
        num_sources = len(self.place_of_source)
        self.expected = [expected] * num_sources if isinstance(expected, int) else list(expected)
        self.num_passes = [0] * num_sources
        awaited = [place for place, passes in zip(self.place_of_source, self.expected, strict=True) if passes]
        self.sources_left = np.bincount(awaited, minlength=len(self.order)).tolist()
        self.is_open, self.next_place, self.num_started = True, 0, 0
        for gradients in self.arrays:
            gradients.taken.clear()
        self.next_layers = collections.deque(self.experts.of_layer)  # whose sums over data-parallel groups are to start

    def add_pass(self, source: int) -> None:
        """Callback: a backward pass has added to the gradients of a source. Start the sums that may start now."""
        if not self.is_open:
            return
        self.num_passes[source] += 1
        if self.num_passes[source] == self.expected[source]:
            self.sources_left[self.place_of_source[source]] -= 1
        while self.waiting and self.sources_left[self.next_place] == 0:
            self.start_next()

    @property
    def waiting(self) -> Sequence[str | int]:
        """Return the parts whose sums have not started."""
        return self.order[self.next_place :]

    def start_next(self) -> None:
        """Start the sums of the next part in the order."""
        part = self.order[self.next_place]
        self.next_place += 1
        if isinstance(part, str):
            self.dense.take(self.dense.parts[part])
            self.tasks.append(self.sum_dense(self.dense.end_of_part[part]))
        else:
            self.experts.gradients.take(self.experts.list_parameters(part))
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
        for gradients in self.arrays:
            gradients.attach(gradients.parameters)
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

    def global_norm(self) -> float:
        """Compute the norm of all gradients, every logical parameter counted once. Collective over world."""
        owned = [replica for replica in self.experts.held_replicas() if replica.owned]
        gradients = [self.experts.flat[replica.begin : replica.end] for replica in owned]
        dense, *own = sum_squares([self.dense.flat, *gradients])

        # Order the squares by expert, so that their sum does not depend on the placement.
        experts = [(layer, e) for layer, size in sorted(self.experts.num_experts.items()) for e in range(size)]
        square_of = dict(zip([(replica.layer, replica.expert) for replica in owned], own, strict=True))
        squares = np.array([square_of.get(which, 0.0) for which in experts], np.float64)
        return float(all_reduce(self.mesh.world, squares).sum() / self.mesh.dp.size + dense) ** 0.5

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


def sum_squares(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Sum the squares of each tensor in float64 -> [n]; the host waits for the device once."""
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).cpu().numpy() ** 2


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
