"""Ranks that hold the same parameters must hold the same bits: from time to time their hashes are compared."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.errors import TrainingError, raise_or_return
from hpcmoe.experts.logical import LogicalExperts
from hpcmoe.model.language import LanguageModel
from hpcmoe.run.flat_gradients import SharedExperts
from hpcmoe.run.move_experts import view_bytes
from hpcmoe.wait import gather_to_all, wait_all

NOT_HELD = np.iinfo(np.int64).min  # the digest of what a rank does not hold
_MOST_ERRORS = 8  # that a message lists


def check_shared_parameters(network: LanguageModel, shared: SharedExperts, mesh: Mesh, step: int) -> None:
    """Raise TrainingError on all ranks where ranks that should hold the same parameters do not. Collective over world.

    The message names each part and the ranks that differ from the majority.
    """
    compare_digests(mesh.world, hash_parts(network, shared, mesh), lambda: name_parts(network, mesh), step)


def check_shared_model(model: nn.Module, layers: Sequence[LogicalExperts], mesh: Mesh, step: int) -> None:
    """Check as check_shared_parameters the parameters of any model, layers of experts in it. Collective over world."""
    own = {id(parameter) for layer in layers for parameter in layer.local.parameters()}
    dense = {name: digest([p]) for name, p in model.named_parameters() if id(p) not in own}
    experts = {
        f"expert {expert} of layer {number} (shard {shard})": NOT_HELD
        for number, layer in enumerate(layers)
        for expert in range(layer.num_experts)
        for shard in range(mesh.tensor_parallel)
    }
    for number, layer in enumerate(layers):
        for expert, slot in layer.list_slots():
            place = f"expert {expert} of layer {number} (shard {mesh.tensor_index})"
            experts[place] = digest(layer.local.replicas[slot].parameters())
    digests = dense | experts
    compare_digests(mesh.world, np.array([*digests.values()]), lambda: [*digests], step)


def compare_digests(world: MPI.Comm, digests: np.ndarray, list_names: Callable[[], list[str]], step: int) -> None:
    """Raise TrainingError on all ranks where digests [n] of ranks differ, NOT_HELD aside. Collective over world."""
    # Reduce each part's least and greatest digest; the least is the complement of the greatest complement.
    held = np.where(digests == NOT_HELD, NOT_HELD, ~digests)
    extremes = np.concatenate([digests, held])
    wait_all([world.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX)])
    greatest, complement = np.split(extremes, 2)
    differ = np.flatnonzero((greatest != ~complement) & (greatest != NOT_HELD))
    if len(differ) == 0:
        return

    # Gather the digests of the parts that differ, and name the ranks.
    of_ranks = np.array(gather_to_all(world, digests[differ]))  # [ranks, parts]
    names = list_names()
    errors = [
        f"step {step}: copies of {names[part]} differ: {describe_ranks(of_ranks[:, number])}"
        for number, part in enumerate(differ[:_MOST_ERRORS].tolist())
    ]
    more = [f"step {step}: and {len(differ) - _MOST_ERRORS} others"] * (len(differ) > _MOST_ERRORS)
    raise_or_return(None, TrainingError("\n".join(errors + more)))


def hash_parts(network: LanguageModel, shared: SharedExperts, mesh: Mesh) -> np.ndarray:
    """Hash what this rank holds -> int64 [L + 2 + tensor_parallel * L * E], NOT_HELD for the rest.

    The dense parts in the order of their gradients; then, shard by shard, each layer's experts.
    """
    dense = [digest(parameters) for parameters in network.dense_parts().values()]
    num_experts = network.spec.model.num_experts
    experts = np.full((mesh.tensor_parallel, len(network.layers), num_experts), NOT_HELD)
    for held in shared.held_replicas():
        replica = network.layers[held.layer].experts.local.replicas[held.slot]
        experts[mesh.tensor_index, held.layer, held.expert] = digest(replica.parameters())
    return np.concatenate([dense, experts.ravel()])


def digest(parameters: Iterable[torch.Tensor]) -> int:
    """Hash the bits of parameters -> int64 above NOT_HELD + 1."""
    hashed = hashlib.blake2b(digest_size=8)
    for parameter in parameters:
        hashed.update(view_bytes(parameter.detach().cpu().reshape(-1)).data)
    return int.from_bytes(hashed.digest()[:7], "little")


def name_parts(network: LanguageModel, mesh: Mesh) -> list[str]:
    """Name the entries of hash_parts."""
    return list(network.dense_parts()) + [
        f"expert {expert} of layer {layer}" + f" (shard {shard} of {mesh.tensor_parallel})" * (mesh.tensor_parallel > 1)
        for shard in range(mesh.tensor_parallel)
        for layer in range(len(network.layers))
        for expert in range(network.spec.model.num_experts)
    ]


def describe_ranks(digests: np.ndarray) -> str:
    """Name the ranks that differ from the majority, and the majority; digests [ranks]."""
    values, counts = np.unique(digests[digests != NOT_HELD], return_counts=True)
    usual = values[np.argmax(counts)]
    odd = [rank for rank, value in enumerate(digests.tolist()) if value not in (NOT_HELD, usual)]
    return f"{list_ranks(odd)} not as {list_ranks(np.flatnonzero(digests == usual).tolist())}"


def list_ranks(ranks: list[int]) -> str:
    """Format rank numbers, the first few of many."""
    few = ", ".join(map(str, ranks[:_MOST_ERRORS]))
    more = f" and {len(ranks) - _MOST_ERRORS} more" * (len(ranks) > _MOST_ERRORS)
    return f"rank{'s' * (len(ranks) > 1)} {few}{more}"
