"""A model whose experts are spread over ranks against transformers' own on one process: logits, loss, gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.wait import broadcast, gather_to_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one tensor is from transformers' own."""

    name: str
    largest: float  # difference of any number of it
    scale: float  # the largest number of transformers' own

    @property
    def ratio(self) -> float:
        """Return the difference relative to the tensor's largest number."""
        return self.largest / self.scale if self.scale > 0 else self.largest


class SummingGroup(Protocol):
    """What a comparison needs of a group."""

    mesh: Mesh

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum the gradients over the ranks."""


def compare_step(model: Any, open_whole: Callable[[], Any], group: SummingGroup, ids: list[Tensor]) -> list[Difference]:
    """Compare a step of a spread model with that of the whole model, which rank 0 opens and runs alone.

    ids [n, S] of each rank, the same list on all. The gradients of both stay in the models. Collective over the group.
    """
    world, rank = group.mesh.world, group.mesh.world.rank
    num_targets = sum(len(of_rank) * (of_rank.shape[1] - 1) for of_rank in ids)
    logits, loss = run_step(model, ids[rank], num_targets)
    group.sum_gradients(model)
    losses = gather_to_all(world, loss)

    # Run the whole batch on rank 0, and send its results around, a part at a time.
    whole = open_whole() if rank == 0 else None
    wanted = run_step(whole, torch.cat(ids), num_targets) if rank == 0 else None
    parts = wanted[0].split([len(of_rank) for of_rank in ids]) if wanted is not None else [None] * len(ids)
    found = []
    for of_rank, part in enumerate(parts):
        part = broadcast(world, None if part is None else part.clone())  # a view would bring all the others
        found.append(find_difference("logits", logits if of_rank == rank else part, part))
    of_whole = broadcast(world, None if wanted is None else wanted[1])
    found.append(Difference(name="loss", largest=abs(sum(losses) - of_whole), scale=abs(of_whole)))
    found += compare_gradients(model, whole, group.mesh)
    return merge_ranks(gather_to_all(world, found))


def run_step(model: Any, ids: Tensor, num_targets: int) -> tuple[Tensor, float]:
    """Run a model forward and backward -> its logits [n, S, V] and its part of the loss, a mean of num_targets."""
    output = model(input_ids=ids, labels=ids, num_items_in_batch=num_targets, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), float(output.loss.detach())


def compare_gradients(model: nn.Module, whole: nn.Module | None, mesh: Mesh) -> Iterator[Difference]:
    """Compare each gradient of a spread model with that of the whole, which rank 0 has. Collective over mesh.world."""
    world, own = mesh.world, dict(model.named_parameters())
    layers = {path.removesuffix(".hpcmoe"): m for path, m in model.named_modules() if isinstance(m, FamilyExperts)}
    for name in broadcast(world, None if whole is None else [name for name, _ in whole.named_parameters()]):
        wanted = None if whole is None else whole.get_parameter(name).grad
        path, _, parameter = name.rpartition(".")
        if path not in layers:
            wanted = broadcast(world, wanted)
            yield find_difference(name, own[name].grad, wanted)
            continue
        held = list(layers[path].list_slots())
        for expert in range(layers[path].num_experts):
            one = broadcast(world, None if wanted is None else wanted[expert].clone())
            for slot in [slot for other, slot in held if other == expert]:
                grad = layers[path].local.replicas[slot].get_parameter(parameter).grad
                yield find_difference(name, None if grad is None else grad[0], one)


def find_difference(name: str, found: Tensor | None, wanted: Tensor | None) -> Difference:
    """Compute how far a tensor is from what is wanted; None, for no gradient, is as zeros."""
    if wanted is None or found is None:
        other = found if wanted is None else wanted
        largest = 0.0 if other is None else float(other.abs().max())
        return Difference(name=name, largest=largest, scale=largest)
    if wanted.numel() == 0:
        return Difference(name=name, largest=0.0, scale=0.0)
    largest = float((found.detach().float().cpu() - wanted.float()).abs().max())
    return Difference(name=name, largest=largest, scale=float(wanted.abs().max()))


def merge_ranks(found: list[list[Difference]]) -> list[Difference]:
    """Keep the largest of each tensor: [ranks][tensors or parts] -> one a tensor, in the order of their first."""
    merged: dict[str, Difference] = {}
    for difference in (each for of_rank in found for each in of_rank):
        before = merged.get(difference.name, difference)
        merged[difference.name] = Difference(
            name=difference.name,
            largest=max(before.largest, difference.largest),
            scale=max(before.scale, difference.scale),
        )
    return list(merged.values())
