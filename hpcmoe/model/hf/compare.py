"""A model whose experts are spread over ranks against transformers' own on one process: logits, loss, gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.experts.family_shards import cut_shard
from hpcmoe.model.hf.names import list_spread_layers, name_original
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
    weights = {
        name_original(path, layer.template[0], weight): (layer, weight)
        for path, layer in list_spread_layers(model).items()
        for weight in (*layer.template[0]._parameters, *layer.template[0]._buffers)
    }
    for name in broadcast(world, None if whole is None else [name for name, _ in whole.named_parameters()]):
        wanted = None if whole is None else whole.get_parameter(name).grad
        if name not in weights:
            wanted = broadcast(world, wanted)
            yield find_difference(name, own[name].grad, wanted)
            continue
        layer, weight = weights[name]
        for expert in range(layer.num_experts):
            one = broadcast(world, None if wanted is None else cut_one(layer, wanted, expert))
            for slot in [slot for other, slot in layer.list_slots() if other == expert]:
                parameter = layer.local.replicas[slot]._parameters.get(weight)
                if parameter is not None:  # a bias is on one shard alone
                    place = mesh.tensor_index, mesh.tensor_parallel
                    shard = None if one is None else cut_shard(layer.template[0], weight, one, *place)
                    yield find_difference(name, parameter.grad, shard)


def cut_one(layer: FamilyExperts, grad: Tensor, expert: int) -> Tensor:
    """Copy one expert's part [1, ...] of the gradient of a family's own parameter of all."""
    if getattr(layer.template[0], "stacks_rows", False):
        return grad.unflatten(0, (layer.num_experts, -1))[expert : expert + 1].clone()
    return grad[expert : expert + 1].clone()


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
