"""Expert-parallel groups folded into one: equal groups fold to the first, and every link counts as its slowest."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import make_topology

from hpcmoe.placement.groups import fold_groups, fold_memory, fold_probability, list_groups


def make_mesh(data, experts, tensor):
    return SimpleNamespace(data_parallel=data, expert_parallel=experts, tensor_parallel=tensor)


def fold(topology, data, experts, tensor):
    return fold_groups(topology, list_groups(make_mesh(data, experts, tensor)))


def test_a_groups_ranks_are_those_of_its_communicator():
    groups = list_groups(make_mesh(2, 3, 2))
    assert groups.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_one_group_is_the_topology_itself():
    topology = dataclasses.replace(
        make_topology(6, 3), rack_of_node=np.array([0, 0, 1]), rack_names=("r0", "r1"),
        bytes_per_second=np.arange(1.0, 10).reshape(3, 3), latency_seconds=np.arange(9.0).reshape(3, 3),
        egress_bytes_per_second=np.array([1.0, 2, 3]), ingress_bytes_per_second=np.array([4.0, 5, 6]),
        uplink_bytes_per_second=np.array([7.0, np.inf]),
    )  # fmt: skip
    nodes, fields = fold(topology, 1, 6, 1)
    assert nodes.tolist() == [[0, 1, 2]] and fields.pop("node_names") == topology.node_names
    for name, value in fields.items():
        assert np.array_equal(value, getattr(topology, name)), name


def test_tensor_parallel_ranks_share_their_nodes_links():
    """Two ranks of a node that hold one expert both get each token's row: a group has half of links and ports."""
    nodes, fields = fold(make_topology(8, 2), 1, 4, 2)
    assert nodes.tolist() == [[0, 1], [0, 1]] and fields["node_of_rank"].tolist() == [0, 0, 1, 1]
    assert fields["bytes_per_second"][0, 1] == pytest.approx(0.5e9)
    assert fields["egress_bytes_per_second"].tolist() == pytest.approx([0.5e9] * 2)
    assert fields["node_names"] == ("n0", "n1")


def test_groups_on_nodes_of_their_own_have_them_whole():
    topology = make_topology(8, 4)
    slow = topology.bytes_per_second.copy()
    slow[2, 3] = 2.5e8  # in the second group
    nodes, fields = fold(dataclasses.replace(topology, bytes_per_second=slow), 2, 4, 1)
    assert nodes.tolist() == [[0, 1], [2, 3]] and fields["node_names"] == ("n0+n2", "n1+n3")
    assert fields["bytes_per_second"][0, 1] == 2.5e8 and fields["bytes_per_second"][1, 0] == 1e9
    assert fields["egress_bytes_per_second"].tolist() == [1e9, 1e9]


def test_groups_that_lie_otherwise_are_cut_where_either_is():
    """Groups of three on nodes of two ranks: 0 0 1 and 1 2 2, of which no two ranks are together in both."""
    nodes, fields = fold(make_topology(6, 3), 2, 3, 1)
    assert nodes.tolist() == [[0, 0, 1], [1, 2, 2]] and fields["node_of_rank"].tolist() == [0, 1, 2]
    assert fields["egress_bytes_per_second"].tolist() == pytest.approx([0.5e9] * 3)  # one of a node's two ranks


def test_racks_differ_where_they_do_in_any_group():
    topology = dataclasses.replace(
        make_topology(4, 4), rack_of_node=np.array([0, 0, 0, 1]), rack_names=("r0", "r1"),
        uplink_bytes_per_second=np.array([6e8, 3e8]),
    )  # fmt: skip
    _, fields = fold(topology, 2, 2, 1)  # nodes 0 1 and 2 3
    assert fields["rack_of_node"].tolist() == [0, 1]
    assert fields["uplink_bytes_per_second"].tolist() == pytest.approx([2e8, 2e8])  # a third of one, or less


def test_the_least_room_of_all_groups_counts():
    groups = list_groups(make_mesh(2, 2, 2))
    rank_bytes = np.array([9, 8, 7, 6, 5, 9, 9, 9])
    assert fold_memory(rank_bytes, groups, np.array([0, 1]), 2).tolist() == [2 * 5, 2 * 6]
    assert fold_memory(rank_bytes, groups, np.array([0, 0]), 2).tolist() == [22]


def test_a_folded_node_asks_as_its_nodes_do_on_average():
    probability = np.array([[[1.0, 0], [0, 1], [0.5, 0.5]]])
    assert fold_probability(probability, np.array([[0, 2]])).tolist() == [[[1, 0], [0.5, 0.5]]]
    assert fold_probability(probability, np.array([[0, 1], [2, 2]])).tolist() == [[[0.75, 0.25], [0.25, 0.75]]]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.data())
def test_what_groups_carry_together_fits_the_links(data_parallel, experts, tensor, data):
    """When every rank sends as much to every other of its group, a link's folded time is its true time, or more."""
    size = data_parallel * experts * tensor
    topology = make_topology(size, data.draw(st.integers(1, size)))
    groups = list_groups(make_mesh(data_parallel, experts, tensor))
    nodes, fields = fold_groups(topology, groups)
    rows = np.zeros((topology.num_nodes,) * 2)
    for group in groups:
        np.add.at(rows, np.ix_(topology.node_of_rank[group], topology.node_of_rank[group]), 1)
    pairs = np.zeros((len(fields["node_names"]),) * 2)
    np.add.at(pairs, np.ix_(fields["node_of_rank"], fields["node_of_rank"]), 1)
    folded = pairs / fields["bytes_per_second"]
    for of_group in nodes:
        true = (rows / topology.bytes_per_second)[np.ix_(of_group, of_group)]
        assert (folded >= true * (1 - 1e-9)).all()
    assert folded.max() <= (rows / topology.bytes_per_second).max() * (1 + 1e-9)
