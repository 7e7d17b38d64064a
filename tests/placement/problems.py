"""Small problems of every kind, layouts of them at random, and what makes a layout one."""

import numpy as np
from hypothesis import strategies as st

from hpcmoe.placement.problem import OBJECTIVES, PlacementProblem
from hpcmoe.placement.quotas import divide_memory, make_limits
from hpcmoe.placement.search.layer_data import EMPTY, make_layer_data

EXPERT_BYTES = 1000


def make_problem(ranks_of_node, num_experts, slots_per_rank, seed=0, num_layers=1, num_racks=1, **changes):
    """Make a problem with tokens, links, ports and probabilities at random, and memory for all slots."""
    rng = np.random.default_rng(seed)
    num_nodes, num_ranks = len(ranks_of_node), sum(ranks_of_node)
    fields = {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "slots_per_rank": slots_per_rank,
        "replicate": False,
        "node_of_rank": np.repeat(np.arange(num_nodes), ranks_of_node),
        "rack_of_node": np.arange(num_nodes) * num_racks // num_nodes,
        "bytes_per_second": rng.uniform(1e8, 1e9, (num_nodes, num_nodes)),
        "latency_seconds": rng.uniform(1e-5, 1e-3, (num_nodes, num_nodes)),
        "egress_bytes_per_second": rng.uniform(2e8, 1e9, num_nodes),
        "ingress_bytes_per_second": rng.uniform(2e8, 1e9, num_nodes),
        "uplink_bytes_per_second": rng.uniform(2e8, 1e9, num_racks),
        "memory_bytes": np.array(ranks_of_node) * slots_per_rank * num_layers * EXPERT_BYTES,
        "expert_bytes": EXPERT_BYTES,
        "bytes_per_token": 128,
        "seconds_per_token": 10 ** rng.uniform(-7.5, -6),
        "tokens_of_rank": rng.integers(0, 1000, num_ranks),
        "probability": rng.dirichlet(np.full(num_experts, 0.5), (num_layers, num_nodes)),
    }
    return PlacementProblem(**(fields | changes))


@st.composite
def problems(draw, tight=False):
    """Draw a problem: nodes with and without ranks, racks, spare slots, any objective.

    tight: memory that is short, and perhaps too short for any placement.
    """
    ranks_of_node = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    slots, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_slots = np.array(ranks_of_node) * slots
    changes = {
        "replicate": draw(st.booleans()),
        "even": draw(st.booleans()),
        "objective": draw(st.sampled_from(OBJECTIVES)),
        "count_latency": draw(st.booleans()),
        "node_of_rank": np.array(draw(st.permutations(np.repeat(np.arange(len(num_slots)), ranks_of_node).tolist()))),
    }
    if tight:
        replicas = [draw(st.integers(0, int(number) * num_layers)) for number in num_slots]
        changes["memory_bytes"] = np.array(replicas) * EXPERT_BYTES + draw(st.integers(0, EXPERT_BYTES - 1))
    num_experts = draw(st.integers(1, int(num_slots.sum())))
    seed, num_racks = draw(st.integers(0, 999)), draw(st.integers(1, len(num_slots)))
    return make_problem(ranks_of_node, num_experts, slots, seed, num_layers, num_racks, **changes)


def has_place(problem):
    """Return True if a problem has a placement: a slot for every expert of a layer, and memory for those of all."""
    room = np.minimum(problem.slots_of_node * problem.num_layers, problem.memory_bytes // problem.expert_bytes)
    return problem.num_experts <= problem.slots_of_node.sum() and problem.num_experts * problem.num_layers <= room.sum()


def layer_data_of(problem, layer=0):
    """Build the data of a layer's search, with the memory divided among the layers."""
    return make_layer_data(problem, layer, make_limits(problem, divide_memory(problem)[layer]))


def scatter(problem, seed):
    """Place every expert anywhere, and where there may be more replicas of it, some -> expert_at [P, s]."""
    rng = np.random.default_rng(seed)
    expert_at = np.full((problem.num_ranks, problem.slots_per_rank), EMPTY)
    free = rng.permutation(expert_at.size)
    expert_at.flat[free[: problem.num_experts]] = np.arange(problem.num_experts)
    if problem.replicate:
        for place in free[problem.num_experts :][rng.random(expert_at.size - problem.num_experts) < 0.6]:
            rank, slot = divmod(int(place), problem.slots_per_rank)
            expert = rng.integers(problem.num_experts)
            if expert not in expert_at[rank]:
                expert_at[rank, slot] = expert
    return expert_at


def assert_layer_is_placed(layer_data, expert_at):
    """Check a layer [P, s]: all experts there, none twice on a rank, all limits kept."""
    held = [[expert for expert in rank if expert != EMPTY] for rank in expert_at.tolist()]
    assert all(len(experts) == len(set(experts)) for experts in held)
    replicas = np.bincount([expert for experts in held for expert in experts], minlength=len(layer_data.tokens))
    assert len(replicas) == len(layer_data.tokens) and replicas.min() >= 1
    if not layer_data.replicate:
        assert replicas.max() == 1

    on_rank = np.array([len(experts) for experts in held])
    assert (layer_data.fewest_of_rank <= on_rank).all() and (on_rank <= layer_data.most_of_rank).all()
    on_node = np.bincount(layer_data.node_of_rank, on_rank, len(layer_data.most_of_node))
    assert (on_node <= layer_data.most_of_node).all()
