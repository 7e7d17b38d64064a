"""The placement formats of other engines, each converted to one: the expert of each slot, by layer and rank.

DeepSeek's EPLB returns phy2log, SGLang and vLLM keep it as physical_to_logical_map beside its inverse: [layers][slots
of all ranks]. TensorRT-LLM's initial_global_assignments is an object of such rows by layer. vLLM on Ascend writes a
layer_list of device_lists of device_experts; vLLM's expert_map has for each rank each expert's place there, or -1.
"""

import itertools
import os
import pathlib
import re

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value
from hpcmoe.placement.files.arrays import NPY_MARK, read_npy
from hpcmoe.placement.files.checks import format_first, to_integer
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.reading import read_bytes, read_json

SLOTS = ("expert_of_slot", "physical_to_logical", "physical_to_logical_map", "phy2log", "initial_global_assignments")
_INVERSES = ("logical_to_physical", "logical_to_physical_map", "logical_to_all_physical_map", "log2phy")
_POSITIONS = ("expert_map", "expert_maps")
_COUNTS = ("logical_count", "expert_count", "logcnt")  # how often experts are there, or were chosen, not where
_POSITIONS_READ = "its numbers are read as each expert's place on each rank"
_MOST_DEEP, _MOST_ENTRIES = 3, 10**7
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez make",
    b"\x80": "a pickle, as old versions of torch.save make",
    b"\x89HDF": "an HDF5 file",
}


def read_slots(path: str | os.PathLike, problem: PlacementProblem) -> tuple[str, np.ndarray, list[str]]:
    """Read the experts of a map's slots -> (their name in the file, int64 [L, P, s] with EMPTY where empty, notes).

    Raises ConfigError in one line, in the terms of the file's format.
    """
    name, kind, numbers = _find_numbers(path)
    where = f"{one_line(path)}: {name}"
    array, widths = _make_array(where, numbers)
    if kind == "inverses":
        array, widths = _invert(where, array, problem.num_experts), []
    check_range(where, array, problem.num_experts)
    array, notes = _shape_by_rank(where, array, widths, problem)
    if kind == "positions" or _is_position_map(array, problem.num_experts):
        array, notes = _invert_positions(where, array, problem.num_experts), [*notes, _POSITIONS_READ]
    return name, array, notes


def _find_numbers(path):
    """Find a file's numbers -> (their name there, "slots", "inverses" or "positions", nested lists or array)."""
    # Read arrays, and reject what is not read.
    content = read_bytes(path)
    for mark, what in _ARCHIVES.items():
        if content.startswith(mark):
            raise ConfigError(f"{one_line(path)}: is {what}, which is not read: save its map as .npy or .json")
    if content.startswith(NPY_MARK) or pathlib.Path(path).suffix == ".npy":
        return "the array", "slots", read_npy(path, content, _MOST_ENTRIES, "whole numbers")
    if pathlib.Path(path).suffix in (".yaml", ".yml"):
        raise ConfigError(f"{one_line(path)}: YAML is not read: save it as JSON")

    # Look for the names of known formats.
    tree = read_json(path)
    if not isinstance(tree, dict):
        return "the list", "slots", tree
    for kind, names in (("slots", SLOTS), ("inverses", _INVERSES), ("positions", _POSITIONS)):
        for name in names:
            if name in tree:
                return name, kind, tree[name]
    if "layer_list" in tree:
        return "layer_list", "slots", _read_layer_list(f"{one_line(path)}: layer_list", tree)
    if tree and all(_parse_number(key) is not None for key in tree):
        return "the object", "slots", tree

    # Explain what is missing.
    counts = [name for name in _COUNTS if name in tree]
    what = f"{counts[0]} tells how many, not where" if counts else f"has {show_value(sorted(tree))}"
    raise ConfigError(
        f"{one_line(path)}: {what}: an object needs {', '.join((*SLOTS, 'layer_list'))}, or {_INVERSES[0]}"
    )


def _read_layer_list(where, tree):
    """Read the experts of a layer_list's devices -> nested lists."""
    layers = _sort_by_number(where, tree["layer_list"], "layer_id")
    count = tree.get("moe_layer_count", len(layers))
    if count != len(layers):
        raise ConfigError(f"{where} has {len(layers)} layers, its moe_layer_count is {show_value(count)}")
    devices = [
        _sort_by_number(f"{where}[{k}] device_list", layer.get("device_list"), "device_id")
        for k, layer in enumerate(layers)
    ]
    if not all("device_expert" in device for of_layer in devices for device in of_layer):
        raise ConfigError(f"{where}: each device needs its device_expert")
    return [[device["device_expert"] for device in of_layer] for of_layer in devices]


def _sort_by_number(where, entries, key):
    """Sort a list of objects by a number that all or none of them have -> list."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where} must be a list of objects, is {show_value(entries)}")
    numbers = [entry.get(key) for entry in entries]
    if not any(key in entry for entry in entries):
        return entries
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{where}: each needs a {key} of its own, they are {show_value(numbers)}")
    return sorted(entries, key=lambda entry: entry[key])


def _parse_number(key):
    """Read the number of a key such as "3", "layer_3" or "rank3" -> int, or None."""
    found = re.fullmatch(r"(?:[a-z]+[ _.-]?)?([0-9]{1,9})", key, re.ASCII | re.IGNORECASE)
    return found and int(found[1])


def _make_array(where, numbers):
    """Make an array [n], [n, n] or [n, n, n] of nested lists, or objects whose keys are numbers -> (int64, widths).

    Of innermost lists of different lengths, which are the widths, the shorter are filled with EMPTY.
    """
    # Flatten it level by level.
    lists = numbers.tolist() if isinstance(numbers, np.ndarray) else _order_numbered(where, numbers)
    levels = [[lists]]
    while all(isinstance(entry, list) for entry in levels[-1]) and len(levels) <= _MOST_DEEP + 1:
        levels.append(list(itertools.chain.from_iterable(levels[-1])))
        if not levels[-1]:
            raise ConfigError(f"{where} is empty")
    *outer, entries = levels
    if not 1 <= len(outer) <= _MOST_DEEP or any(isinstance(entry, list) for entry in entries):
        what = "[slots], [layers][slots] or [layers][ranks][slots]"
        raise ConfigError(f"{where} must be {what}, is {show_value(lists)}")

    # Fill an array with the innermost lists.
    lengths = [{len(entry) for entry in level} for level in outer]
    if any(len(of_level) > 1 for of_level in lengths[:-1]):
        raise ConfigError(f"{where} has layers of {' or '.join(map(str, sorted(lengths[1])))} ranks")
    array = np.full((len(outer[-1]), max(lengths[-1])), EMPTY, np.int64)
    for row, values in zip(array, outer[-1], strict=True):
        row[: len(values)] = [_read_integer(where, value) for value in values]
    return array.reshape([len(level[0]) for level in outer[:-1]] + [max(lengths[-1])]), sorted(lengths[-1])


def _order_numbered(where, value, depth=0):
    """Make lists of objects whose keys are consecutive numbers, such as layers or devices; leave others."""
    if depth > _MOST_DEEP or not isinstance(value, (dict, list)):
        return value
    if isinstance(value, list):
        return [_order_numbered(where, entry, depth + 1) for entry in value]
    numbers = {_parse_number(key): key for key in value}
    if None in numbers or len(numbers) < len(value) or (numbers and max(numbers) - min(numbers) >= len(numbers)):
        raise ConfigError(f"{where}: its keys must be consecutive numbers, are {show_value(list(value))}")
    return [_order_numbered(where, value[numbers[number]], depth + 1) for number in sorted(numbers)]


def _read_integer(where, value):
    """Convert a whole number, as 16 or 16.0, to an int of 64 bits."""
    value = to_integer(value)
    if type(value) is not int or abs(value) >= 2**63:
        raise ConfigError(f"{where} holds {show_value(value)}: must be whole numbers, those of experts, or -1")
    return value


def check_range(where: str, array: np.ndarray, num_experts: int) -> None:
    """Raise ConfigError for the first number that is no expert's, with its index in the file."""
    for line in format_first(
        where, array, (array < EMPTY) | (array >= num_experts), f"must be -1 to {num_experts - 1}"
    ):
        raise ConfigError(line)


def _shape_by_rank(where, array, widths, problem):
    """Reshape an array of one to three axes by layer and rank -> (int64 [L, P, s], notes)."""
    # Add the axes that it lacks.
    layers, ranks, one_for_all = problem.num_layers, problem.num_ranks, []
    if array.ndim == 2 and len(array) == ranks and (len(array) != layers or array.shape[1] % ranks or len(widths) > 1):
        array = array[None]  # a row for each rank, the same in all layers
    if array.ndim == 1:
        array = array[None]
    if len(array) == 1 < layers:
        array, one_for_all = np.repeat(array, layers, axis=0), [f"its one row is taken for all {layers} layers"]

    # Check its axes.
    if array.ndim == 3 and array.shape[:2] == (ranks, layers) != (layers, ranks):
        raise ConfigError(f"{where} is [ranks][layers][slots]: must be [layers][ranks][slots]")
    if len(array) != layers:
        raise ConfigError(f"{where} has {len(array)} layers, layers = {layers}")
    if array.ndim == 3 and array.shape[1] != ranks:
        raise ConfigError(f"{where}[0] has {array.shape[1]} ranks, experts are spread over {ranks}")
    if array.ndim == 2 and len(widths) > 1:
        raise ConfigError(f"{where} has layers of {widths[0]} to {widths[-1]} slots: must be of equal numbers")
    if array.ndim == 2 and array.shape[1] % ranks:
        raise ConfigError(f"{where}[0] has {array.shape[1]} slots: must be a multiple of the {ranks} ranks")
    return array.reshape(layers, ranks, -1), one_for_all


def _invert(where, slots_of_expert, num_experts):
    """Convert the slots of each expert [L, E, X] or [E, X], -1 where there are no more, to the experts of slots."""
    if slots_of_expert.ndim == 1 or slots_of_expert.shape[-2] != num_experts:
        raise ConfigError(f"{where} must be [layers][{num_experts} experts][slots of the expert]")
    slots_of_expert = slots_of_expert.reshape(-1, *slots_of_expert.shape[-2:])
    num_slots = int(slots_of_expert.max()) + 1

    # Put each expert in its slots, all of which must have one.
    layer, expert, _ = found = np.nonzero(slots_of_expert != EMPTY)
    slot = slots_of_expert[found]
    if slot.min(initial=0) < 0 or num_slots * len(slots_of_expert) > len(slot):
        raise ConfigError(f"{where} leaves slots without an expert: give physical_to_logical_map instead")
    experts = np.full((len(slots_of_expert), num_slots), EMPTY, np.int64)
    experts[layer, slot] = expert
    if (experts != EMPTY).sum() < len(slot):
        raise ConfigError(f"{where} has two experts in one slot")
    return experts


def _is_position_map(array, num_experts):
    """Return True if the rows of [L, P, s] cannot be experts, but can be each expert's place on the rank."""
    if array.shape[2] != num_experts or array.max() + 1 >= num_experts:
        return False
    counts = (array != EMPTY).sum(axis=2, keepdims=True)
    return bool((np.sort(array, axis=2) == np.maximum(np.arange(num_experts) - (num_experts - counts), EMPTY)).all())


def _invert_positions(where, positions, num_experts):
    """Convert each expert's place on each rank, [L, P, E] and -1 where it is not, to the experts of slots [L, P, s]."""
    if positions.shape[2] != num_experts:
        raise ConfigError(f"{where} must be [layers][ranks][{num_experts} experts], -1 where an expert is not")
    counts = (positions != EMPTY).sum(axis=2, keepdims=True)
    if positions.max() >= counts.max():
        raise ConfigError(f"{where}: an expert's place on a rank must be -1, or below the number of experts there")
    experts = np.full((*positions.shape[:2], int(counts.max())), EMPTY, np.int64)
    layer, rank, expert = found = np.nonzero(positions != EMPTY)
    experts[layer, rank, positions[found]] = expert
    return experts
