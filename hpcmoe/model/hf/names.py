"""Which tensors the checkpoint of a model has, and which of the model's own make each: transformers' table, reversed.

It is applied to parts of a model that convert by themselves: one expert of a layer, or what is dense in a layer. So no
rank needs the whole. Applied to tensors without memory it gives names, shapes and dtypes beforehand.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcmoe.errors import CheckpointError
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.experts.family_shards import join_shards

_LAYER = re.compile(r"(.*?\.\d+)\.")  # what the names of a layer begin with
Tensors = Mapping[str, Tensor]  # by name


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor belongs in a checkpoint."""

    name: str
    first_row: int = 0  # of the tensor of that name: all experts may be in one


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    """Tensors of a model that are converted at once: some dense ones, or an expert of a layer."""

    places: dict[str, TensorPlace]  # by the names that the conversion gives
    dense: tuple[str, ...] = ()
    layer: str = ""  # the path of its fused experts
    expert: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """What a checkpoint holds, and what each of it is made of."""

    tensors: dict[str, Tensor]  # on meta, in the order of the files
    parts: list[CheckpointPart]


def list_spread_layers(model: nn.Module) -> dict[str, FamilyExperts]:
    """List the layers whose experts are spread, by the paths of their fused experts."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FamilyExperts)}
    return {path.rpartition(".")[0]: layer for path, layer in layers.items()}


def list_dense(model: Any, layers: Mapping[str, FamilyExperts]) -> dict[str, Tensor]:
    """List what a model's state has besides spread experts; tied weights once. Raises CheckpointError."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    of_experts = tuple(f"{path}.{name}." for path, layer in layers.items() for name in find_child(model, path, layer))
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(of_experts) and k not in ignored}
    try:
        return dict(remove_tied_weights_from_state_dict(state, model))
    except RuntimeError as error:
        raise CheckpointError(f"{type(model).__name__}: {str(error).splitlines()[0]}") from None


def find_child(model: nn.Module, path: str, layer: FamilyExperts) -> list[str]:
    """Find the name of a layer within the fused module at a path."""
    return [name for name, child in model.get_submodule(path).named_children() if child is layer]


def convert(model: Any, tensors: Tensors) -> dict[str, Tensor]:
    """Convert some of a model's tensors to those of its checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def restore_expert(layer: FamilyExperts, path: str, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join an expert's tensor-parallel shards, each {name: [1, ...]} -> tensors as the family's model has them."""
    fused: Any = layer.template[0]
    restored = {}
    for name in shards[0]:
        whole = join_shards(fused, name, [shard[name] for shard in shards if name in shard])
        is_stacked = getattr(fused, "stacks_rows", False)
        restored[name_original(path, fused, name)] = whole.flatten(0, 1) if is_stacked else whole
    return restored


def name_original(path: str, fused: Any, name: str) -> str:
    """Return the family's own name of a parameter of the fused module at a path."""
    original = getattr(fused, "original", {}).get(name, name)
    owner = path.rpartition(".")[0] if original.startswith("../") else path
    return f"{owner}.{original.removeprefix('../')}"


def plan_checkpoint(
    model: Any, dense: Tensors, layers: Mapping[str, FamilyExperts], first_experts: Mapping[str, dict[str, Tensor]]
) -> CheckpointPlan:
    """Plan a checkpoint; first_experts: of each layer what restore_expert gives of one, on meta.

    Raises CheckpointError where the parts do not make what transformers makes of the whole.
    """
    from transformers.core_model_loading import dot_natural_key

    # Convert the whole, without memory.
    whole = {name: tensor.to("meta") for name, tensor in dense.items()}
    for path, layer in layers.items():
        for name, one in first_experts[path].items():
            whole[name] = one.new_empty((layer.num_experts * len(one), *one.shape[1:]))
    made = convert(model, whole)

    # Find the parts, and their places in it.
    parts = [*list_dense_parts(model, {name: whole[name] for name in dense})]
    for path, layer in layers.items():
        parts += list_expert_parts(model, path, layer.num_experts, first_experts[path], made)
    check_parts(model, parts, made, first_experts, whole)
    tensors = {name: torch.empty_like(made[name]) for name in sorted(made, key=dot_natural_key)}  # none a view
    return CheckpointPlan(tensors=tensors, parts=parts)


def list_dense_parts(model: Any, dense: Tensors) -> Iterator[CheckpointPart]:
    """List the dense parts: the tensors of each layer, and those outside of layers."""
    names_of_layer: dict[str, list[str]] = {}
    for name in dense:
        match = _LAYER.match(name)
        names_of_layer.setdefault(match[1] if match else "", []).append(name)
    for names in names_of_layer.values():
        made = convert(model, {name: dense[name] for name in names})
        yield CheckpointPart(places={name: TensorPlace(name) for name in made}, dense=tuple(names))


def list_expert_parts(
    model: Any, path: str, num_experts: int, first: Tensors, made: Tensors
) -> Iterator[CheckpointPart]:
    """List the experts of a layer; first: the tensors of one; made: what the checkpoint has."""
    converted = convert(model, first)
    for expert in range(num_experts):
        places = {name: place_expert(name, tensor, expert, num_experts, made) for name, tensor in converted.items()}
        yield CheckpointPart(places=places, layer=path, expert=expert)


def place_expert(name: str, one: Tensor, expert: int, num_experts: int, made: Tensors) -> TensorPlace:
    """Find where a tensor of an expert belongs, which as the only expert of its layer would have this name."""
    fused = made.get(name)
    if fused is not None and one.dim() > 0 and fused.shape == (num_experts * len(one), *one.shape[1:]):
        return TensorPlace(name, expert * len(one))
    head, _, tail = name.rpartition(".0.")
    return TensorPlace(f"{head}.{expert}.{tail}")


def check_parts(
    model: Any, parts: list[CheckpointPart], made: Tensors, first_experts: Mapping[str, Tensors], whole: Tensors
) -> None:
    """Check that parts, converted one by one, are what transformers makes of the whole. Raises CheckpointError."""
    sizes_of_layer = {path: count_numbers(convert(model, first)) for path, first in first_experts.items()}
    found = dict.fromkeys(made, 0)
    for part in parts:
        dense = {name: whole[name] for name in part.dense}
        sizes = sizes_of_layer[part.layer] if part.layer else count_numbers(convert(model, dense))
        for name, place in part.places.items():
            found[place.name] = found.get(place.name, 0) + sizes[name]
    wanted = count_numbers(made)
    wrong = [name for name in found if found[name] != wanted.get(name)]
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__}: {wrong[0]}: transformers converts it only together with others, not expert by "
            "expert and layer by layer"
        )


def count_numbers(tensors: Tensors) -> dict[str, int]:
    """Count the numbers of each tensor."""
    return {name: tensor.numel() for name, tensor in tensors.items()}


def describe_shards(layer: FamilyExperts, slot: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Describe the expert in a slot of this rank, or its shard -> {name: (shape, dtype)}."""
    replica = layer.local.replicas[slot]
    return {name: (tuple(p.shape), p.dtype) for name, p in replica.named_parameters(recurse=False)}
