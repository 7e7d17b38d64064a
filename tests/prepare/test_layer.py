"""A group's placement of one layer: even and at once by default, by a search where something is known, or as given."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from launch import ROOT, run
from small import make_topology

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import ParallelConfig
from hpcmoe.errors import ConfigError, HpcmoeError, PlacementError
from hpcmoe.prepare.layer import LayerExperts, has_like_nodes, make_layer_problem, place_layer, solve_layer
from hpcmoe.wait import gather_to_all

SLOW = np.array([1e9, 1e9, 1e9, 1e8])


def make_mesh(expert_parallel, data_parallel=1, tensor_parallel=1):
    """The sizes of a mesh, without communicators."""
    return SimpleNamespace(
        expert_parallel=expert_parallel, data_parallel=data_parallel, tensor_parallel=tensor_parallel
    )


def make_layer(num_experts, **changes):
    fields = {"num_experts": num_experts, "top_k": 2, "tokens_per_rank": 100.0, "row_bytes": 32, "expert_bytes": 100}
    return LayerExperts(**fields | changes)


def solve(layer, topology=None, mesh=None, method="auto"):
    topology = topology or make_topology(4, 2)
    return solve_layer(topology, mesh or make_mesh(len(topology.node_of_rank)), layer, method, 0.2, 0)


@pytest.mark.parametrize(
    ("num_experts", "spare", "slots"),
    [
        (4, 0, [0, 1, 2, 3]),
        (2, 0, [0, -1, 1, -1]),
        (6, 0, [0, 1, 2, -1, 3, 4, 5, -1]),
        (8, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (5, 1, [0, 1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1]),
    ],
)
def test_without_loads_experts_are_spread_evenly_in_their_order(num_experts, spare, slots):
    placement = solve(make_layer(num_experts, spare_slots_per_rank=spare))
    assert placement.expert_of_replica.tolist() == [slots] and placement.method == "contiguous"
    assert placement.replica_count.tolist() == [[1] * num_experts]


def test_the_even_spread_imports_no_compiler():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]",
        "from prepare.test_layer import make_layer, solve",
        "assert solve(make_layer(6)).method == 'contiguous' and solve(make_layer(6), method='eplb').method == 'eplb'",
        "print([m for m in ('numba', 'scipy.optimize', 'hpcmoe.placement.solve') if m in sys.modules])",
    )
    ended = run(sys.executable, "-c", "\n".join(code))
    assert ended.status == 0 and ended.output.splitlines()[-1] == "[]", ended.output


def test_loads_bring_the_search_and_replicas_of_the_hottest():
    loads = np.array([90.0, 2, 2, 2, 2, 2])
    layer = make_layer(6, loads=loads, replicate=True, spare_slots_per_rank=1, seconds_per_token=1e-4)
    placement = solve(layer)
    assert placement.method == "packed" and placement.replica_count[0].argmax() == 0
    assert placement.replica_count[0, 0] == 4  # a rank's work is what counts here: all share the hottest


def test_loads_by_node_put_experts_where_their_tokens_are():
    loads = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]])[:, [0, 2, 1, 3]]
    placement = solve(make_layer(4, loads=loads))
    assert set(placement.expert_of_replica[0, :2]) == {0, 2} and placement.cross_node_share == 0


def test_nodes_of_another_kind_bring_the_search():
    topology = make_topology(4, 4)
    slow = dataclasses.replace(topology, egress_bytes_per_second=SLOW, ingress_bytes_per_second=SLOW)
    small = dataclasses.replace(topology, memory_bytes=np.array([10**6] * 3 + [50]))
    for other in (slow, small):
        placement = solve(make_layer(3), topology=other)
        assert placement.method == "packed" and placement.expert_of_replica[0, 3] == -1
    assert solve(make_layer(3), topology=topology).method == "contiguous"
    uneven = topology.bytes_per_second.copy()
    uneven[0, 1] /= 3
    assert not has_like_nodes(
        make_layer_problem(dataclasses.replace(topology, bytes_per_second=uneven), make_mesh(4), make_layer(4))
    )


def test_groups_are_folded_and_shards_count_as_one():
    problem = make_layer_problem(make_topology(8, 2), make_mesh(2, 2, 2), make_layer(4))
    assert problem.num_ranks == 2 and problem.slots_per_rank == 2
    assert problem.tokens_of_rank.tolist() == [100 * 2 * 2] * 2


def test_slots_may_be_given(tmp_path):
    slots = np.array([3, 2, 1, 0])
    np.save(tmp_path / "map.npy", slots[None])
    for given in (slots, slots[:, None], str(tmp_path / "map.npy")):
        placement = solve(make_layer(4), method=given)
        assert placement.expert_of_replica.tolist() == [[3, 2, 1, 0]]
    assert placement.method == "file"


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (np.array([0, 1, 2, 2]), "placement: expert_of_slot[0] has no expert 3"),
        (np.array([0, 1, 2]), "placement: expert_of_slot[0] has 3 slots: must be a multiple of the 4 ranks"),
        (np.array([0, 1, 2, 4]), "placement: expert_of_slot[0][3] = 4: must be -1 to 3"),
        (np.array([0.0, 1, 2, 3]), "placement: must be an array of whole numbers"),
        (np.array(3), "placement: must be an array of whole numbers"),
        (np.array([0, 1, 2, 3, 0, 1, 2, 3]), "placement: expert_of_slot has 2 experts on rank 0 of layer 0"),
        ("no-such-file.json", "no-such-file.json: cannot be read: "),
    ],
)
def test_wrong_slots_are_refused_in_one_line(method, text):
    with pytest.raises(ConfigError) as error:
        solve(make_layer(4), method=method)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loads": np.ones(3)}, "loads has shape [3]: must be [num_experts] = [4] or [nodes, num_experts] = [2, 4]"),
        ({"loads": np.array([1, 1, -1, 1])}, "loads[2] = -1: must be finite and >= 0"),
        ({"loads": np.zeros((2, 4))}, "loads: must not all be 0"),
        ({"expert_bytes": 10**12}, "4 experts x 1 layers x "),
        ({"tokens_per_rank": 1e300}, "bytes_per_second: at worst "),
    ],
)
def test_a_layer_that_cannot_be_placed_is_refused_in_one_line(changes, text):
    with pytest.raises((ConfigError, PlacementError)) as error:
        solve(make_layer(4, **changes))
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.mpi
def test_all_ranks_get_one_placement_or_one_error(comm):
    topology = make_topology(comm.size)
    with open_mesh(comm, ParallelConfig()) as mesh:
        layer = make_layer(comm.size + 1, loads=np.arange(1.0, comm.size + 2) if comm.rank == 0 else None)
        placement = place_layer(topology, mesh, layer, seconds=0.1)
        slots = gather_to_all(comm, placement.expert_of_replica.tolist())
        assert slots == [slots[0]] * comm.size and placement.method == "packed"
        with pytest.raises(HpcmoeError) as error:
            place_layer(topology, mesh, make_layer(2, loads=np.ones(3)))
        assert error.value.shared
