"""Ranks that hold the same parameters must hold the same bits: now and then their hashes are compared."""

import hashlib

import numpy as np
from mpi4py import MPI

from hpcmoe.errors import TrainingError, raise_or_return
from hpcmoe.wait import gather_to_all, wait_all

NOT_HELD = np.iinfo(np.int64).min  # of what a rank does not hold
MOST_ERRORS = 8  # of which the error tells


def check_replicas(network, shared, mesh, step):
    """Raise TrainingError, on all ranks alike, when ranks that should hold the same parameters do not.

    It names what differs, the layer, and the ranks: those that hold what most hold, and the others. Collective over
    all ranks.
    """
    digests = hash_parts(network, shared, mesh)
    held = np.where(digests == NOT_HELD, NOT_HELD, ~digests)
    extremes = np.concatenate([digests, held])  # the least is what is left of the greatest complement
    wait_all([mesh.world.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX)])
    greatest, complement = np.split(extremes, 2)
    differ = np.flatnonzero(greatest != ~complement)
    differ = differ[greatest[differ] != NOT_HELD]
    if len(differ) == 0:
        return
    of_ranks = np.array(gather_to_all(mesh.world, digests[differ]))  # [ranks, parts]
    names = name_parts(network, mesh)
    errors = [
        f"step {step}: copies of {names[part]} differ: {describe_ranks(of_ranks[:, number])}"
        for number, part in enumerate(differ[:MOST_ERRORS].tolist())
    ]
    more = [f"step {step}: and {len(differ) - MOST_ERRORS} others"] * (len(differ) > MOST_ERRORS)
    raise_or_return(None, TrainingError("\n".join(errors + more)))


def hash_parts(network, shared, mesh):
    """Hash what this rank holds -> int64 [L + 2 + tensor_parallel * L * E], NOT_HELD where it holds none.

    Dense parts of each layer, what is before and what is behind them; then shard by shard each layer's experts.
    """
    dense = [digest(parameters) for parameters in network.dense_parts().values()]
    num_experts = network.spec.model.num_experts
    experts = np.full((mesh.tensor_parallel, len(network.layers), num_experts), NOT_HELD)
    for copy in shared.held_replicas():
        replica = network.layers[copy.layer].experts.replicas[copy.slot]
        experts[mesh.tensor_index, copy.layer, copy.expert] = digest(replica.parameters())
    return np.concatenate([dense, experts.ravel()])


def digest(parameters):
    """Hash the bits of some parameters -> int64 above NOT_HELD + 1."""
    hashed = hashlib.blake2b(digest_size=8)
    for parameter in parameters:
        hashed.update(parameter.detach().cpu().contiguous().numpy())
    return int.from_bytes(hashed.digest()[:7], "little")


def name_parts(network, mesh):
    """Name the entries of hash_parts -> list."""
    names = {"head": "the head", "embed_backward": "the embedding"}
    dense = [names.get(stage, f"the dense parts of layer {layer}") for stage, layer in network.dense_parts()]
    shards = [f" (shard {shard} of {mesh.tensor_parallel})" * (mesh.tensor_parallel > 1)
              for shard in range(mesh.tensor_parallel)]  # fmt: skip
    numbers = range(network.spec.model.num_experts)
    return dense + [
        f"expert {expert} of layer {layer}{shard}"
        for shard in shards for layer in range(len(network.layers)) for expert in numbers
    ]  # fmt: skip


def describe_ranks(digests):
    """Tell which ranks hold what others do not, digests [ranks] -> text."""
    values, counts = np.unique(digests[digests != NOT_HELD], return_counts=True)
    usual = values[np.argmax(counts)]
    odd = [rank for rank, value in enumerate(digests.tolist()) if value not in (NOT_HELD, usual)]
    rest = np.flatnonzero(digests == usual).tolist()
    return f"{list_ranks(odd)} not as {list_ranks(rest)}"


def list_ranks(ranks):
    """Name ranks, some of many."""
    few = ", ".join(map(str, ranks[:MOST_ERRORS]))
    return f"rank{'s' * (len(ranks) > 1)} {few}" + f" and {len(ranks) - MOST_ERRORS} more" * (len(ranks) > MOST_ERRORS)
