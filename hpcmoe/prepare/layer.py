"""Where one layer's experts go, in a group of a library's user: evenly without a search, or by what is known of it."""

import logging
import time
from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.errors import ConfigError, on_root
from hpcmoe.experts.options import ExpertsOptions
from hpcmoe.experts.shapes import estimate_expert
from hpcmoe.messages import format_index
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.files.checks import find_overflow
from hpcmoe.placement.files.maps import check_map, read_map
from hpcmoe.placement.layouts import pad_slots
from hpcmoe.placement.problem import PlacementProblem, check_problem, count_slots_per_rank
from hpcmoe.placement.quotas import divide_memory, has_ample_memory
from hpcmoe.placement.result import Placement, SearchStats, evaluate
from hpcmoe.placement.rules import place_by_rule
from hpcmoe.prepare.placement import make_folded_problem, tune_placement

log = logging.getLogger(__name__)

_ALIKE = 0.7  # of the fastest: a slower link, port or uplink is of another kind
_NAMES = {"B": "bytes_per_second", "L": "latency_seconds", "tokens": "tokens_per_rank"}  # a user's, for find_overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """What the placement of one layer's experts depends on."""

    num_experts: int
    top_k: int
    tokens_per_rank: float  # of a step
    row_bytes: int  # of a token on its way
    expert_bytes: int  # one expert, whole, with its gradient and the optimizer's state
    seconds_per_token: float = 0.0  # a rank's for one assignment, forward; 0: computing does not count
    spare_slots_per_rank: int = 0
    replicate: bool = False  # may spare slots hold second replicas?
    loads: np.ndarray | None = None  # [E], or [nodes, E] by the tokens' home; in any unit; None: not known yet
    memory_bytes: np.ndarray | None = None  # [nodes] for this layer's experts; None: all that the topology has


def make_layer_experts(options: ExpertsOptions, mesh: Mesh) -> LayerExperts:
    """Return what the placement of a layer depends on, from the arguments that it is built with."""
    one_expert, states = estimate_expert(options.shape, trains=True)
    given = len(options.placement) // mesh.expert_parallel  # slots of a rank
    spare = given - count_slots_per_rank(options.num_experts, mesh.expert_parallel, 0)
    return LayerExperts(
        num_experts=options.num_experts,
        top_k=options.top_k,
        tokens_per_rank=options.max_tokens,
        row_bytes=options.hidden * (2 if options.dtype == "bfloat16" else 4),
        expert_bytes=one_expert * states,
        spare_slots_per_rank=max(options.spare_slots_per_rank, spare),
        replicate=options.replicate or given > 0,
    )


def choose_method(options: ExpertsOptions) -> str | np.ndarray:
    """Choose the method of place_layer() for the arguments that a layer is built with."""
    if options.placement:
        return np.array(options.placement, np.int64)
    return "eplb" if options.replicate else "auto"


def place_layer(
    topology: Topology,
    mesh: Mesh,
    layer: LayerExperts,
    method: str | np.ndarray = "auto",
    *,
    seconds: float = 1.0,
    seed: int = 0,
) -> Placement:
    """Place one layer's experts -> Placement of one layer, the same on all ranks. Collective over mesh.world.

    method: "auto" places them evenly in their order, in milliseconds, unless loads are given, or nodes have links or
    too little memory of their own kind: then it searches, as "packed" does, for so many seconds. "contiguous" and
    "eplb" place by rule. An array [S] or [P, s] has the expert of each slot, -1 where it is empty; any other word is
    the path of a placement file. Raises ConfigError or PlacementError on all ranks. What rank 0 is given counts.
    """
    return on_root(mesh.world, lambda: solve_layer(topology, mesh, layer, method, seconds, seed))


def solve_layer(
    topology: Topology, mesh: Mesh, layer: LayerExperts, method: str | np.ndarray, seconds: float, seed: int
) -> Placement:
    """Place one layer's experts, on the rank that calls it alone."""
    problem = make_layer_problem(topology, mesh, layer)
    if isinstance(method, np.ndarray):
        return evaluate(problem, check_given_slots(problem, method), [0.0], "given", SearchStats())
    if method == "auto":
        method = "contiguous" if layer.loads is None and has_like_nodes(problem) else "packed"
    match method:
        case "contiguous" | "eplb":
            layouts = place_by_rule(problem, divide_memory(problem), method)
            slots = np.stack([pad_slots(problem, expert_at) for expert_at in layouts])
            return evaluate(problem, slots, [0.0], method, SearchStats())
        case "packed":
            from hpcmoe.placement.solve import make_placement  # imports numba and scipy

            begun = time.perf_counter()
            placement = make_placement(problem, seconds=seconds, seed=seed)
            return tune_placement(problem, placement, seconds, begun)
        case path:
            slots, notes = read_map(path, problem)
            for note in notes:
                log.warning("placement %s: %s", path, note)
            return evaluate(problem, slots, [0.0], "file", SearchStats())


def make_layer_problem(topology: Topology, mesh: Mesh, layer: LayerExperts) -> PlacementProblem:
    """Build the placement problem of one layer. Raises ConfigError or PlacementError where it has no answer."""
    memory = topology.memory_bytes if layer.memory_bytes is None else layer.memory_bytes
    assignments = layer.tokens_per_rank * mesh.tensor_parallel * layer.top_k
    problem = make_folded_problem(
        topology,
        mesh,
        make_layer_loads(topology, layer),
        np.asarray(memory) / np.bincount(topology.node_of_rank),
        layer.spare_slots_per_rank,
        tokens_of_rank=np.full(mesh.expert_parallel, float(assignments)),
        replicate=layer.replicate,
        expert_bytes=layer.expert_bytes,
        bytes_per_token=layer.row_bytes,
        seconds_per_token=layer.seconds_per_token,
        objective="step",
    )
    for line in find_overflow(problem, _NAMES):
        raise ConfigError(line)
    check_problem(problem, "num_experts, spare_slots_per_rank", "num_experts, hidden, feed_forward")
    return problem


def make_layer_loads(topology: Topology, layer: LayerExperts) -> Loads:
    """Return the loads that are given, else even ones. Raises ConfigError."""
    if layer.loads is None:
        return Loads(tokens=np.ones((1, 1, layer.num_experts)), node_names=())
    loads = np.asarray(layer.loads, np.float64)
    shape = (topology.num_nodes, layer.num_experts)
    if loads.shape not in (shape, shape[1:]):
        raise ConfigError(
            f"loads has shape {list(loads.shape)}: must be [num_experts] = {list(shape[1:])} or [nodes, num_experts] = "
            f"{list(shape)}"
        )
    wrong = np.argwhere(~(np.isfinite(loads) & (loads >= 0)))
    if len(wrong):
        index = tuple(wrong[0].tolist())
        raise ConfigError(f"loads{format_index(index)} = {loads[index]:g}: must be finite and >= 0")
    if not loads.any():
        raise ConfigError("loads: must not all be 0")
    return Loads(tokens=np.atleast_2d(loads)[None], node_names=topology.node_names if loads.ndim == 2 else ())


def has_like_nodes(problem: PlacementProblem) -> bool:
    """Return True if no node differs from the others in a way by which experts had better be elsewhere."""
    same_rack = np.equal.outer(problem.rack_of_node, problem.rack_of_node)
    rates = [problem.egress_bytes_per_second, problem.ingress_bytes_per_second, problem.uplink_bytes_per_second]
    rates += [problem.bytes_per_second[same_rack & ~np.eye(problem.num_nodes, dtype=bool)]]
    rates += [problem.bytes_per_second[~same_rack]]
    return has_ample_memory(problem) and all(is_alike(kind) for kind in rates)


def is_alike(rates: np.ndarray) -> bool:
    """Return True if no rate is far below the highest; of none, or all without limit, too."""
    return bool((rates >= _ALIKE * rates.max(initial=0.0)).all())


def check_given_slots(problem: PlacementProblem, experts: np.ndarray) -> np.ndarray:
    """Check the expert of each slot, [S] or [P, s], as a user gives it -> int64 [1, S]. Raises ConfigError."""
    if experts.ndim not in (1, 2) or experts.size == 0 or experts.dtype.kind not in "iu":
        raise ConfigError("placement: must be an array of whole numbers, [slots] or [ranks, slots of each]")
    slots, notes = check_map("placement", "expert_of_slot", experts.astype(np.int64)[None], problem)
    for note in notes:
        log.warning("placement: %s", note)
    return slots
