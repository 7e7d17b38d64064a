"""A placement problem as a JSON file, CASE.json: read, checked key by key, and made into arrays."""

import os
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from pydantic import BaseModel, BeforeValidator, ValidationError

from hpcmoe.errors import ConfigError, PlacementError
from hpcmoe.messages import format_more, one_line, show_value
from hpcmoe.placement.files.checks import (
    find_invalid_numbers,
    find_overflow,
    find_shape_mismatches,
    number_racks,
    to_integer,
)
from hpcmoe.placement.problem import PlacementProblem, check_problem
from hpcmoe.reading import read_json
from hpcmoe.validate import format_entry, group_errors

_MOST_MEMORY_BYTES = 2**62  # a node's memory is counted in 64 bits


_Count = Annotated[int, BeforeValidator(to_integer), Interval(ge=1, lt=2**31)]
_Natural = Annotated[int, BeforeValidator(to_integer), Interval(ge=0, lt=2**31)]
_Bytes = Annotated[int, BeforeValidator(to_integer), Interval(ge=1, lt=_MOST_MEMORY_BYTES)]
_Rows = list[list[float]]
_Links = list[list[float | None]]  # the diagonal may be null


class Case(BaseModel, strict=True, frozen=True, extra="ignore"):
    """The keys of a case file; only their types are checked yet."""

    E: _Count  # experts of a layer
    G: _Count  # ranks, one GPU each
    nodes: _Count
    layers: _Count
    slots_per_gpu: _Count  # experts of one layer that a rank has room for
    rank_to_node: list[_Natural]  # [G]
    B: _Links  # [nodes][nodes] bytes/s from row to column
    L: _Links  # [nodes][nodes] s
    M: list[float]  # [nodes] bytes for experts of all layers
    expert_bytes: _Bytes  # an expert of one layer
    bytes_per_token: float
    home_tokens_per_rank: list[float]  # [G] assignments: tokens x top-k
    P: _Rows | None = None  # [layers][E]
    replicate: bool
    seconds_per_token: float | None = None
    nic_out: list[float] | None = None  # [nodes] bytes/s
    nic_in: list[float] | None = None  # [nodes] bytes/s
    rack: list[int] | list[str] | None = None  # [nodes]
    uplink: list[float] | None = None  # [racks] bytes/s
    P_src_node_domain_weights: _Rows | None = None  # [nodes][D]
    P_domain: list[_Rows] | None = None  # [layers][D][E]


def read_case(
    path: str | os.PathLike, objective: str = "step", count_latency: bool = False
) -> tuple[PlacementProblem, list[str]]:
    """Read and check a case file -> (PlacementProblem, notes on what was ignored or assumed).

    Raises ConfigError or PlacementError with one line per error: file, key, index, arithmetic.
    """
    return check_case(read_json(path), f"{one_line(path)}: ", objective, count_latency)


def check_case(
    tree: Any, prefix: str = "", objective: str = "step", count_latency: bool = False
) -> tuple[PlacementProblem, list[str]]:
    """Check the object of a case file -> (PlacementProblem, notes); each line of an error begins with the prefix."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix}must hold one JSON object, not {show_value(tree)}")
    try:
        case = Case.model_validate(tree)
    except ValidationError as invalid:
        lines = [format_entry(str(errors[0]["loc"][0]), tree, errors, 1) for errors in group_errors(invalid, 1)]
    else:
        lines = [*find_shape_mismatches(case)] or [*find_invalid_numbers(case)]
    if not lines:
        problem = make_case_problem(case, objective, count_latency)
        lines = [*find_overflow(problem)]
    if lines:
        raise ConfigError("\n".join(f"{prefix}{line}" for line in lines))
    try:
        check_problem(problem, "E, G, slots_per_gpu", "E, layers, M")
    except PlacementError as error:
        raise PlacementError(f"{prefix}{error}") from None
    return problem, make_notes(tree, objective)


def make_notes(tree: dict[str, Any], objective: str) -> list[str]:
    """List what was ignored or assumed in the file."""
    notes = []
    if unknown := sorted(set(tree) - set(Case.model_fields)):
        names = ", ".join(map(show_value, unknown[:8])) + format_more(len(unknown) - 8)
        notes.append(f"unknown keys ignored: {names}")
    if tree.get("P_domain") is not None and tree.get("P") is not None:
        notes.append("P is not used: P_src_node_domain_weights and P_domain give each node its own")
    if objective == "step" and tree.get("seconds_per_token") is None:
        notes.append("seconds_per_token is not given and taken as 0: computing costs nothing")
    return notes


def make_case_problem(case: Case, objective: str, count_latency: bool) -> PlacementProblem:
    """Build the PlacementProblem of a case whose numbers are good."""
    diagonal = np.eye(case.nodes, dtype=bool)
    rates = np.where(diagonal, 0.0, np.array(case.B, np.float64))
    rack = case.rack or [0] * case.nodes
    uplink = case.uplink or [np.inf] * len(set(rack))
    return PlacementProblem(
        num_layers=case.layers,
        num_experts=case.E,
        slots_per_rank=case.slots_per_gpu,
        replicate=case.replicate,
        node_of_rank=np.array(case.rank_to_node, np.int64),
        rack_of_node=np.array(number_racks(rack, len(uplink)), np.int64),
        bytes_per_second=np.where(diagonal, np.inf, rates),
        latency_seconds=np.where(diagonal, 0.0, np.array(case.L, np.float64)),
        egress_bytes_per_second=make_ports(case.nic_out, rates.max(axis=1)),
        ingress_bytes_per_second=make_ports(case.nic_in, rates.max(axis=0)),
        uplink_bytes_per_second=np.array(uplink, np.float64),
        memory_bytes=np.array([min(int(num_bytes), _MOST_MEMORY_BYTES) for num_bytes in case.M], np.int64),
        expert_bytes=case.expert_bytes,
        bytes_per_token=case.bytes_per_token,
        seconds_per_token=case.seconds_per_token or 0.0,
        tokens_of_rank=np.array(case.home_tokens_per_rank, np.float64),
        probability=make_case_probability(case),
        objective=objective,
        count_latency=count_latency,
        node_names=tuple(f"n{node}" for node in range(case.nodes)),
    )


def make_ports(given: list[float] | None, fastest_link: np.ndarray) -> np.ndarray:
    """Return ports as given, else as fast as their nodes' fastest links -> bytes/s [nodes], inf for a lone node."""
    return np.array(np.where(fastest_link > 0, fastest_link, np.inf) if given is None else given, np.float64)


def make_case_probability(case: Case) -> np.ndarray:
    """Compute each expert's probability for the tokens of each node -> [layers, nodes, E]; rows sum to 1."""
    if case.P_domain is None:
        of_layer = np.array(case.P, np.float64)[:, None, :]  # [layers, 1, E]
    else:
        of_layer = np.array(case.P_src_node_domain_weights) @ np.array(case.P_domain, np.float64)
    of_layer = of_layer / of_layer.sum(axis=-1, keepdims=True)
    return np.broadcast_to(of_layer, (case.layers, case.nodes, case.E))
