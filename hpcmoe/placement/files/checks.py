"""What can be wrong with a placement case: one line for each key, with its index and the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmoe.messages import format_index, format_more, show_value
from hpcmoe.placement.problem import PlacementProblem

if TYPE_CHECKING:
    from hpcmoe.placement.files.case import Case

_SUM_TOLERANCE = 1e-6  # of a row of probabilities
_MOST_SLOTS = 10**8  # layers x G x slots_per_gpu that are written out
_MOST_SECONDS = 1e15  # longer than that nothing is worth placing
_PROBABILITIES = ("P", "P_src_node_domain_weights", "P_domain")  # whose rows sum to 1
SHAPES = {
    "rank_to_node": ("G",), "B": ("nodes", "nodes"), "L": ("nodes", "nodes"), "M": ("nodes",),
    "home_tokens_per_rank": ("G",), "P": ("layers", "E"), "nic_out": ("nodes",), "nic_in": ("nodes",),
    "rack": ("nodes",), "P_src_node_domain_weights": ("nodes", "D"), "P_domain": ("layers", "D", "E"),
}  # fmt: skip
_RATE, _AMOUNT, _LIMIT = "finite and > 0", "finite and >= 0", "> 0; Infinity is no limit"
_RANGES = {
    "B": _RATE, "bytes_per_token": _RATE, "L": _AMOUNT, "M": _AMOUNT, "home_tokens_per_rank": _AMOUNT, "P": _AMOUNT,
    "seconds_per_token": _AMOUNT, "P_src_node_domain_weights": _AMOUNT, "P_domain": _AMOUNT,
    "nic_out": _LIMIT, "nic_in": _LIMIT, "uplink": _LIMIT,
}  # fmt: skip
_CASE_NAMES = {"tokens": "home_tokens_per_rank"}  # what a case file calls otherwise than find_overflow


def to_integer(value: object) -> object:
    """Convert 16.0 to 16, which JSON does not distinguish; leave other values."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def find_shape_mismatches(case: Case) -> Iterator[str]:
    """Yield a line for each key whose lengths are not what other keys say, or that lacks its companion."""
    # Compare all lengths with the sizes that they should be.
    domains = case.P_src_node_domain_weights
    sizes = {key: getattr(case, key) for key in ("E", "G", "nodes", "layers")}
    sizes["D"] = len((domains or case.P_domain or [[]])[0])
    found = [_find_shape_mismatch(key, getattr(case, key), dimensions, sizes) for key, dimensions in SHAPES.items()]
    for dimension, size in sizes.items():
        if lengths := [f"{place} has {length}" for place, length, wanted in filter(None, found) if wanted == dimension]:
            yield f"{', '.join(lengths)} entries, {dimension} = {size}"

    # Ask for one way to state the probabilities, whole.
    if case.P is None and case.P_domain is None:
        yield "P: missing; either P or P_src_node_domain_weights and P_domain must be given"
    if (domains is None) != (case.P_domain is None):
        here, missing = ("P_domain", "P_src_node_domain_weights")[:: 1 if domains is None else -1]
        yield f"{missing}: missing, but {here} is given"

    # Match uplinks with racks, and bound what an answer would hold.
    if case.uplink is not None:
        if case.rack is None:
            yield f"uplink has {len(case.uplink)} entries, but rack is not given"
        elif number_racks(case.rack, len(case.uplink)) is None:
            names = sorted({*case.rack})
            yield f"uplink has {len(case.uplink)} entries, rack names {len(names)} racks: {show_value(names)}"
    num_slots = case.layers * case.G * case.slots_per_gpu
    if num_slots > _MOST_SLOTS:
        yield (
            f"slots_per_gpu = {case.slots_per_gpu}: layers {case.layers} x G {case.G} x {case.slots_per_gpu} = "
            f"{num_slots} slots: must be at most {_MOST_SLOTS}"
        )


def _find_shape_mismatch(
    place: str, value: Any, dimensions: Sequence[str], sizes: Mapping[str, int]
) -> tuple[str, int, str] | None:
    """Find where nested lists first differ from their dimensions -> (place, length there, dimension), or None."""
    if value is None or not dimensions:
        return None
    if len(value) != sizes[dimensions[0]]:
        return place, len(value), dimensions[0]
    inner = (_find_shape_mismatch(f"{place}[{i}]", entry, dimensions[1:], sizes) for i, entry in enumerate(value))
    return next(filter(None, inner), None)


def number_racks(rack: Sequence[Any], num_uplinks: int) -> Sequence[int] | None:
    """Find the number of each node's uplink [nodes], or None where racks and uplinks do not match.

    Racks may be numbered as uplink is; else uplinks are in sorted order of the racks' names.
    """
    if all(isinstance(name, int) and 0 <= name < num_uplinks for name in rack):
        return rack
    names = sorted(set(rack))
    return [names.index(name) for name in rack] if len(names) == num_uplinks else None


def find_invalid_numbers(case: Case) -> Iterator[str]:
    """Yield a line for each key with a number that cannot be, naming the first of them."""
    off_diagonal = ~np.eye(case.nodes, dtype=bool)
    for key, what in _RANGES.items():
        if getattr(case, key) is None:
            continue

        # Compare each number with its range; a node has no link to itself.
        value = np.asarray(getattr(case, key), np.float64)
        fits = (value >= 0) if what == _AMOUNT else (value > 0)
        fits &= np.isfinite(value) | (what == _LIMIT)
        wrong = ~fits & off_diagonal if key in ("B", "L") else ~fits
        yield from format_first(key, value, wrong, f"must be {what}")

        # Sum rows of probabilities.
        if key in _PROBABILITIES and not wrong.any():
            total = value.sum(axis=-1)
            wrong = np.abs(total - 1) > _SUM_TOLERANCE
            yield from format_first(f"sum of {key}", total, wrong, f"must be 1, to within {_SUM_TOLERANCE:g}")

    nodes = np.array(case.rank_to_node)
    yield from format_first("rank_to_node", nodes, nodes >= case.nodes, f"must be below nodes = {case.nodes}")


def format_first(key: str, value: np.ndarray, wrong: np.ndarray, what: str) -> Iterator[str]:
    """Yield a line for the first of a key's wrong entries, if there is one."""
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0].tolist())
        entry = value[index].item()
        shown = f"{entry:.9g}" if isinstance(entry, float) else entry
        yield f"{key}{format_index(index)} = {shown}: {what}{format_more(int(wrong.sum()) - 1)}"


def find_overflow(problem: PlacementProblem, names: Mapping[str, str] = _CASE_NAMES) -> Iterator[str]:
    """Yield one line where seconds could leave the numbers that can be computed with; names: the user's for these."""
    tokens = problem.tokens_of_rank.sum()
    rates = {
        "B": problem.bytes_per_second.min(),
        "nic_out": problem.egress_bytes_per_second.min(),
        "nic_in": problem.ingress_bytes_per_second.min(),
        "uplink": problem.uplink_bytes_per_second.min(),
    }
    with np.errstate(over="ignore"):
        seconds = {key: tokens * problem.bytes_per_token / rate for key, rate in rates.items()}
        seconds["seconds_per_token"] = tokens * problem.seconds_per_token
        seconds["L"] = problem.latency_seconds.max()
    for key, longest in seconds.items():
        if not longest * problem.num_layers <= _MOST_SECONDS:
            yield (
                f"{names.get(key, key)}: at worst {longest:.3g} s for the {tokens:.3g} assignments of "
                f"{names['tokens']} x {names.get('layers', 'layers')} = {problem.num_layers}: "
                f"must be at most {_MOST_SECONDS:g} s"
            )
            return
