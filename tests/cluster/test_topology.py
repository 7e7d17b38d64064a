"""A topology and its file: it comes back whole, in this version and from earlier ones, or is rejected in one line."""

import dataclasses
import json

import numpy as np
import pytest
from cluster.example import example
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster import topology as nodes
from hpcmoe.cluster.topology import Topology, load_topology, save_topology
from hpcmoe.errors import ClusterError


def assert_same(a, b):
    """Check that two topologies are equal in every field."""
    for field in dataclasses.fields(Topology):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_ports_are_the_fastest_links_where_no_more_is_known():
    egress, ingress = nodes.find_port_maxima(np.array([[99.0, 1, 2], [3, 99, 4], [7, 6, 99]]))
    assert (egress.tolist(), ingress.tolist()) == ([2, 4, 7], [7, 6, 4])
    assert [port.tolist() for port in nodes.find_port_maxima(np.array([[99.0]]))] == [[99], [99]]


def test_a_saved_topology_comes_back_whole(tmp_path):
    save_topology(example(), tmp_path / "topology.json")
    assert_same(load_topology(tmp_path / "topology.json"), example())
    assert [file.name for file in tmp_path.iterdir()] == ["topology.json"]


@given(st.permutations(range(6)), st.lists(st.floats(1e-300, 1e300) | st.just(np.inf), min_size=2, max_size=2))
def test_any_numbering_of_ranks_and_any_uplink_come_back(tmp_path_factory, order, uplinks):
    made = dataclasses.replace(
        example(), node_of_rank=np.array([0, 0, 0, 1, 1, 2])[order], uplink_bytes_per_second=np.array(uplinks)
    )
    path = tmp_path_factory.getbasetemp() / "any.json"
    save_topology(made, path)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON knows no Infinity
    assert_same(load_topology(path), made)


def test_a_saved_topology_is_readable_by_names(tmp_path):
    save_topology(example(), tmp_path / "topology.json")
    text = (tmp_path / "topology.json").read_text()
    tree = json.loads(text)
    assert tree["nodes"]["n1"]["rack"] == "right"
    assert tree["nodes"]["n0"]["ranks"] == [0, 2, 5]
    assert tree["nodes"]["n2"]["ingress_bytes_per_second"] == 7.5
    assert tree["uplink_bytes_per_second"] == {"left": 1.25, "right": None}
    assert tree["latency_seconds"]["n1"]["n2"] == pytest.approx(16e-6)
    assert len(text.splitlines()) < 28


def test_a_file_of_an_earlier_version_gives_its_fastest_links_for_ports_and_no_uplinks(tmp_path):
    save_topology(example(), tmp_path / "topology.json")
    tree = json.loads((tmp_path / "topology.json").read_text())
    del tree["uplink_bytes_per_second"]
    for node in tree["nodes"].values():
        del node["egress_bytes_per_second"], node["ingress_bytes_per_second"]
    (tmp_path / "topology.json").write_text(json.dumps(tree))

    loaded, egress_ingress = (
        load_topology(tmp_path / "topology.json"),
        nodes.find_port_maxima(example().bytes_per_second),
    )
    np.testing.assert_array_equal((loaded.egress_bytes_per_second, loaded.ingress_bytes_per_second), egress_ingress)
    assert np.isinf(loaded.uplink_bytes_per_second).all()
    assert loaded.source == {"links": "measured", "ports": nodes.PORTS_TAKEN, "uplinks": nodes.NO_UPLINKS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a topology"),
        ("{}", "not a topology"),
        ('{"nodes": {}}', "not a topology"),
        ('{"nodes": {"n0": {}}}', "not a topology"),
        ('{"nodes": [1]}', "not a topology"),
        ("\xff", "not a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_topology_is_rejected(tmp_path, text, said):
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    with pytest.raises(ClusterError, match=f"bad.json: {said}"):
        load_topology(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("nodes", "n0", "ranks"), [0, 0, 5]),
        (("nodes", "n0", "ranks"), [0, 2, 7]),
        (("nodes", "n0", "ranks"), 3),
        (("nodes", "n0", "ranks"), ["a", 2, 5]),
        (("nodes", "n0", "memory_bytes"), 10**40),
        (("nodes", "n1", "rack"), ["left"]),
        (("nodes", "n1", "egress_bytes_per_second"), None),
        (("nodes", "n1", "ingress_bytes_per_second"), "fast"),
        (("uplink_bytes_per_second",), {"left": 3}),
        (("uplink_bytes_per_second",), 3),
        (("uplink_bytes_per_second", "left"), {}),
        (("bytes_per_second", "n0"), {}),
        (("latency_seconds", "n0", "n1"), [1, 2]),
        (("source",), 3),
        (("source",), None),
        (("nodes", "n0"), None),
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_one_line(tmp_path, keys, value):
    save_topology(example(), tmp_path / "bad.json")
    tree = json.loads((tmp_path / "bad.json").read_text())
    entry = tree
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    with pytest.raises(ClusterError, match="bad.json: not a topology file") as rejected:
        load_topology(tmp_path / "bad.json")
    assert len(str(rejected.value).splitlines()) == 1


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(ClusterError, match="none.json: cannot be read: No such file"):
        load_topology(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="topology.json: cannot be written: Not a directory"):
        save_topology(example(), tmp_path / "file" / "topology.json")
