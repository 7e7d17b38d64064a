"""Placements as files: expert_of_slot as hpcmoe.place writes it, and the maps of other engines (see `formats`).

EPLB (github.com/deepseek-ai/EPLB) numbers the slots of a layer rank by rank, as here: its map is [layers][slots of all
ranks]. It has no empty slots; here they are -1.
"""

import os
import pathlib

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import format_size, one_line
from hpcmoe.placement.files.formats import check_range, read_slots
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import describe_unevenness
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.reading import format_json


def read_map(path: str | os.PathLike, problem: PlacementProblem) -> tuple[np.ndarray, list[str]]:
    """Read the experts of a problem's slots from a file, JSON or NumPy's .npy -> ([L, S] int64, notes).

    Fewer slots a rank than the problem has leave the others empty; more are accepted where they are empty themselves.
    Raises ConfigError in one line.
    """
    name, experts, notes = read_slots(path, problem)
    layouts, more = check_map(path, name, experts, problem)
    return layouts, notes + more


def check_map(
    path: str | os.PathLike, key: str, numbers: np.ndarray, problem: PlacementProblem
) -> tuple[np.ndarray, list[str]]:
    """Check experts of slots [L, S] or [L, P, s] against a problem's limits -> ([L, S], notes). Raises ConfigError."""
    # Compare the sizes.
    where, layers, ranks = f"{one_line(path)}: {key}", problem.num_layers, problem.num_ranks
    if len(numbers) != layers:
        raise ConfigError(f"{where} has {len(numbers)} layers, layers = {layers}")
    if numbers[0].size % ranks:
        raise ConfigError(f"{where}[0] has {numbers[0].size} slots: must be a multiple of the {ranks} ranks")
    check_range(where, numbers, problem.num_experts)

    # Leave out an expert's second replicas on a rank: they are of no use there, and EPLB's maps may have them.
    experts = numbers.reshape(layers, ranks, -1).copy()
    twice = np.zeros(experts.shape, bool)
    for slot in range(1, experts.shape[2]):
        twice[..., slot] = (experts[..., :slot] == experts[..., slot, None]).any(axis=2) & (experts[..., slot] != EMPTY)
    experts[twice] = EMPTY

    # Compare with the slots and the memory.
    experts = fit_slots(where, experts, problem.slots_per_rank)
    check_layouts(where, experts, problem)
    notes = [f"{twice.sum()} replicas are left out, second ones on their rank"] if twice.any() else []
    if uneven := describe_unevenness(problem, experts.reshape(layers, -1)):
        notes.append(uneven)
    return experts.reshape(layers, -1), notes


def fit_slots(where: str, experts: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """Add or drop empty slots of each rank: [L, P, s] -> [L, P, slots_per_rank]. Raises ConfigError."""
    num_held = (experts != EMPTY).sum(axis=2)
    # Check that what is held fits.
    if num_held.max() > slots_per_rank:
        layer, rank = np.argwhere(num_held > slots_per_rank)[0]
        raise ConfigError(
            f"{where} has {num_held[layer, rank]} experts on rank {rank} of layer {layer}: must be at most "
            f"{slots_per_rank}; [placement] spare_slots_per_rank, slots_per_gpu of a case"
        )

    # Move the empty slots to the end, and drop or add some.
    if experts.shape[2] > slots_per_rank:
        order = np.argsort(experts == EMPTY, axis=2, kind="stable")
        experts = np.take_along_axis(experts, order, axis=2)[..., :slots_per_rank]
    missing = slots_per_rank - experts.shape[2]
    return np.pad(experts, ((0, 0), (0, 0), (0, missing)), constant_values=EMPTY)


def check_layouts(where: str, experts: np.ndarray, problem: PlacementProblem) -> None:
    """Raise ConfigError unless layouts [L, P, s] have every expert, once unless replicate, and fit the memory."""
    # Count each layer's replicas.
    for layer, row in enumerate(experts):
        replicas = np.bincount(row[row != EMPTY], minlength=problem.num_experts)
        if not replicas.all():
            raise ConfigError(f"{where}[{layer}] has no expert {int(np.argmin(replicas))}")
        if replicas.max() > 1 and not problem.replicate:
            raise ConfigError(
                f"{where}[{layer}] has expert {int(np.argmax(replicas))} {replicas.max()} times, but replicate = false"
            )

    # Count the replicas on each node, of all layers.
    used = np.bincount(problem.node_of_rank, (experts != EMPTY).sum(axis=(0, 2)), problem.num_nodes).astype(np.int64)
    if (used > problem.memory_replicas).any():
        node = int(np.argmax(used - problem.memory_replicas))
        raise ConfigError(
            f"{where}: {used[node]} replicas on node {problem.name_node(node)} x {format_size(problem.expert_bytes)} "
            f"are more than its {format_size(int(problem.memory_bytes[node]))} hold"
        )


def write_map(path: str | os.PathLike, expert_of_replica: np.ndarray, suffix: str) -> None:
    """Write layouts [L, S] as EPLB's map: .npy, or .json with its inverses logical_to_physical and logical_count."""
    if suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, expert_of_replica)
        return
    count = [np.bincount(row[row != EMPTY]).tolist() for row in expert_of_replica]
    tree = {
        "physical_to_logical": expert_of_replica.tolist(),
        "logical_to_physical": [
            [np.flatnonzero(row == expert).tolist() for expert in range(len(of_layer))]
            for row, of_layer in zip(expert_of_replica, count, strict=True)
        ],
        "logical_count": count,
    }
    pathlib.Path(path).write_text(format_json(tree), encoding="utf-8")
