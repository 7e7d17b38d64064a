"""The gradients of any torch model, summed over the ranks of a group: who has a parameter gets the sum of all ranks'.

Parameters of experts are summed over the ranks that hold the same shard of them, all others over all ranks. Sums start
in the reverse order of the model's modules, which is about that of the backward pass.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.comm.reduce import Reducer
from hpcmoe.errors import TrainingError, raise_or_return
from hpcmoe.experts.feed_forward import LocalExperts
from hpcmoe.run.flat_gradients import FlatGradients, PlacedExperts, SharedExperts
from hpcmoe.run.gradient_sums import GradientSums
from hpcmoe.run.move_experts import view_bytes
from hpcmoe.wait import gather_to_all, wait_all

_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_
_HASH_BYTES = 7  # fit into int64, with either sign


class LayerOfExperts(Protocol):
    """What sums need to know of a layer of a group (hpcmoe.Experts)."""

    local: LocalExperts
    placement: Any  # of this layer alone: expert_of_replica [1, S], rank_of_replica [S]
    number: int


Part = tuple[str, nn.Parameter] | LayerOfExperts


class ModelGradients:
    """The sums of one model's gradients, one a step. The model may change between steps, alike on all ranks."""

    def __init__(self, model: nn.Module, layers: Sequence[LayerOfExperts], reducer: Reducer) -> None:
        """layers: the group's; of these the model's count."""
        self.model, self.layers, self.reducer, self.world = model, layers, reducer, reducer.mesh.world
        self.sums: GradientSums | None = None
        self.error: TrainingError | None = None  # after which nothing can be summed any more
        self.num_passes = 0  # that were told of since the last sum

    def expect(self, num_passes: int) -> None:
        """Start sums during the next so many backward passes, which are all until finish().

        A parameter is final when it has had as many gradients a pass as in the last step, at first one. Where that was
        wrong finish() makes up for it. The same on all ranks. Not collective.
        """
        if self.sums is None or self.error is not None or self.has_changed():
            return
        if any(self.sums.num_passes):  # others came before, so that nobody knows how many will
            self.sums.expected = [-1] * len(self.sums.expected)
            self.num_passes += num_passes
        else:
            self.num_passes = num_passes
            self.sums.begin([count * num_passes for count in self.passes_of_source])

    def poke(self) -> bool:
        """Advance all sums under way without waiting -> whether one has ended."""
        return self.sums is not None and self.sums.poke()

    def finish(self) -> None:
        """Sum what is not summed yet: then each trained parameter's .grad is the sum. Collective over the group.

        A parameter without a gradient on some ranks counts as zeros there, one without on all ranks keeps none; of
        experts each gets one. Raises TrainingError on all ranks where the ranks' parameters differ.
        """
        raise_or_return(None, self.error)
        is_first = self.sums is None
        has_changed = self.sums is None or self.has_changed()
        if self.sums is None or (has_changed and self.sums.next_place == 0):
            self.sums, has_changed = self.rebuild(), False
        sums, dense = self.sums, self.sums.dense
        late = self.pop_late(sums)
        own = [p in late or dense.has_gradient(p) for p in dense.parameters]
        present, is_late = self.agree(own, bool(late), has_changed)
        if is_first:
            self.check_values(dense)

        # Sum, and a second time where gradients came after their sum had begun.
        self.learn_passes(sums)
        sums.finish()
        if is_late:
            add_late(sums, late)
        for parameter, is_present in zip(dense.parameters, present, strict=True):
            if not is_present:
                parameter.grad = None
        self.num_passes = 0
        sums.begin(None)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale summed gradients to a norm of at most max_norm -> the norm before. Collective over the group.

        As torch.nn.utils.clip_grad_norm_, with each logical parameter counted once: replicas, tensor-parallel shards.
        Raises TrainingError before the first finish().
        """
        if self.sums is None:
            raise TrainingError("clip_grad_norm_: no gradients are summed yet: call sum_gradients first")
        held = [(a, [p for p in a.parameters if p.grad is not None]) for a in self.sums.arrays]
        for array, _ in held:  # whatever has become of them since
            array.take(array.parameters)
            array.taken.clear()
        norm = self.sums.global_norm()
        for array, parameters in held:
            array.flat *= min(max_norm / (norm + _EPSILON), 1.0)
            array.attach(parameters)
        return norm

    def has_changed(self) -> bool:
        """Return True if other parameters are trained than last, or experts are elsewhere."""
        marks = list_marks(list_parts(self.model, self.layers))
        return len(marks) != len(self.marks) or any(a is not b for a, b in zip(marks, self.marks, strict=True))

    def rebuild(self) -> GradientSums:
        """Build the sums of the parameters that the model trains now; gradients stay as they are."""
        self.sums = None  # frees its arrays
        parts = list_parts(self.model, self.layers)
        self.marks, self.names = list_marks(parts), [describe_part(part) for part in parts]
        placed = [
            PlacedExperts(
                layer=part.number,
                local=part.local,
                expert_of_replica=part.placement.expert_of_replica[0],
                rank_of_replica=part.placement.rank_of_replica,
            )
            for part in parts
            if not isinstance(part, tuple)
        ]
        dense = {part[0]: [part[1]] for part in parts if isinstance(part, tuple)}
        without = [p for (p,) in dense.values() if p.grad is None]
        order = [part[0] if isinstance(part, tuple) else part.number for part in parts]
        experts = SharedExperts(placed, self.reducer.mesh.ep)
        sums = GradientSums(FlatGradients(dense), experts, order, self.reducer)
        for parameter in without:
            parameter.grad = None
        self.passes_of_source = [1] * len(sums.num_passes)
        return sums

    def learn_passes(self, sums: GradientSums) -> None:
        """Keep how many gradients each source had a pass; -1 where nobody told, or these differ."""
        if self.num_passes > 0:
            counted = [divmod(count, self.num_passes) for count in sums.num_passes]
            self.passes_of_source = [-1 if rest else count for count, rest in counted]

    def pop_late(self, sums: GradientSums) -> dict[nn.Parameter, torch.Tensor]:
        """Pop the gradients that came after their sum had begun."""
        started = [p for part in sums.order[: sums.next_place] for p in sums.list_parameters(part)]
        late = {p: p.grad for p in started if p.grad is not None}
        for parameter in late:
            parameter.grad = None
        return late

    def agree(self, present: list[bool], is_late: bool, has_changed: bool) -> tuple[list[bool], bool]:
        """Check that all ranks sum the same -> which parameters have a gradient on any rank, and is_late on any.

        has_changed: the model trains others than when sums of this step started.

        Collective over world: one small sum, and another where ranks have gradients of different parameters.
        """
        hashes = [hash_bytes("\n".join(self.names).encode()), hash_bytes(bytes(present))]
        own = np.array([*hashes, *(-value for value in hashes), is_late, has_changed], np.int64)
        wait_all([self.world.Iallreduce(MPI.IN_PLACE, own, MPI.MAX)], poke=self.poke)
        if own[0] != -own[2]:
            self.error = describe_difference(gather_to_all(self.world, self.names))
        elif own[5]:
            self.error = TrainingError(
                "sum of gradients: other parameters are trained than at the beginning of this step"
            )
        raise_or_return(None, self.error)
        if own[1] != -own[3]:
            flags = np.array(present, np.uint8)
            wait_all([self.world.Iallreduce(MPI.IN_PLACE, flags, MPI.MAX)], poke=self.poke)
            present = flags.astype(bool).tolist()
        return present, bool(own[4])

    def check_values(self, dense: FlatGradients) -> None:
        """Raise TrainingError on all ranks where parameters that all hold do not start alike. Collective over world."""
        hashes = np.array(
            [hash_bytes(view_bytes(p.detach().cpu().reshape(-1)).data) for p in dense.parameters], np.int64
        )
        extremes = np.concatenate([hashes, -hashes])
        wait_all([self.world.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX)], poke=self.poke)
        greatest, least = np.split(extremes, 2)
        if len(differ := np.flatnonzero(greatest != -least)):
            first = int(differ[0])
            of_rank = gather_to_all(self.world, int(hashes[first]))
            other = next(rank for rank, value in enumerate(of_rank) if value != of_rank[0])
            what = f"{list(dense.parts)[first]} has other values on rank {other} than on rank 0"
            self.error = TrainingError(
                f"sum of gradients: {what}: what is not an expert must start alike on all ranks (by one "
                "torch.manual_seed or state_dict); sum only what all ranks hold"
            )
            raise_or_return(None, self.error)


def add_late(sums: GradientSums, late: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Sum gradients that came too late, and add them to the others. Collective over world."""
    before = [array.flat.clone() for array in sums.arrays]
    for array in sums.arrays:
        for parameter in array.parameters:
            parameter.grad = late.get(parameter)
    sums.begin(None)
    sums.finish()
    for array, first in zip(sums.arrays, before, strict=True):
        array.flat += first
        array.attach(array.parameters)


def list_parts(model: nn.Module, layers: Sequence[LayerOfExperts]) -> list[Part]:
    """List what a model trains, last module first: (name, dense parameter), each once, and layers of experts."""
    of_local = {id(layer.local): layer for layer in layers}
    seen = {id(p) for layer in layers for p in layer.local.parameters()}
    parts: list[Part] = []
    for prefix, module in model.named_modules():
        if id(module) in of_local:
            parts.append(of_local[id(module)])
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parts.append((name, parameter))
    return parts[::-1]


def list_marks(parts: Sequence[Part]) -> list[object]:
    """List the objects by which a change of the parts is seen."""
    return [
        mark
        for part in parts
        for mark in (
            part[1:]
            if isinstance(part, tuple)
            else (part.placement, *(p for p in part.local.parameters() if p.requires_grad))
        )
    ]


def describe_part(part: Part) -> str:
    """Format what all ranks must have alike."""
    if isinstance(part, tuple):
        name, parameter = part
        return f"{name} {list(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
    return f"the experts of layer {part.number}, placed as {part.placement.expert_of_replica[0].tolist()}"


def describe_difference(names: Sequence[Sequence[str]]) -> TrainingError:
    """Find the first parameter in which a rank differs from rank 0; names: all ranks', in the order of the sums."""
    for rank, own in enumerate(names):
        for first, other in zip_longest(names[0], own, fillvalue="none more"):
            if first != other:
                text = f"rank {rank} trains {other} where rank 0 trains {first}"
                return TrainingError(f"sum of gradients: {text}: all ranks must train the same parameters")
    raise ValueError("all ranks train the same")


def hash_bytes(data: bytes | memoryview) -> int:
    """Hash bytes -> a number below 2**56."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=_HASH_BYTES).digest(), "little")
