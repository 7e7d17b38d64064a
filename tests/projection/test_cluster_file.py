"""A cluster described in ten lines is the one that was meant; what cannot be is one line that says how to write it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from hpcmoe.cluster.topology import load_topology, save_topology
from hpcmoe.errors import ClusterError, ConfigError
from hpcmoe.projection.cluster_file import read_cluster
from hpcmoe.projection.processors import find_gpu
from hpcmoe.projection.units import parse_quantity

GOOD = """
racks = 2
uplink = "100 GB/s"
latency = "2 us"
[nodes]
count = 4
gpus = 8
gpu = "h100"
nic = "400 Gb/s"
"""


def describe(tmp_path, text):
    """Read a cluster.toml of a text."""
    (tmp_path / "cluster.toml").write_text(text)
    return read_cluster(tmp_path / "cluster.toml")


def rejected(tmp_path, text):
    """Read a cluster.toml that must be rejected -> its lines without the file."""
    with pytest.raises(ConfigError) as found:
        describe(tmp_path, text)
    return [line.removeprefix(f"{tmp_path}/cluster.toml: ") for line in str(found.value).splitlines()]


def test_a_cluster_of_one_kind_is_a_topology(tmp_path):
    cluster = describe(tmp_path, GOOD)
    topology = cluster.topology
    assert str(topology) == "32 ranks on 4 nodes in 2 racks"
    assert topology.rack_of_node.tolist() == [0, 0, 1, 1]
    assert topology.bytes_per_second.tolist() == [
        [450e9, 50e9, 50e9, 50e9], [50e9, 450e9, 50e9, 50e9], [50e9, 50e9, 450e9, 50e9], [50e9, 50e9, 50e9, 450e9],
    ]  # fmt: skip
    assert (topology.egress_bytes_per_second == 50e9).all() and (topology.uplink_bytes_per_second == 100e9).all()
    assert (topology.latency_seconds == 2e-6 * (1 - np.eye(4))).all()
    assert (topology.device_memory_bytes == 640e9).all() and cluster.processors[3].name == "H100"


def test_the_example_has_two_kinds_of_nodes_and_uplinks_as_a_ratio():
    cluster = read_cluster(ROOT / "inputs" / "cluster.toml")
    topology = cluster.topology
    assert (topology.num_nodes, len(topology.node_of_rank), topology.num_racks) == (16, 128, 2)
    assert [processor.name for processor in cluster.processors] == ["H100"] * 12 + ["A100"] * 4
    assert topology.uplink_bytes_per_second.tolist() == [8 * 400e9 / 2, (4 * 400e9 + 4 * 200e9) / 2]
    assert topology.bytes_per_second[0, 15] == 200e9 and topology.bytes_per_second[0, 1] == 400e9
    assert len((ROOT / "inputs" / "cluster.toml").read_text().split("\n\n")[0].splitlines()) <= 10


def test_figures_by_hand_replace_those_of_the_sheet(tmp_path):
    own = describe(tmp_path, GOOD + 'memory = "40 GiB"\nwithin = "100 GB/s"\nhost_memory = "1 TiB"\n')
    processor = own.processors[0]
    assert processor.memory_bytes == 40 * 2**30 and processor.flops == find_gpu("H100", "").flops
    assert (np.diag(own.topology.bytes_per_second) == 100e9).all() and own.topology.memory_bytes[0] == 2**40
    assert processor.source == "NVIDIA H100 SXM data sheet, memory, within as given"
    figures = 'flops = "200 TFLOP/s"\nmemory_rate = "2 TB/s"\nmemory = "64 GB"\n'
    by_hand = describe(tmp_path, GOOD.replace('gpu = "h100"\n', "") + figures).processors[0]
    assert (by_hand.peak("bfloat16"), by_hand.memory_bytes_per_second) == (200e12, 2e12)


def test_nodes_of_cores_say_what_is_taken(tmp_path):
    cluster = describe(tmp_path, '[nodes]\ncount = 1\ncores = 16\nmemory = "64 GiB"\n')
    assert cluster.topology.memory_bytes.tolist() == [64 * 2**30]
    assert cluster.processors[0].source == "as given, flops, memory_rate not given and taken"
    assert cluster.topology.source["links"].endswith("latency not given, taken as 5 us")
    assert (cluster.topology.egress_bytes_per_second > 0).all() and len(cluster.topology.node_of_rank) == 16


def test_a_topology_of_a_run_is_read_as_it_is_and_cut(tmp_path):
    whole = describe(tmp_path, GOOD).topology
    save_topology(whole, tmp_path / "topology.json")
    cluster = read_cluster(tmp_path / "topology.json")
    assert (cluster.topology.bytes_per_second == whole.bytes_per_second).all() and cluster.processors == (None,) * 4
    cut = cluster.resize(2)
    save_topology(cut.topology, tmp_path / "cut.json")
    assert load_topology(tmp_path / "cut.json").num_racks == 1 and len(cut.topology.node_of_rank) == 16
    with pytest.raises(ConfigError, match=r"5 nodes: the topology.json of a run has 4"):
        cluster.resize(5)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ClusterError, match="not a topology file"):
        read_cluster(tmp_path / "bad.json")


@given(st.integers(1, 300))
def test_a_described_cluster_grows_in_proportion(num_nodes):
    cluster = read_cluster(ROOT / "inputs" / "cluster.toml").resize(num_nodes)
    assert cluster.topology.num_nodes == num_nodes == len(cluster.processors)
    counts = [[p.name for p in cluster.processors].count(name) for name in ("H100", "A100")]
    assert abs(counts[0] - 0.75 * num_nodes) <= 0.5 and cluster.topology.num_racks == -(-num_nodes // 8)
    assert np.bincount(cluster.topology.rack_of_node).max() <= 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('gpu = "h100"', 'gpu = "H10"'), "gpu = 'H10': is not in the sheet; did you mean H100?; or give flops"),
        (('nic = "400 Gb/s"', ""), "[[nodes]] 1: nic: missing; what a node sends"),
        (('nic = "400 Gb/s"', 'nic = "400 Gx/s"'), "[nodes] nic = '400 Gx/s': must be a number above 0 with its unit"),
        (('nic = "400 Gb/s"', 'nic = "0 Gb/s"'), "[nodes] nic = '0 Gb/s': must be a number above 0"),
        (('nic = "400 Gb/s"', "nic = nan"), "[nodes] nic = nan: must be a number above 0"),
        (('nic = "400 Gb/s"', "nic = true"), "[nodes] nic = true: must be a number above 0"),
        (('nic = "400 Gb/s"', 'nicc = "400 Gb/s"'), "[nodes] nicc = '400 Gb/s': unknown key; did you mean nic?"),
        (("racks = 2", "rack = 2"), "rack = 2: unknown key; did you mean racks?"),
        (("racks = 2", "racks = 0"), "racks = 0: must be greater than or equal to 1"),
        (("racks = 2", "racks = 5"), "racks = 5: must be at most the 4 nodes"),
        (("count = 4", "count = 4.5"), "[nodes] count = 4.5: must be a valid integer"),
        (("count = 4\n", ""), "[nodes] count: missing"),
        (("count = 4", "count = 5000"), "5000 nodes: must be at most 4096"),
        (("gpus = 8", "gpus = 8\ncores = 8"), "[nodes] gpus or cores: must have one of them, of a node"),
        (("gpus = 8", "cores = 8"), "[nodes] gpu = 'h100': needs gpus, not cores"),
        (('gpu = "h100"', 'flops = "1 TFLOP/s"'), "[nodes] gpu: missing; a name such as \"H100\", or flops"),
        (('uplink = "100 GB/s"', 'uplink = "2/1"'), "uplink = '2/1': must be a number above 0 with its unit"),
        (('uplink = "100 GB/s"', 'uplink = "0:1"'), "uplink = '0:1': must be above 0"),
        (('latency = "2 us"', 'latency = "-2 us"'), "latency = '-2 us': must be a number 0 or above with its unit"),
        (("[nodes]", "[node]"), "nodes = null: must be a table [nodes], or [[nodes]] for each kind"),
        (("[nodes]", "nodes = 4\n[more]"), "nodes = 4: must be a table"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, change, said):
    assert change[0] in GOOD
    (line,) = rejected(tmp_path, GOOD.replace(*change))
    assert line.startswith(said)


def test_every_key_at_fault_has_a_line(tmp_path):
    text = GOOD.replace("[nodes]", "[[nodes]]") + '[[nodes]]\ncount = 0\ngpus = 2\ngpu = "A100"\nnic = 1\ncolour = 2\n'
    lines = rejected(tmp_path, "racks = []\n" + text.replace("racks = 2\n", ""))
    assert [line.split(" = ")[0] for line in lines] == ["racks", "[[nodes]] 2: count", "[[nodes]] 2: colour"]


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("400 Gb/s", "bytes_per_second", 50e9), ("400Gbps", "bytes_per_second", 50e9), (2e9, "bytes_per_second", 2e9),
        ("1 GiB/s", "bytes_per_second", 2**30), ("3.2 Tbit/s", "bytes_per_second", 4e11), ("2 us", "seconds", 2e-6),
        ("2 µs", "seconds", 2e-6), ("0 s", "seconds", 0.0), ("1e-6 s", "seconds", 1e-6), ("1 TB", "bytes", 1e12),
        ("80 GiB", "bytes", 80 * 2**30), ("990 TFLOP/s", "flops", 990e12), ("1 PFLOPS", "flops", 1e15),
    ],
)  # fmt: skip
def test_quantities_have_the_units_that_people_write(text, kind, number):
    assert parse_quantity(text, kind) == pytest.approx(number)


@given(
    st.one_of(st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.none()),
    st.sampled_from(["bytes", "seconds"]),
)
def test_any_other_value_is_rejected(value, kind):
    try:
        number = parse_quantity(value, kind)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(number) and number >= 0


def test_every_gpu_of_the_sheet_has_figures_that_can_be():
    from hpcmoe.projection import processors

    for name in processors._SHEET:
        gpu = find_gpu(name.upper(), "")
        assert 10e12 < gpu.peak("float32") <= gpu.peak("bfloat16") <= gpu.peak("float8") < 1e16
        assert 1e11 < gpu.memory_bytes_per_second < 1e13 and 16e9 <= gpu.memory_bytes <= 300e9
        assert 1e10 < gpu.link_bytes_per_second <= 1e12 and "data sheet" in gpu.source
