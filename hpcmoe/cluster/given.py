"""Links that need no measuring: those of the config, and those that an earlier run's file has kept."""

import sys

import numpy as np

from hpcmoe.cluster.names import format_ambiguous, match_names
from hpcmoe.cluster.topology import NO_UPLINKS, PORTS_TAKEN, ClusterLinks, find_port_maxima, load_topology
from hpcmoe.errors import ClusterError


def take_links(cluster, node_names, rack_names):
    """Take the links of [cluster] or of its links_file -> (ClusterLinks, dict fact: source).

    Raises ClusterError that names the key or file, and the entry, where they do not fit the nodes and racks.
    """
    match cluster.links:
        case "config":
            where = "[cluster]"
            links, source = config_links(cluster, node_names, rack_names)
        case "file":
            where = cluster.links_file
            links, source = saved_links(load_topology(where), node_names, rack_names, where)
        case _:
            raise ValueError(cluster.links)

    check_rates(links.bytes_per_second, f"{where} bytes_per_second", node_names)
    check_latencies(links.latency_seconds, f"{where} latency_seconds", node_names)
    check_rates(links.egress_bytes_per_second, f"{where} egress_bytes_per_second", node_names)
    check_rates(links.ingress_bytes_per_second, f"{where} ingress_bytes_per_second", node_names)
    check_rates(links.uplink_bytes_per_second, f"{where} uplink_bytes_per_second", rack_names, most=np.inf)
    return links, source


def config_links(cluster, node_names, rack_names):
    """Take the links as [cluster] has them; what it leaves out is guessed, and said to be -> (ClusterLinks, source)."""
    num_nodes, num_racks = len(node_names), len(rack_names)
    source = {"links": "config", "ports": "config", "uplinks": "config"}
    rates = shaped(cluster.bytes_per_second, (num_nodes, num_nodes), "bytes_per_second")
    if not cluster.latency_seconds:
        source["links"] = "config; latency not given, taken as 0"
    if not (cluster.egress_bytes_per_second and cluster.ingress_bytes_per_second):
        source["ports"] = f"config; {PORTS_TAKEN}"
    if not cluster.uplink_bytes_per_second:
        source["uplinks"] = NO_UPLINKS

    egress, ingress = find_port_maxima(rates)
    links = ClusterLinks(
        bytes_per_second=rates,
        latency_seconds=shaped(cluster.latency_seconds or np.zeros_like(rates), rates.shape, "latency_seconds"),
        egress_bytes_per_second=shaped(
            cluster.egress_bytes_per_second or egress, (num_nodes,), "egress_bytes_per_second"
        ),
        ingress_bytes_per_second=shaped(
            cluster.ingress_bytes_per_second or ingress, (num_nodes,), "ingress_bytes_per_second"
        ),
        uplink_bytes_per_second=shaped(
            cluster.uplink_bytes_per_second or np.full(num_racks, np.inf), (num_racks,), "uplink_bytes_per_second"
        ),
    )
    return links, source


def shaped(value, shape, key):
    """Make an array of a key's value, whose shape must be this run's nodes or racks; else ClusterError."""
    has = f"the run has {shape[0]} {'racks' if key.startswith('uplink') else 'nodes'}"
    if len(shape) == 2:
        widths = sorted({len(row) for row in value})
        if len(value) != shape[0] or widths != [shape[1]]:
            raise ClusterError(f"[cluster] {key} is {len(value)} x {' or '.join(map(str, widths))}, {has}")
    elif len(value) != shape[0]:
        raise ClusterError(f"[cluster] {key} has {len(value)} entries, {has}")
    return np.array(value, np.float64)


def saved_links(saved, node_names, rack_names, path):
    """Pick this run's nodes and racks by name from a Topology, which may hold more of them -> (ClusterLinks, source)."""
    found, ambiguous = match_names(node_names, saved.node_names)
    missing = [name for name in node_names if name not in found]
    if missing:
        unclear = f" ({format_ambiguous(ambiguous)})" if ambiguous else ""
        raise ClusterError(
            f"[cluster] links_file = {path}: has no links of {', '.join(missing)}{unclear}; "
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
