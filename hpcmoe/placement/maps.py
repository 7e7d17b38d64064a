"""Placements as files: expert_of_slot as hpcmoe.place writes it, and physical_to_logical as DeepSeek's EPLB has it.

EPLB (github.com/deepseek-ai/EPLB) numbers the slots of a layer rank by rank, as we do: its map is [layers][slots of all
ranks]. It has no empty slots; here they are -1.
"""

import json
import pathlib

import numpy as np

from hpcmoe.config import read_text
from hpcmoe.errors import ConfigError
from hpcmoe.placement.problem import in_units
from hpcmoe.placement.quotas import describe_unevenness
from hpcmoe.placement.terms import HOLE

KEYS = {"expert_of_slot": 3, "physical_to_logical": 2}  # of a JSON object, and their dimensions


def read_map(path, problem):
    """Read where a file has the experts of a problem -> ([L, S] int64, notes).

    A JSON object with one of KEYS, or a JSON list or NumPy file (.npy) of either shape. Fewer slots a rank than the
    problem has leave the others empty. Raises ConfigError in one line.
    """
    key, numbers = read_numbers(path)
    return check_map(path, key, numbers, problem)


def read_numbers(path):
    """Read a file's whole numbers -> (their key, int64 [L, S] or [L, P, s])."""
    if pathlib.Path(path).suffix == ".npy":
        try:
            with open(path, "rb") as file:
                numbers, key = np.lib.format.read_array(file, allow_pickle=False), "the array"
        except (OSError, ValueError, EOFError, MemoryError) as fault:
            raise ConfigError(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None
    else:
        try:
            tree = json.loads(read_text(path))
        except (ValueError, RecursionError) as fault:
            raise ConfigError(f"{path}: not JSON: {fault}") from None
        key = next((key for key in KEYS if isinstance(tree, dict) and key in tree), "the list")
        rows = tree.get(key) if isinstance(tree, dict) else tree
        try:
            numbers = np.array(rows)
        except ValueError:  # rows of different lengths
            numbers = np.array(None)
    dimensions = [KEYS[key]] if key in KEYS else [2, 3]
    if numbers.ndim not in dimensions or numbers.dtype.kind not in "iu" or 0 in numbers.shape:
        wanted = "[layers][ranks][slots]" if dimensions == [3] else "[layers][slots of all ranks]"
        keys = " or ".join(KEYS)
        raise ConfigError(f"{path}: {key} must be whole numbers {wanted}, of equal rows; an object needs {keys}")
    return key, numbers.astype(np.int64)


def check_map(path, key, numbers, problem):
    """Check numbers [L, S] or [L, P, s] against a problem's limits -> ([L, S], notes); ConfigError in one line."""
    where, layers, ranks = f"{path}: {key}", problem.num_layers, problem.num_ranks
    if len(numbers) != layers:
        raise ConfigError(f"{where} has {len(numbers)} layers, layers = {layers}")
    if numbers.ndim == 3 and numbers.shape[1] != ranks:
        raise ConfigError(f"{where}[0] has {numbers.shape[1]} ranks, experts are spread over {ranks}")
    slots = numbers[0].size
    if slots % ranks or slots // ranks > problem.slots_per_rank:
        raise ConfigError(
            f"{where}[0] has {slots} slots: must be a multiple of the {ranks} ranks, at most {problem.slots_per_rank} "
            "on each; [cluster] spare_slots_per_rank"
        )
    wrong = np.argwhere((numbers < HOLE) | (numbers >= problem.num_experts))
    if len(wrong):
        index = "".join(f"[{i}]" for i in wrong[0])
        raise ConfigError(f"{where}{index} = {numbers[tuple(wrong[0])]}: must be -1 to {problem.num_experts - 1}")

    # What is there twice on one rank is of no use there, and EPLB may have it so.
    experts = numbers.reshape(layers, ranks, -1).copy()
    twice = np.zeros(experts.shape, bool)
    for slot in range(1, experts.shape[2]):
        twice[..., slot] = (experts[..., :slot] == experts[..., slot, None]).any(axis=2) & (experts[..., slot] != HOLE)
    experts[twice] = HOLE
    check_copies(where, experts, problem)
    missing = problem.slots_per_rank - experts.shape[2]
    padded = np.pad(experts, ((0, 0), (0, 0), (0, missing)), constant_values=HOLE)
    notes = [f"{twice.sum()} copies are left out, second ones on their rank"] if twice.any() else []
    if uneven := describe_unevenness(problem, padded.reshape(layers, -1)):
        notes.append(uneven)
    return padded.reshape(layers, -1), notes


def check_copies(where, experts, problem):
    """Raise ConfigError unless layouts [L, P, s] have every expert, once unless replicate, and fit the memory."""
    for layer, row in enumerate(experts):
        copies = np.bincount(row[row != HOLE], minlength=problem.num_experts)
        if not copies.all():
            raise ConfigError(f"{where}[{layer}] has no expert {int(np.argmin(copies))}")
        if copies.max() > 1 and not problem.replicate:
            raise ConfigError(
                f"{where}[{layer}] has expert {int(np.argmax(copies))} {copies.max()} times, but replicate = false"
            )
    used = np.bincount(problem.node_of_rank, (experts != HOLE).sum(axis=(0, 2)), problem.num_nodes).astype(np.int64)
    if (used > problem.memory_copies).any():
        node = int(np.argmax(used - problem.memory_copies))
        name = problem.node_names[node] if problem.node_names else node
        raise ConfigError(
            f"{where}: {used[node]} copies on node {name} x {in_units(problem.expert_bytes)} are more than its "
            f"{in_units(int(problem.memory_bytes[node]))} hold"
        )


def write_map(path, expert_of_replica, suffix):
    """Write layouts [L, S] as EPLB's map: .npy, or .json with its inverses logical_to_physical and logical_count."""
    if suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, expert_of_replica)
        return
    count = [np.bincount(row[row != HOLE]).tolist() for row in expert_of_replica]
    tree = {
        "physical_to_logical": expert_of_replica.tolist(),
        "logical_to_physical": [
            [np.flatnonzero(row == expert).tolist() for expert in range(len(of_layer))]
            for row, of_layer in zip(expert_of_replica, count, strict=True)
        ],
        "logical_count": count,
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items())
    pathlib.Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
