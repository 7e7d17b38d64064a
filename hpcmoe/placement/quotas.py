"""The experts of a layer that ranks and nodes may and must hold: single replicas evenly, where memory allows it."""

import dataclasses

import numpy as np

from hpcmoe.placement.problem import PlacementProblem


def divide_memory(problem: PlacementProblem) -> np.ndarray:
    """Divide each node's memory evenly over the layers, remainders staggered -> most_of_node [L, nodes] int64.

    Every layer's sum is enough for all experts wherever the memory of all layers is.
    """
    layers, first = problem.num_layers, 0
    base, rest = np.divmod(np.minimum(usable_of_node(problem) * layers, problem.memory_replicas), layers)
    most = np.tile(base, (layers, 1))
    for node, number in enumerate(rest):
        most[(first + np.arange(number)) % layers, node] += 1
        first += number
    return most


def usable_of_node(problem: PlacementProblem) -> np.ndarray:
    """Count the slots of a layer that each node's ranks may fill -> [nodes] int64."""
    return problem.ranks_of_node * most_of_rank(problem)


def has_ample_memory(problem: PlacementProblem) -> bool:
    """Return True if the memory holds the experts of all slots that may be filled: layers do not compete for it."""
    return bool((problem.memory_replicas >= usable_of_node(problem) * problem.num_layers).all())


def requires_even_ranks(problem: PlacementProblem) -> bool:
    """Return True if the numbers of experts on two ranks may differ by one at most, as for single replicas."""
    return problem.even and not problem.replicate


def most_of_rank(problem: PlacementProblem) -> int:
    """Return the most experts of a layer that a rank may hold: as few as all experts have a place with.

    That is ceil(E / P) unless nodes lack the memory for it, whose experts the others then hold.
    """
    slots, ranks, layers = problem.slots_per_rank, problem.ranks_of_node, problem.num_layers
    if not requires_even_ranks(problem):
        return slots
    for level in range(-(-problem.num_experts // problem.num_ranks), slots):
        if np.minimum(level * ranks * layers, problem.memory_replicas).sum() >= problem.num_experts * layers:
            return level
    return slots


def fewest_of_node(problem: PlacementProblem) -> np.ndarray:
    """Return the fewest experts of a layer that each rank of a node must hold: most_of_rank - 1 -> [nodes] int64.

    On a node whose memory does not hold that many in every layer: as many as it holds.
    """
    if not requires_even_ranks(problem):
        return np.zeros(problem.num_nodes, np.int64)
    holds = problem.memory_replicas // problem.num_layers // np.maximum(problem.ranks_of_node, 1)
    return np.minimum(most_of_rank(problem) - 1, holds)


Limits = tuple[np.ndarray, np.ndarray, np.ndarray]  # fewest and most experts of a rank [P], most of a node [nodes]


def make_limits(problem: PlacementProblem, most_of_node: np.ndarray) -> Limits:
    """Return the fewest and most experts of a layer on each rank, and the most on each node: [P], [P], [nodes]."""
    most = most_of_rank(problem)
    fewest = fewest_of_node(problem)[problem.node_of_rank]
    return fewest, np.full(problem.num_ranks, most), np.minimum(most * problem.ranks_of_node, most_of_node)


def widen_limits(problem: PlacementProblem, most_of_node: np.ndarray, layout: np.ndarray) -> Limits:
    """Return make_limits', widened until a layout [S] that is there already keeps them, but for memory.

    No rank need leave it, nor stray further.
    """
    fewest, most, of_node = make_limits(problem, most_of_node)
    count = count_of_rank(problem, layout[None])[0]
    used = np.bincount(problem.node_of_rank, count, problem.num_nodes).astype(np.int64)
    return np.minimum(fewest, count), np.maximum(most, count), np.minimum(np.maximum(of_node, used), most_of_node)


def max_replicas_of_node(problem: PlacementProblem) -> np.ndarray:
    """Count the replicas of a layer that fit each node beside those that other nodes must hold -> [nodes] int64."""
    most = np.minimum(usable_of_node(problem), problem.memory_replicas)
    if problem.replicate:
        return most
    must = fewest_of_node(problem) * problem.ranks_of_node
    return np.minimum(most, problem.num_experts - (must.sum() - must))


def count_of_rank(problem: PlacementProblem, layouts: np.ndarray) -> np.ndarray:
    """Count the experts on each rank of layouts [L, S] -> [L, P] int64."""
    return (layouts.reshape(len(layouts), problem.num_ranks, -1) >= 0).sum(axis=2)


def has_even_ranks(problem: PlacementProblem, layouts: np.ndarray) -> bool:
    """Return True if layouts [L, S] are as even as the problem asks for."""
    count = count_of_rank(problem, layouts)
    fewest = fewest_of_node(problem)[problem.node_of_rank]
    return bool((count >= fewest).all() and (count <= most_of_rank(problem)).all())


def relax_evenness(problem: PlacementProblem, layouts: np.ndarray) -> PlacementProblem:
    """Return the problem that layouts [L, S] answer: this one, or one whose ranks need not be even."""
    return problem if has_even_ranks(problem, layouts) else dataclasses.replace(problem, even=False)


def describe_unevenness(problem: PlacementProblem, layouts: np.ndarray) -> str:
    """Format how far layouts [L, S] of single replicas are from floor and ceil of E / P a rank, "" if they are not.

    The text names the node whose memory is the reason, if one is.
    """
    count, floor = count_of_rank(problem, layouts), problem.num_experts // problem.num_ranks
    ceil = -(-problem.num_experts // problem.num_ranks)
    if problem.replicate or (floor <= count.min() and count.max() <= ceil):
        return ""

    # Compare with floor and ceil.
    text = (
        f"ranks hold {count.min()} to {count.max()} experts of a layer; E / ranks = {problem.num_experts} / "
        f"{problem.num_ranks} would be {floor}" + f" to {ceil}" * (ceil > floor)
    )

    # Name the node that holds the smallest part of what its ranks would.
    wanted, holds = ceil * problem.ranks_of_node * problem.num_layers, problem.memory_replicas
    if has_even_ranks(problem, layouts) and (holds < wanted).any():
        node = int(np.argmin(holds / np.maximum(wanted, 1) + (wanted == 0)))
        text += (
            f": node {problem.name_node(node)} has memory for {holds[node]} experts, of {wanted[node]} ({ceil} x "
            f"{problem.ranks_of_node[node]} ranks x {problem.num_layers} layers)"
        )
    return text
