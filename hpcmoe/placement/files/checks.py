"""What can be wrong with a placement case: one line for each key, with its index and the arithmetic."""

import json
from itertools import groupby

import numpy as np

SUM_TOLERANCE = 1e-6  # of a row of probabilities
MOST_SLOTS = 10**8  # layers x G x slots_per_gpu that are written out
MOST_SECONDS = 1e15  # longer than that nothing is worth placing
MOST_NODES_NAMED = 3  # in one line
PROBABILITIES = ("P", "P_src_node_domain_weights", "P_domain")  # whose rows sum to 1


def show_json(value):
    """Write a value as JSON has it, cut to what a line can bear."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def format_type_errors(errors):
    """Make one line a key of pydantic's errors: the first of them, where it is, what stands there and may stand."""
    for key, group in groupby(errors, key=lambda error: error["loc"][0]):
        first, *others = group
        if first["type"] == "missing":
            yield f"{key}: missing"
            continue
        # A key of several types has an error for each, with the type's name in its path.
        index = [part for part in first["loc"][1:] if isinstance(part, int)]
        places = {tuple(part for part in error["loc"] if not isinstance(part, str)) for error in (first, *others)}
        what = first["msg"].replace("Input should", "must")
        yield f"{key}{format_index(index)} = {show_json(first['input'])}: {what}{format_more(len(places) - 1)}"


def format_index(index):
    """Write the indices of an entry: [2][3]."""
    return "".join(f"[{position}]" for position in index)


def format_more(number):
    """Say that a line stands for others like it."""
    return f" (and {number} more)" * (number > 0)


def find_shape_mismatches(case):
    """Yield a line for each key whose lengths are not what other keys say, or that lacks its companion."""
    domains = case.P_src_node_domain_weights
    sizes = {key: getattr(case, key) for key in ("E", "G", "nodes", "layers")}
    sizes["D"] = len((domains or case.P_domain or [[]])[0])
    shapes = {
        "rank_to_node": ("G",), "B": ("nodes", "nodes"), "L": ("nodes", "nodes"), "M": ("nodes",),
        "home_tokens_per_rank": ("G",), "P": ("layers", "E"), "nic_out": ("nodes",), "nic_in": ("nodes",),
        "rack": ("nodes",), "P_src_node_domain_weights": ("nodes", "D"), "P_domain": ("layers", "D", "E"),
    }  # fmt: skip
    found = [_find_shape_mismatch(key, getattr(case, key), dimensions, sizes) for key, dimensions in shapes.items()]
    for dimension, size in sizes.items():
        if lengths := [f"{place} has {length}" for place, length, wanted in filter(None, found) if wanted == dimension]:
            yield f"{', '.join(lengths)} entries, {dimension} = {size}"

    if case.P is None and case.P_domain is None:
        yield "P: missing; either P or P_src_node_domain_weights and P_domain must be given"
    if (domains is None) != (case.P_domain is None):
        here, missing = ("P_domain", "P_src_node_domain_weights")[:: 1 if domains is None else -1]
        yield f"{missing}: missing, but {here} is given"
    if case.uplink is not None:
        yield from _find_uplink_mismatch(case.uplink, case.rack)
    if case.layers * case.G * case.slots_per_gpu > MOST_SLOTS:
        yield (
            f"slots_per_gpu = {case.slots_per_gpu}: layers {case.layers} x G {case.G} x {case.slots_per_gpu} = "
            f"{case.layers * case.G * case.slots_per_gpu} slots: must be at most {MOST_SLOTS}"
        )


def _find_shape_mismatch(place, value, dimensions, sizes):
    """Find where nested lists first differ from their dimensions -> (place, length there, dimension), or None."""
    if value is None or not dimensions:
        return None
    if len(value) != sizes[dimensions[0]]:
        return place, len(value), dimensions[0]
    inner = (_find_shape_mismatch(f"{place}[{i}]", entry, dimensions[1:], sizes) for i, entry in enumerate(value))
    return next(filter(None, inner), None)


def _find_uplink_mismatch(uplink, rack):
    """Yield a line where uplinks do not match the racks."""
    if rack is None:
        yield f"uplink has {len(uplink)} entries, but rack is not given"
    elif number_racks(rack, len(uplink)) is None:
        yield f"uplink has {len(uplink)} entries, rack names {len(set(rack))} racks: {show_json(sorted(set(rack)))}"


def number_racks(rack, num_uplinks):
    """Give each node the number of its rack's uplink -> list, or None where they do not match.

    Racks may be numbered as uplink is; else uplinks are in sorted order of the racks' names.
    """
    if all(isinstance(name, int) and 0 <= name < num_uplinks for name in rack):
        return rack
    names = sorted(set(rack))
    return [names.index(name) for name in rack] if len(names) == num_uplinks else None


def find_invalid_numbers(case):
    """Yield a line for each key with a number that cannot be, naming the first of them."""
    off_diagonal = ~np.eye(case.nodes, dtype=bool)
    rate, amount, limit = "finite and > 0", "finite and >= 0", "> 0; Infinity is no limit"
    must_be = {
        "B": rate, "bytes_per_token": rate, "L": amount, "M": amount, "home_tokens_per_rank": amount, "P": amount,
        "seconds_per_token": amount, "P_src_node_domain_weights": amount, "P_domain": amount,
        "nic_out": limit, "nic_in": limit, "uplink": limit,
    }  # fmt: skip
    for key, what in must_be.items():
        if getattr(case, key) is not None:
            value = np.asarray(getattr(case, key), np.float64)
            fits = (value > 0) if ">= 0" not in what else (value >= 0)
            fits &= np.isfinite(value) | (what == limit)
            wrong = ~fits & off_diagonal if key in ("B", "L") else ~fits
            yield from format_first(key, value, wrong, f"must be {what}")
            if key in PROBABILITIES and not wrong.any():
                total = value.sum(axis=-1)
                wrong = np.abs(total - 1) > SUM_TOLERANCE
                yield from format_first(f"sum of {key}", total, wrong, f"must be 1, to within {SUM_TOLERANCE:g}")

    nodes = np.array(case.rank_to_node)
    yield from format_first("rank_to_node", nodes, nodes >= case.nodes, f"must be below nodes = {case.nodes}")


def format_first(key, value, wrong, what):
    """Yield one line for the first of the wrong entries, if there is one."""
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        yield f"{key}{format_index(index)} = {value[index]:.9g}: {what}{format_more(int(wrong.sum()) - 1)}"


CASE_NAMES = {  # of what a problem is made of, as a case file has them
    "B": "B", "nic_out": "nic_out", "nic_in": "nic_in", "uplink": "uplink", "seconds_per_token": "seconds_per_token",
    "L": "L", "tokens": "home_tokens_per_rank", "layers": "layers",
}  # fmt: skip


def find_overflow(problem, names=CASE_NAMES):
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
        if not longest * problem.num_layers <= MOST_SECONDS:
            yield (
                f"{names[key]}: at worst {longest:.3g} s for the {tokens:.3g} assignments of {names['tokens']} x "
                f"{names['layers']} = {problem.num_layers}: must be at most {MOST_SECONDS:g} s"
            )
            return


def find_missing_capacity(problem):
    """Yield a line where slots or memory are too few for every expert of every layer."""
    experts, layers, slots = problem.num_experts, problem.num_layers, problem.num_ranks * problem.slots_per_rank
    if experts > slots:
        yield f"E = {experts} experts > G {problem.num_ranks} x slots_per_gpu {problem.slots_per_rank} = {slots} slots"
        return

    # A node's memory is of use as far as its slots go.
    needed, one = experts * layers, problem.expert_bytes
    by_slots = problem.slots_of_node * layers
    held = problem.capacity_of_node
    if held.sum() >= needed:
        return
    work = f"E {experts} x layers {layers} = {needed} experts"
    total = sum(map(int, problem.memory_bytes))
    if total < needed * one:
        yield f"M sums to {total} bytes < {work} x expert_bytes {one} = {needed * one} bytes"
        return
    tightest = np.argsort(held - by_slots, kind="stable")[:MOST_NODES_NAMED]
    each = "; ".join(
        f"M[{n}] = {problem.memory_bytes[n]} // {one} = {problem.memory_replicas[n]}, slots {by_slots[n]}: {held[n]}"
        for n in tightest
    )
    yield f"M and slots hold {held.sum()} < {work}: {each}{format_more(problem.num_nodes - len(tightest))}"
