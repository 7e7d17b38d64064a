"""The resources of a layer: links, ports, uplinks and ranks, what tokens count on each, and what a token costs there.

The one definition that objectives, bounds, linear programs and the compiled search are made from. Seconds are one way.
"""

from collections.abc import Sequence

import numpy as np

from hpcmoe.placement.problem import PlacementProblem

RESOURCES = ("link", "egress", "ingress", "uplink_out", "uplink_in", "rank")  # kinds, in the order of all vectors


def list_resources(objective: str) -> tuple[str, ...]:
    """Return the kinds of resources that an objective counts."""
    match objective:
        case "links":
            return RESOURCES[:1]
        case "ports":
            return RESOURCES[:5]
        case "step":
            return RESOURCES
        case _:
            raise ValueError(objective)


def count_resources(problem: PlacementProblem) -> dict[str, int]:
    """Return the number of resources of each kind: links [nodes * nodes], ports [nodes], uplinks [racks], ranks [P]."""
    nodes, racks = problem.num_nodes, len(problem.uplink_bytes_per_second)
    return dict(zip(RESOURCES, (nodes**2, nodes, nodes, racks, racks, problem.num_ranks), strict=True))


def port_rates(problem: PlacementProblem) -> dict[str, np.ndarray]:
    """Return the bytes per second of ports [nodes] and uplinks [racks], which several flows share."""
    return {
        "egress": problem.egress_bytes_per_second,
        "ingress": problem.ingress_bytes_per_second,
        "uplink_out": problem.uplink_bytes_per_second,
        "uplink_in": problem.uplink_bytes_per_second,
    }


def token_seconds(problem: PlacementProblem) -> dict[str, np.ndarray]:
    """Return the seconds that one token takes on each resource: link [nodes, nodes], ports, uplinks, rank [P]."""
    ports = {name: problem.bytes_per_token / rate for name, rate in port_rates(problem).items()}
    return {"link": problem.link_cost} | ports | {"rank": np.full(problem.num_ranks, problem.seconds_per_token)}


def token_rates(problem: PlacementProblem) -> dict[str, np.ndarray]:
    """Return the tokens per second of links [nodes, nodes], ports and uplinks; 0 of a link that costs nothing."""
    cost = problem.link_cost
    ports = {name: rate / problem.bytes_per_token for name, rate in port_rates(problem).items()}
    return {"link": np.divide(1.0, cost, out=np.zeros(cost.shape), where=cost > 0)} | ports


def port_seconds(problem: PlacementProblem, sent: np.ndarray) -> dict[str, np.ndarray]:
    """Return the seconds of each port and uplink for bytes sent [nodes, nodes]; what stays on its node takes none."""
    crossing = np.where(np.eye(len(sent)), 0.0, sent)
    racks = (problem.rack_of_node[:, None] == np.arange(len(problem.uplink_bytes_per_second))).astype(np.float64)
    between = racks.T @ crossing @ racks
    np.fill_diagonal(between, 0.0)
    sums = (crossing.sum(axis=1), crossing.sum(axis=0), between.sum(axis=1), between.sum(axis=0))
    return {name: total / rate for total, (name, rate) in zip(sums, port_rates(problem).items(), strict=True)}


def traffic_seconds(problem: PlacementProblem, sent: np.ndarray, served: np.ndarray) -> dict[str, np.ndarray]:
    """Return the seconds of every resource, whatever the objective: tokens sent [nodes, nodes] and served [P].

    "link" [nodes, nodes], "egress" and "ingress" [nodes], "uplink_out" and "uplink_in" [racks], "rank" [P].
    """
    link = sent * problem.link_cost + np.where(sent > 0, problem.link_latency, 0.0)
    ports = port_seconds(problem, sent * problem.bytes_per_token)
    return {"link": link} | ports | {"rank": served * problem.seconds_per_token}


def price_flows(
    problem: PlacementProblem, sender: np.ndarray, receiver: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return where flows [n] from node to node count, and what a token costs there: link, port, uplink and seconds [n].

    The number is that of a resource among its kind. Seconds are 0 where a flow does not count.
    """
    # Count a flow on its link and ports where it leaves its node, on uplinks where it leaves its rack.
    racks, seconds = problem.rack_of_node, token_seconds(problem)
    leaves_node, leaves_rack = sender != receiver, racks[sender] != racks[receiver]
    counted_on = {
        "link": (sender * problem.num_nodes + receiver, leaves_node),
        "egress": (sender, leaves_node),
        "ingress": (receiver, leaves_node),
        "uplink_out": (racks[sender], leaves_rack),
        "uplink_in": (racks[receiver], leaves_rack),
    }
    return {name: (number, seconds[name].ravel()[number] * counts) for name, (number, counts) in counted_on.items()}


def name_resource(problem: PlacementProblem, name: str, index: Sequence[int]) -> str:
    """Format a resource's name for people: `n0 -> n3`, `n3 sends`, `rack 0 receives`, `rank 5 on n1`."""
    first = index[0]
    match name:
        case "link":
            return f"{problem.node_names[first]} -> {problem.node_names[index[1]]}"
        case "egress":
            return f"{problem.node_names[first]} sends"
        case "ingress":
            return f"{problem.node_names[first]} receives"
        case "uplink_out":
            return f"rack {first} sends"
        case "uplink_in":
            return f"rack {first} receives"
        case "rank":
            return f"rank {first} on {problem.node_names[problem.node_of_rank[first]]}"
        case _:
            raise ValueError(name)
