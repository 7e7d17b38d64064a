"""Placements as files: expert_of_slot as hpcmoe.place writes it, and physical_to_logical as DeepSeek's EPLB has it.

EPLB (github.com/deepseek-ai/EPLB) numbers the slots of a layer rank by rank, as we do: its map is [layers][slots of all
ranks]. It has no empty slots; here they are -1.
"""

import json
import pathlib

import numpy as np

from hpcmoe.config import read_text
from hpcmoe.errors import ConfigError
from hpcmoe.placement.terms import HOLE

KEYS = {"expert_of_slot": 3, "physical_to_logical": 2}  # of a JSON object, and their dimensions


def read_map(path, problem):
    """Read where a file has the experts of a problem -> ([L, S] int64, notes).

    A JSON object with one of KEYS, a JSON list or a NumPy file (.npy) of [layers][slots of all ranks]. Fewer slots a
    rank than the problem has leave the others empty. Raises ConfigError in one line.
    """
    key, numbers = read_numbers(path)
    layers, ranks, slots = problem.num_layers, problem.num_ranks, problem.slots_per_rank
    if len(numbers) != layers:
        raise ConfigError(f"{path}: {key} has {len(numbers)} layers, layers = {layers}")
    if numbers.ndim == 3 and numbers.shape[1] != ranks:
        raise ConfigError(f"{path}: {key}[0] has {numbers.shape[1]} ranks, experts are spread over {ranks}")
    numbers = numbers.reshape(layers, -1)
    if numbers.shape[1] % ranks:
        raise ConfigError(f"{path}: {key}[0] has {numbers.shape[1]} slots, must be a multiple of the {ranks} ranks")
    has = numbers.shape[1] // ranks
    if has > slots:
        raise ConfigError(
            f"{path}: {key} has {numbers.shape[1]} slots / {ranks} ranks = {has} a rank, more than {slots}; "
            "[cluster] spare_slots_per_rank"
        )
    padded = np.pad(numbers.reshape(layers, ranks, has), ((0, 0), (0, 0), (0, slots - has)), constant_values=HOLE)
    return check_map(path, key, padded, problem)


def read_numbers(path):
    """Read a file's whole numbers -> (their key, int64 [L, S] or [L, P, s])."""
    if pathlib.Path(path).suffix == ".npy":
        try:
            numbers, key = np.load(path, allow_pickle=False), "the array"
        except (OSError, ValueError, EOFError) as fault:
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


def check_map(path, key, experts, problem):
    """Check experts [L, P, s] against a problem's limits -> ([L, S], notes), second copies on a rank left out."""
    num_experts, where = problem.num_experts, f"{path}: {key}"
    wrong = np.argwhere((experts < HOLE) | (experts >= num_experts))
    if len(wrong):
        at = tuple(wrong[0])
        raise ConfigError(
            f"{where}: layer {at[0]}, rank {at[1]} holds expert {experts[at]}: must be -1 to {num_experts - 1}"
        )
    doubles = np.zeros(experts.shape, bool)
    for slot in range(1, experts.shape[2]):
        doubles[:, :, slot] = ((experts[:, :, :slot] == experts[:, :, slot, None]) & (experts[:, :, slot, None] != HOLE)).any(axis=2)
    experts = np.where(doubles, HOLE, experts)
    for layer, row in enumerate(experts):
        copies = np.bincount(row[row != HOLE], minlength=num_experts)
        if not copies.all():
            raise ConfigError(f"{where}: layer {layer} has no expert {int(np.argmin(copies))}")
        if copies.max() > 1 and not problem.replicate:
            raise ConfigError(
                f"{where}: layer {layer} has {copies.max()} copies of expert {int(np.argmax(copies))}, "
                "but replicate = false"
            )
    used = np.bincount(problem.node_of_rank, (experts != HOLE).sum(axis=(0, 2)), problem.num_nodes)
    if (used > problem.memory_copies).any():
        node = int(np.argmax(used - problem.memory_copies))
        raise ConfigError(
            f"{where}: node {problem.node_names[node] if problem.node_names else node} holds {int(used[node])} copies, "
            f"its memory {problem.memory_copies[node]}"
        )
    notes = [f"{doubles.sum()} second copies on the same rank are left out"] if doubles.any() else []
    return experts.reshape(problem.num_layers, -1), notes


def write_map(path, expert_of_replica):
    """Write layouts [L, S] as EPLB's map: .npy, or JSON with physical_to_logical, logical_to_physical, logical_count."""
    if pathlib.Path(path).suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, expert_of_replica)
        return
    count = [np.bincount(row[row != HOLE]) for row in expert_of_replica]
    tree = {
        "physical_to_logical": expert_of_replica.tolist(),
        "logical_to_physical": [
            [np.flatnonzero(row == expert).tolist() for expert in range(len(of_layer))]
            for row, of_layer in zip(expert_of_replica, count, strict=True)
        ],
        "logical_count": [of_layer.tolist() for of_layer in count],
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items())
    pathlib.Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
