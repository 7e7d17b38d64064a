"""Links that need no measuring, from a file: written by hand, or kept by an earlier run."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcmoe.cluster.names import format_ambiguous, match_names
from hpcmoe.cluster.topology import (
    NO_UPLINKS,
    PORTS_TAKEN,
    ClusterLinks,
    Topology,
    find_port_maxima,
    make_saved_topology,
    naming_file,
    read_topology_tree,
)
from hpcmoe.errors import ClusterError
from hpcmoe.messages import one_line, show_value, suggest
from hpcmoe.reading import is_number

_KEYS = ("latency_seconds", "egress_bytes_per_second", "ingress_bytes_per_second", "uplink_bytes_per_second")
_LISTS = ("bytes_per_second", *_KEYS)  # of a file by hand
LinksAndSource = tuple[ClusterLinks, dict[str, str]]


def read_links(path: str, node_names: Sequence[str], rack_names: Sequence[str]) -> LinksAndSource:
    """Read the links of this run's nodes and racks from a file, with the source of each fact.

    The file is written by hand, five lists in the order of nodes and racks as in inputs/links.json, or a topology.json
    of an earlier run, by names. Raises ClusterError that names the file and the entry where it does not fit.
    """
    tree = read_topology_tree(path)
    if isinstance(tree, dict) and "nodes" in tree:
        with naming_file(path):
            saved = make_saved_topology(tree)
        links, source = saved_links(saved, node_names, rack_names, path)
    else:
        links, source = make_listed_links(tree, len(node_names), len(rack_names), path)

    # Rates are above 0; an uplink without limit is none, and a latency may be 0.
    for key in _LISTS:
        array, names = getattr(links, key), rack_names if key.startswith("uplink") else node_names
        most = np.inf if key.startswith("uplink") else sys.float_info.max
        right = (array >= 0) & np.isfinite(array) if key == "latency_seconds" else (array > 0) & (array <= most)
        allowed = "0 or above" if key == "latency_seconds" else "above 0"
        allowed = allowed if key.startswith("uplink") else f"finite and {allowed}"
        for index in np.argwhere(~right)[:1]:
            place, of = "".join(f"[{i}]" for i in index), " to ".join(names[i] for i in index)
            raise ClusterError(f"{path}: {key}: entry {place} = {array[tuple(index)]:g}, {of}, must be {allowed}")
    return links, source


def make_listed_links(tree: Any, num_nodes: int, num_racks: int, path: str) -> LinksAndSource:
    """Return the links that a file lists; what it leaves out is guessed, and the source says so."""
    # Check that it is such a file.
    if not isinstance(tree, dict):
        raise ClusterError(f"{path}: must hold one JSON object, not {show_value(tree)}")
    for key in tree:
        if key not in _LISTS:
            raise ClusterError(f"{path}: {one_line(key)}: unknown key{suggest(key, _LISTS)}")
    given = {key: value for key, value in tree.items() if value != []}
    if "bytes_per_second" not in given:
        raise ClusterError(f"{path}: bytes_per_second: missing; must be a list of lists, or the file a topology.json")

    # What is not given has a guess.
    source = dict.fromkeys(("links", "ports", "uplinks"), f"file {path}")
    if "latency_seconds" not in given:
        source["links"] = f"file {path}; latency not given, taken as 0"
    if not {"egress_bytes_per_second", "ingress_bytes_per_second"} <= set(given):
        source["ports"] = f"file {path}; {PORTS_TAKEN}"
    if "uplink_bytes_per_second" not in given:
        source["uplinks"] = NO_UPLINKS

    # Each list has an entry a node or a rack, each matrix a row and a column a node.
    rates = make_given_array(tree["bytes_per_second"], (num_nodes, num_nodes), f"{path}: bytes_per_second")
    usual = (np.zeros_like(rates), *find_port_maxima(rates), np.full(num_racks, np.inf))
    arrays = {
        key: make_given_array(given[key], value.shape, f"{path}: {key}") if key in given else value
        for key, value in zip(_KEYS, usual, strict=True)
    }
    return ClusterLinks(bytes_per_second=rates, **arrays), source


def make_given_array(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return an array of a list, or list of lists, whose shape must be this run's nodes or racks -> float64 `shape`.

    null is no limit. Raises ClusterError that begins with `what`, the file and key.
    """
    # Check the shape.
    is_matrix = len(shape) == 2
    rows = value if is_matrix else [value]
    if not (isinstance(value, list) and all(isinstance(row, list) for row in rows)):
        raise ClusterError(f"{what} must be a list{' of lists' * is_matrix}")
    widths = sorted({len(row) for row in rows})
    if len(value) != shape[0] or widths != [shape[-1]]:
        has = f"is {len(value)} x {' or '.join(map(str, widths))}" if is_matrix else f"has {len(value)} entries"
        raise ClusterError(f"{what} {has}, the run has {shape[0]} {'racks' if 'uplink' in what else 'nodes'}")

    # Check the numbers.
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            if not (number is None or is_number(number)):
                place = f"[{i}][{j}]" if is_matrix else f"[{j}]"
                raise ClusterError(f"{what}: entry {place} = {show_value(number)}: must be a number")
    numbers = [[np.inf if number is None else number for number in row] for row in rows]
    return np.array(numbers, np.float64).reshape(shape)


def saved_links(saved: Topology, node_names: Sequence[str], rack_names: Sequence[str], path: str) -> LinksAndSource:
    """Return the links of this run's nodes and racks, by name, from a Topology that may hold more of them."""
    # Find the nodes, whose names may differ by a domain.
    found, ambiguous = match_names(node_names, saved.node_names)
    missing = [name for name in node_names if name not in found]
    if missing:
        unclear = f" ({format_ambiguous(ambiguous)})" if ambiguous else ""
        raise ClusterError(
            f"{path}: has no links of {', '.join(missing)}{unclear}; "
            f"the run's nodes are {', '.join(node_names)}, the file's {', '.join(saved.node_names)}"
        )

    # A guess of the file's own run stays one.
    nodes = [saved.node_names.index(found[name]) for name in node_names]
    uplink_of_rack = dict(zip(saved.rack_names, saved.uplink_bytes_per_second, strict=True))
    source = dict.fromkeys(("links", "ports", "uplinks"), f"file {path}")
    for fact, guess in (("ports", PORTS_TAKEN), ("uplinks", NO_UPLINKS)):
        if saved.source.get(fact, "").endswith(guess):
            source[fact] = f"file {path}; {guess}"

    # A rack that the file does not know by name may be part of one that it does: its uplink is not known.
    strange = [name for name in rack_names if name not in uplink_of_rack]
    if strange and len(rack_names) > 1:
        source["uplinks"] = f"file {path}; of {', '.join(strange)} {NO_UPLINKS}"
    links = ClusterLinks(
        bytes_per_second=saved.bytes_per_second[np.ix_(nodes, nodes)],
        latency_seconds=saved.latency_seconds[np.ix_(nodes, nodes)],
        egress_bytes_per_second=saved.egress_bytes_per_second[nodes],
        ingress_bytes_per_second=saved.ingress_bytes_per_second[nodes],
        uplink_bytes_per_second=np.array([uplink_of_rack.get(name, np.inf) for name in rack_names]),
    )
    return links, source
