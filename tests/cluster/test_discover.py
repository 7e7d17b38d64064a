"""Where the ranks are, and how each fact is found."""

import dataclasses
import json
import logging
import os
import re
import sys
import types

import numpy as np
import pytest
from launch import MPIRUN, run

from hpcmoe.cluster import discover as chapter
from hpcmoe.cluster.discover import RankInfo, make_cluster_layout, make_topology, read_topology
from hpcmoe.cluster.topology import ClusterLinks, Topology
from hpcmoe.config import ClusterConfig
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all

LAUNCHERS = ("PMI_HOSTNAME", "SLURMD_NODENAME", *(key for key in os.environ if key.startswith("SLURM_")))


@pytest.fixture
def alone(monkeypatch):
    for key in LAUNCHERS:
        monkeypatch.delenv(key, raising=False)
    return monkeypatch


def info(leader=0, **facts):
    """Make what a rank sees, on a plain node but for the facts given."""
    plain = {"name": "vm", "address": "", "memory_bytes": 10**9, "devices": frozenset(), "cores": frozenset({0})}
    return RankInfo(leader=leader, **(plain | facts))


def topology_of(infos, cluster=None):
    """Make the topology of infos, with all links measured as 1."""
    layout = make_cluster_layout(infos, cluster or ClusterConfig())
    nodes, racks = len(layout.node_names), len(layout.rack_names)
    ones = ClusterLinks(
        bytes_per_second=np.ones((nodes, nodes)), latency_seconds=np.ones((nodes, nodes)),
        egress_bytes_per_second=np.ones(nodes), ingress_bytes_per_second=np.ones(nodes),
        uplink_bytes_per_second=np.ones(racks),
    )  # fmt: skip
    return make_topology(layout, cluster or ClusterConfig(), ones)


@pytest.fixture
def rank_0():
    """Rank 0, for what logs."""
    return types.SimpleNamespace(rank=0)


def assert_same(a, b):
    """Check that two topologies are equal in every field."""
    for field in dataclasses.fields(Topology):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


# Nodes, memory, devices, cores


def test_the_launcher_names_the_node_before_slurm_does(alone):
    alone.setattr(chapter.MPI, "Get_processor_name", lambda: "vm")
    assert chapter.read_host_name() == "vm"
    alone.setenv("SLURMD_NODENAME", "node7")
    assert chapter.read_host_name() == "node7"
    alone.setenv("PMI_HOSTNAME", "n0")
    assert chapter.read_host_name() == "n0"


def test_nodes_are_numbered_by_their_lowest_rank_and_named_apart():
    made = topology_of([info(0, name="b"), info(1, name="a"), info(0, name="b"), info(3, name="a"), info(1, name="a")])
    assert made.node_of_rank.tolist() == [0, 1, 0, 2, 1]
    assert made.node_names == ("b", "a", "a.1")
    assert made.ranks_of_node(1).tolist() == [1, 4]
    assert made.num_nodes == 3


def test_names_stay_apart_when_a_number_is_taken():
    assert chapter.distinct(["a", "a.1", "a", "a"]) == ("a", "a.1", "a.2", "a.3")


def test_memory_is_the_node_s_least_or_the_config_s():
    infos = [info(0, memory_bytes=5), info(0, memory_bytes=4), info(2, memory_bytes=7)]
    assert topology_of(infos).memory_bytes.tolist() == [4, 7]
    assert topology_of(infos).source["memory"] == "system"
    made = topology_of(infos, ClusterConfig(memory_bytes_per_node=3))
    assert (made.memory_bytes.tolist(), made.source["memory"]) == ([3, 3], "config")


def test_cores_and_devices_are_those_that_a_node_s_ranks_see_together():
    made = topology_of(
        [
            info(0, cores=frozenset({0, 1}), devices=frozenset({"0"})),
            info(0, cores=frozenset({1, 2}), devices=frozenset({"1"})),
            info(2, cores=frozenset({0})),
        ]
    )
    assert made.cores_of_node.tolist() == [3, 1]
    assert made.devices_of_node.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("present", "environ", "seen"),
    [
        (0, {}, 0),
        (4, {}, 4),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, 0),  # no driver
        (4, {"CUDA_VISIBLE_DEVICES": ""}, 0),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        (4, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        (4, {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, 4),  # each task has a 0 of its own
        (4, {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}, 0),
    ],
)
def test_devices_are_those_present_and_visible(alone, present, environ, seen):
    alone.setattr(chapter, "count_cuda_devices", lambda: present)
    alone.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for key, value in environ.items():
        alone.setenv(key, value)
    assert len(chapter.visible_devices()) == seen


@pytest.mark.parametrize(
    ("environ", "usable"),
    [
        ({}, 10**12),
        ({"NODE": "0"}, 10**12),
        ({"NODE": ""}, 10**12),
        ({"NODE": "100"}, 100 << 20),
        ({"NODE": "16G"}, 16 << 30),
        ({"NODE": "4096M", "CPU": "0"}, 4096 << 20),
        ({"NODE": "9T"}, 10**12),  # more than there is
        ({"CPU": "2G", "CPUS_ON_NODE": "8"}, 16 << 30),
        ({"CPU": "2048", "JOB_CPUS_PER_NODE": "4(x4)", "NODEID": "3"}, 8 << 30),
        ({"CPU": "1G", "JOB_CPUS_PER_NODE": "72(x2),36", "NODEID": "1"}, 72 << 30),
        ({"CPU": "1G", "JOB_CPUS_PER_NODE": "72(x2),36", "NODEID": "2"}, 36 << 30),
        ({"CPU": "1G", "JOB_CPUS_PER_NODE": "72(x2),36"}, 36 << 30),  # the least, where the node has no number
        ({"CPU": "1G"}, 10**12),  # of how many is not told
        ({"GPU": "40G", "GPUS_ON_NODE": "4"}, 160 << 30),
    ],
)
def test_slurm_s_memory_counts_where_it_is_less(alone, environ, usable):
    alone.setattr(chapter, "read_memory_bytes", lambda: 10**12)
    for what, value in environ.items():
        alone.setenv(f"SLURM_MEM_PER_{what}" if what in ("NODE", "CPU", "GPU") else f"SLURM_{what}", value)
    assert chapter.usable_memory_bytes() == usable


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SLURM_MEM_PER_NODE", "lots"),
        ("SLURM_MEM_PER_NODE", "-1"),
        ("SLURM_MEM_PER_CPU", "16X"),
        ("SLURM_CPUS_ON_NODE", "4(x4)"),
        ("SLURM_JOB_CPUS_PER_NODE", "four"),
        ("SLURM_NODEID", "a"),
        ("SLURM_GPUS_ON_NODE", "gpu:2"),
    ],
)
def test_a_variable_that_holds_nonsense_is_named(alone, key, value):
    alone.setenv(key, value)
    with pytest.raises(ClusterError, match=re.escape(f"the environment's {key} = '{value}': must be ")):
        chapter.make_rank_info(0)


@pytest.mark.mpi
def test_nonsense_that_one_rank_sees_is_refused_by_all(comm, alone):
    if comm.rank == comm.size - 1:
        alone.setenv("SLURM_MEM_PER_NODE", "lots")
    with pytest.raises(ClusterError, match=rf"^\[rank {comm.size - 1} of .* SLURM_MEM_PER_NODE = 'lots'") as rejected:
        read_topology(comm, ClusterConfig(measure_seconds=0.1))
    assert rejected.value.shared


def make_infos_with(*quotas, cores=8):
    """RankInfo ranks on one node under these quotas, outermost first."""
    return [info(0, cores=frozenset(range(cores)), cpu_quotas=quota) for quota in quotas]


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ([(), ()], 8),
        ([(("job", 3.0),)] * 4, 3),  # they share one group's
        ([(("a", 2.0),), (("b", 1.5),)], 3),  # steps, or containers, of their own
        ([(("job", 3.0), ("a", 2.0)), (("job", 3.0), ("b", 2.0))], 3),  # within a job's
        ([(("job", 6.0), ("a", 2.0)), (("job", 6.0), ("b", 2.5))], 4),
        ([(("a", 0.5),)], 1),
        ([(("a", 0.0),)], 1),
        ([(("a", 2.0),), ()], 8),  # one is free
        ([(("a", 100.0),)], 8),
        ([(("a", 0.1 * 30),)], 3),  # 3.0000000000000004, or as much less
    ],
)
def test_quotas_of_processor_time_bound_the_cores_of_a_node(quotas, cores):
    assert topology_of(make_infos_with(*quotas)).cores_of_node.tolist() == [cores]


def test_quotas_and_affinity_are_added_up_group_by_group():
    ranks = [
        info(0, cores=frozenset({0}), cpu_quotas=(("a", 4.0),)),  # bound to one core of its four
        info(0, cores=frozenset({1, 2, 3}), cpu_quotas=(("b", 2.0),)),
    ]
    assert topology_of(ranks).cores_of_node.tolist() == [3]


# Racks

FOUR = ("s.r0.n0", "s.r0.n1", "s.r1.n2", "s.r1.n3")


def make_infos_at(addresses):
    """RankInfo one rank on each of the nodes n0, n1, ... under these addresses."""
    return [info(rank, name=f"n{rank}", address=address) for rank, address in enumerate(addresses)]


def test_racks_of_the_config_come_first(alone):
    made = topology_of(make_infos_at(FOUR), ClusterConfig(racks=("b", "a", "b", "a")))
    assert (made.rack_names, made.rack_of_node.tolist()) == (("b", "a"), [0, 1, 0, 1])
    assert (made.num_racks, made.source["racks"]) == (2, "config")


def test_racks_for_another_number_of_nodes_are_rejected():
    with pytest.raises(ClusterError, match=r"\[cluster\] racks has 3 entries, the run has 4 nodes"):
        topology_of(make_infos_at(FOUR), ClusterConfig(racks=("a", "a", "b")))


def test_racks_are_read_from_slurm_s_addresses(alone):
    made = topology_of(make_infos_at(FOUR))
    assert (made.rack_names, made.rack_of_node.tolist()) == (("r0", "r1"), [0, 0, 1, 1])
    assert made.source["racks"] == "SLURM_TOPOLOGY_ADDR"


def test_racks_that_nobody_tells_are_one():
    made = topology_of(make_infos_at(("",) * 3))
    assert (made.rack_names, made.source["racks"]) == (("rack0",), "no word of racks: one for all")


def test_links_that_are_given_are_taken_with_their_sources(tmp_path):
    file = tmp_path / "links.json"
    file.write_text('{"bytes_per_second": [[9, 2], [3, 9]]}')
    keys = ClusterConfig(links=str(file), racks=("a", "b"))
    made = topology_of([info(0), info(1)], keys)
    assert made.egress_bytes_per_second.tolist() == [2, 3]
    assert made.uplink_bytes_per_second.tolist() == [np.inf, np.inf]
    assert (made.source["racks"], made.source["links"]) == ("config", f"file {file}; latency not given, taken as 0")


def test_slow_links_are_told_by_name_a_few_of_them(rank_0, caplog):
    made = topology_of([info(rank, name=f"n{rank}") for rank in range(6)])
    rates = np.full((6, 6), 100.0)
    rates[2, 3] = 20.0
    with caplog.at_level(logging.INFO):
        chapter.log_slow_links(dataclasses.replace(made, bytes_per_second=rates))
        rates[4, :4] = 10.0
        rates[5, :2] = 15.0
        chapter.log_slow_links(dataclasses.replace(made, bytes_per_second=rates))
        chapter.log_slow_links(made)
    kind = "links far slower than the median of their kind, in a rack or between: "
    few, many = (record.getMessage() for record in caplog.records)
    assert few == f"{kind}n2 to n3 (20%)"
    assert many == f"{kind}n4 to n0 (10%), n4 to n1 (10%), n4 to n2 (10%), n4 to n3 (10%), n5 to n0 (15%) and 2 more"


# All ranks together


@pytest.mark.mpi
def test_all_ranks_read_the_same_topology(comm):
    made = read_topology(comm, ClusterConfig(measure_seconds=0.5))
    for other in gather_to_all(comm, made):
        assert_same(other, made)
    assert made.node_of_rank.shape == (comm.size,)
    assert sorted({int(node) for node in made.node_of_rank}) == list(range(made.num_nodes))
    assert (made.memory_bytes > 2**20).all() and (made.cores_of_node >= 1).all()
    assert (made.source["nodes"], made.source["links"]) == ("MPI split by shared memory", "measured")
    assert (made.source["ports"], made.source["uplinks"]) == ("measured", "measured")


@pytest.mark.mpi
def test_all_ranks_share_the_refusal_of_links_that_do_not_fit(comm, shared):
    size, file = comm.size + 1, shared / "links.json"  # more nodes than there can be
    if comm.rank == 0:
        file.write_text(json.dumps({"bytes_per_second": [[1] * size] * size}))
    with pytest.raises(
        ClusterError, match=rf"^\[cluster\] links = .*is {size} x {size}, the run has \d+ nodes"
    ) as rejected:
        read_topology(comm, ClusterConfig(links=str(file)))
    assert rejected.value.shared


PRINT = """
from mpi4py import MPI
from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.config import ClusterConfig
made = read_topology(MPI.COMM_WORLD, ClusterConfig(measure_seconds=0.5))
assert made.node_names[made.node_of_rank[MPI.COMM_WORLD.rank]] == read_host_name()
if MPI.COMM_WORLD.rank == 0:
    print(made.node_names, made.node_of_rank.tolist(), bool((made.bytes_per_second > 1e6).all()))
"""


def test_the_launcher_s_nodes_are_the_topology_s(alone):
    if "HYDRA" not in run(MPIRUN, "--version").output:
        pytest.skip("only MPICH takes its nodes from the launcher, and not from the one machine's name")
    ended = run(MPIRUN, "-launcher", "fork", "-hosts", "n0,n1", "-ppn", 2, "-n", 4, sys.executable, "-c", PRINT)
    assert (ended.status, ended.output) == (0, "('n0', 'n1') [0, 0, 1, 1] True\n"), ended
