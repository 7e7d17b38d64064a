"""Placement cases as CASE.json has them, made by hand for tests, and ways to break them."""

import copy
import json

import numpy as np

UNUSED = "a key of no meaning"


def make_case(nodes=4, ranks=2, experts=8, layers=3, slots=1, seed=0, **changes):
    """Make a valid case of nodes x ranks in two racks -> dict; changes set keys, or drop those that are None."""
    rng = np.random.default_rng(seed)
    rack = [2 * node // nodes for node in range(nodes)]
    same = np.equal.outer(rack, rack)
    case = {
        "E": experts,
        "G": nodes * ranks,
        "nodes": nodes,
        "layers": layers,
        "slots_per_gpu": slots,
        "rank_to_node": [node for node in range(nodes) for _ in range(ranks)],
        "B": (np.where(same, 25e9, 6e9) * rng.uniform(0.7, 1.0, (nodes, nodes))).tolist(),
        "L": np.full((nodes, nodes), 5e-6).tolist(),
        "M": [1e10] * nodes,
        "expert_bytes": 35_000_000,
        "bytes_per_token": 8192,
        "home_tokens_per_rank": rng.integers(4000, 8000, nodes * ranks).tolist(),
        "P": rng.dirichlet(np.full(experts, 0.7), layers).tolist(),
        "replicate": False,
        "seconds_per_token": 2e-7,
        "nic_out": [25e9] * nodes,
        "nic_in": [25e9] * nodes,
        "rack": rack,
        "uplink": [10e9, 12e9],
    }
    return {key: value for key, value in (case | changes).items() if value is not None}


def make_domains(case, domains=3, seed=0):
    """Give a case's nodes probabilities of their own -> dict."""
    rng = np.random.default_rng(seed)
    return case | {
        "P_src_node_domain_weights": rng.dirichlet(np.full(domains, 0.5), case["nodes"]).tolist(),
        "P_domain": rng.dirichlet(np.full(case["E"], 0.5), (case["layers"], domains)).tolist(),
    }


def put(case, key, *index, value):
    """Set one entry of a case -> a case of its own."""
    changed = copy.deepcopy(case)
    place = changed
    for step in (key, *index[:-1]) if index else ():
        place = place[step]
    place[index[-1] if index else key] = value
    return changed


def write_case(path, case):
    """Write a case -> its path."""
    path.write_text(json.dumps(case))
    return path
