"""Links that need no measuring, from a file: written by hand, or kept by an earlier run."""

import sys

import numpy as np

from hpcmoe.cluster.names import format_ambiguous, match_names
from hpcmoe.cluster.topology import (
    NO_UPLINKS,
    PORTS_TAKEN,
    ClusterLinks,
    make_saved_topology,
    naming_file,
    port_maxima,
    read_tree,
)
from hpcmoe.errors import ClusterError
from hpcmoe.messages import one_line, show_value, suggest

LISTS = (  # of a file by hand
    "bytes_per_second",
    "latency_seconds",
    "egress_bytes_per_second",
    "ingress_bytes_per_second",
    "uplink_bytes_per_second",
)


def read_links(path, node_names, rack_names):
    """Read the links of this run's nodes and racks from a file -> (ClusterLinks, dict fact: source).

    The file is written by hand, five lists in the order of nodes and racks as in inputs/links.json, or a topology.json
    of an earlier run, by names. Raises ClusterError that names the file and the entry where it does not fit.
    """
    tree = read_tree(path)
    if isinstance(tree, dict) and isinstance(tree.get("bytes_per_second"), list):
        links, source = make_listed_links(tree, node_names, rack_names, path)
    else:
        with naming_file(path):
            saved = make_saved_topology(tree)
        links, source = saved_links(saved, node_names, rack_names, path)

    check_rates(links.bytes_per_second, f"{path}: bytes_per_second", node_names)
    check_latencies(links.latency_seconds, f"{path}: latency_seconds", node_names)
    check_rates(links.egress_bytes_per_second, f"{path}: egress_bytes_per_second", node_names)
    check_rates(links.ingress_bytes_per_second, f"{path}: ingress_bytes_per_second", node_names)
    check_rates(links.uplink_bytes_per_second, f"{path}: uplink_bytes_per_second", rack_names, most=np.inf)
    return links, source


def make_listed_links(tree, node_names, rack_names, path):
    """Take the links that a file lists; what it leaves out is guessed, and said to be -> (ClusterLinks, source)."""
    num_nodes, num_racks = len(node_names), len(rack_names)
    for key in tree:
        if key not in LISTS:
            raise ClusterError(f"{path}: {one_line(key)}: unknown key{suggest(key, LISTS)}")
    given = {key: value for key, value in tree.items() if value != []}
    source = dict.fromkeys(("links", "ports", "uplinks"), f"file {path}")
    if "latency_seconds" not in given:
        source["links"] = f"file {path}; latency not given, taken as 0"
    if not {"egress_bytes_per_second", "ingress_bytes_per_second"} <= set(given):
        source["ports"] = f"file {path}; {PORTS_TAKEN}"
    if "uplink_bytes_per_second" not in given:
        source["uplinks"] = NO_UPLINKS

    # Each list has an entry a node or a rack, each matrix a row and a column a node.
    rates = make_array(tree["bytes_per_second"], (num_nodes, num_nodes), f"{path}: bytes_per_second")
    egress, ingress = port_maxima(rates)
    usual = {
        "latency_seconds": np.zeros_like(rates),
        "egress_bytes_per_second": egress,
        "ingress_bytes_per_second": ingress,
        "uplink_bytes_per_second": np.full(num_racks, np.inf),
    }
    arrays = {
        key: make_array(given[key], value.shape, f"{path}: {key}") if key in given else value
        for key, value in usual.items()
    }
    return ClusterLinks(bytes_per_second=rates, **arrays), source


def make_array(value, shape, what):
    """Make an array of a list, or list of lists, whose shape must be this run's nodes or racks -> float64 `shape`.

    null is no limit. Raises ClusterError that begins with `what`, the file and key.
    """
    rows = value if len(shape) == 2 else [value]
    if not (isinstance(value, list) and all(isinstance(row, list) for row in rows)):
        raise ClusterError(f"{what} must be a list{' of lists' * (len(shape) == 2)}")
    widths = sorted({len(row) for row in rows})
    if len(value) != shape[0] or widths != [shape[-1]]:
        has = f"{len(value)} x {' or '.join(map(str, widths))}" if len(shape) == 2 else f"{len(value)} entries"
        has = f"is {has}" if len(shape) == 2 else f"has {has}"
        raise ClusterError(f"{what} {has}, the run has {shape[0]} {'racks' if 'uplink' in what else 'nodes'}")
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            if not (number is None or type(number) in (int, float)):
                place = f"[{i}][{j}]" if len(shape) == 2 else f"[{j}]"
                raise ClusterError(f"{what}: entry {place} = {show_value(number)}: must be a number")
    return np.array([[np.inf if number is None else number for number in row] for row in rows], np.float64).reshape(
        shape
    )


def saved_links(saved, node_names, rack_names, path):
    """Pick this run's nodes and racks by name from a Topology, which may hold more of them -> (ClusterLinks, source)."""
    found, ambiguous = match_names(node_names, saved.node_names)
    missing = [name for name in node_names if name not in found]
    if missing:
        unclear = f" ({format_ambiguous(ambiguous)})" if ambiguous else ""
        raise ClusterError(
            f"[cluster] links = {path}: has no links of {', '.join(missing)}{unclear}; "
            f"the run's nodes are {', '.join(node_names)}, the file's {', '.join(saved.node_names)}"
        )
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


def check_rates(rates, what, names, most=sys.float_info.max):
    """Refuse bytes a second that are no number above 0, or above `most`, with the names they are of."""
    check_entries(rates, ~((rates > 0) & (rates <= most)), what, names, "above 0")


def check_latencies(seconds, what, names):
    """Refuse seconds that are no finite number of 0 or above."""
    check_entries(seconds, ~((seconds >= 0) & np.isfinite(seconds)), what, names, "0 or above")


def check_entries(array, wrong, what, names, allowed):
    """Raise ClusterError for the first entry that is wrong: a pair of names in a matrix, one in a list."""
    for index in np.argwhere(wrong):
        place = "".join(f"[{i}]" for i in index)
        of = " to ".join(names[i] for i in index)
        raise ClusterError(f"{what}: entry {place} = {array[tuple(index)]:g}, {of}, must be {allowed}")
