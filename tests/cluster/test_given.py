"""Links of a file, by hand or of an earlier run: taken by name, guessed where left out, rejected in a conflict."""

import dataclasses
import json

import numpy as np
import pytest
from cluster.example import example
from launch import ROOT

from hpcmoe.cluster.given import read_links
from hpcmoe.cluster.topology import NO_UPLINKS, PORTS_TAKEN, save_topology
from hpcmoe.errors import ClusterError

EVEN = ((1.0, 1.0), (1.0, 1.0))


def take(folder, **lists):
    """Write a file by hand, then read links from it."""
    (folder / "links.json").write_text(json.dumps(lists))
    return read_links("links.json", ("n0", "n1"), ("left", "right"))


def take_saved(folder, saved, nodes=("n0", "n1"), racks=("left", "right")):
    """Save a topology, then read links from its file."""
    save_topology(saved, folder / "topology.json")
    return read_links(str(folder / "topology.json"), nodes, racks)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that messages need not name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_one_of_two_nodes_in_a_rack():
    links, source = read_links(ROOT / "inputs" / "links.json", ("a", "b"), ("rack",))
    assert links.bytes_per_second.tolist() == [[2e10, 1e9], [1e9, 2e10]] and links.uplink_bytes_per_second == [np.inf]
    assert set(source.values()) == {f"file {ROOT / 'inputs' / 'links.json'}"}


def test_links_by_hand_are_taken_as_they_are(here):
    links, source = take(
        here,
        bytes_per_second=((1e9, 1e8), (2e8, 1e9)), latency_seconds=((0.0, 1e-5), (2e-5, 0.0)),
        egress_bytes_per_second=(3e8, 4e8), ingress_bytes_per_second=(5e8, 6e8), uplink_bytes_per_second=(7e8, 8e8),
    )  # fmt: skip
    assert links.bytes_per_second.tolist() == [[1e9, 1e8], [2e8, 1e9]]
    assert links.latency_seconds.tolist() == [[0, 1e-5], [2e-5, 0]]
    assert links.egress_bytes_per_second.tolist() == [3e8, 4e8]
    assert links.ingress_bytes_per_second.tolist() == [5e8, 6e8]
    assert links.uplink_bytes_per_second.tolist() == [7e8, 8e8]
    assert source == dict.fromkeys(("links", "ports", "uplinks"), "file links.json")


def test_what_the_file_leaves_out_is_guessed_and_said_to_be(here):
    links, source = take(here, bytes_per_second=((9.0, 1.0), (2.0, 9.0)))
    assert not links.latency_seconds.any()
    assert links.egress_bytes_per_second.tolist() == [1, 2]
    assert links.ingress_bytes_per_second.tolist() == [2, 1]
    assert np.isinf(links.uplink_bytes_per_second).all()
    assert source == {
        "links": "file links.json; latency not given, taken as 0", "ports": f"file links.json; {PORTS_TAKEN}",
        "uplinks": NO_UPLINKS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bytes_per_second": ((1.0,) * 3,) * 3}, "links.json: bytes_per_second is 3 x 3, the run has 2 nodes"),
        ({"bytes_per_second": ((1.0, 1.0), (1.0,))}, "links.json: bytes_per_second is 2 x 1 or 2, the run has 2 nodes"),
        (
            {"bytes_per_second": ((1.0, 0.0), (1.0, 1.0))},
            "links.json: bytes_per_second: entry [0][1] = 0, n0 to n1, must be finite and above 0",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (-2e9, 1.0))},
            "links.json: bytes_per_second: entry [1][0] = -2e+09, n1 to n0, must be finite and above 0",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (1.0, float("nan")))},
            "links.json: bytes_per_second: entry [1][1] = nan, n1 to n1, must be finite and above 0",
        ),
        (
            {"latency_seconds": ((0.0, -1.0), (0.0, 0.0))},
            "links.json: latency_seconds: entry [0][1] = -1, n0 to n1, must be finite and 0 or above",
        ),
        ({"latency_seconds": ((0.0,),)}, "links.json: latency_seconds is 1 x 1, the run has 2 nodes"),
        (
            {"egress_bytes_per_second": (1.0,)},
            "links.json: egress_bytes_per_second has 1 entries, the run has 2 nodes",
        ),
        (
            {"egress_bytes_per_second": (1.0, 0.0)},
            "links.json: egress_bytes_per_second: entry [1] = 0, n1, must be finite and above 0",
        ),
        (
            {"ingress_bytes_per_second": (float("inf"), 1.0)},
            "links.json: ingress_bytes_per_second: entry [0] = inf, n0, must be finite and above 0",
        ),
        (
            {"uplink_bytes_per_second": [1, "fast"]},
            "links.json: uplink_bytes_per_second: entry [1] = 'fast': must be a number",
        ),
        (
            {"latency_seconds": [[0, True], [0, 0]]},
            "links.json: latency_seconds: entry [0][1] = true: must be a number",
        ),
        (
            {"bytes_per_second": [[10**400, 1], [1, 1]]},
            "links.json: bytes_per_second: entry [0][0] = a whole number of 1329 bits: must be a number",
        ),
        (
            {"bytes_per_second": [[None, 1], [1, 1]]},
            "links.json: bytes_per_second: entry [0][0] = inf, n0 to n0, must be finite and above 0",
        ),
        ({"bytes_per_second": "fast"}, "links.json: bytes_per_second must be a list of lists"),
        ({"latency_seconds": 3}, "links.json: latency_seconds must be a list of lists"),
        ({"latency": [[0, 1], [1, 0]]}, "links.json: latency: unknown key; did you mean latency_seconds?"),
        (
            {"uplink_bytes_per_second": (1.0,) * 3},
            "links.json: uplink_bytes_per_second has 3 entries, the run has 2 racks",
        ),
        (
            {"uplink_bytes_per_second": (1.0, -1.0)},
            "links.json: uplink_bytes_per_second: entry [1] = -1, right, must be above 0",
        ),
    ],
)
def test_links_by_hand_that_do_not_fit_are_rejected(here, keys, message):
    with pytest.raises(ClusterError) as rejected:
        take(here, **{"bytes_per_second": EVEN} | keys)
    assert str(rejected.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "bytes_per_second: missing; must be a list of lists, or the file a topology.json"),
        ('{"bytes_per_second": []}', "bytes_per_second: missing; must be a list of lists, or the file a topology.json"),
        ('{"bytes_per_seconds": [[1]]}', "bytes_per_seconds: unknown key; did you mean bytes_per_second?"),
        ("[[1, 1], [1, 1]]", "must hold one JSON object, not [[1, 1], [1, 1]]"),
        ('{"bytes_per_second": 1, "bytes_per_second": 2}', "bytes_per_second: stands 2 times, must stand once"),
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_file_that_is_neither_by_hand_nor_a_topology_is_rejected(here, text, message):
    (here / "links.json").write_text(text)
    with pytest.raises(ClusterError) as rejected:
        read_links("links.json", ("n0", "n1"), ("left", "right"))
    assert str(rejected.value) == f"links.json: {message}"


def test_links_of_an_earlier_run_are_found_by_the_names_of_nodes_and_racks(tmp_path):
    links, source = take_saved(tmp_path, example(), nodes=("n2", "n1"), racks=("right", "left"))
    np.testing.assert_array_equal(links.bytes_per_second, example().bytes_per_second[[[2], [1]], [2, 1]])
    np.testing.assert_array_equal(links.latency_seconds, example().latency_seconds[[[2], [1]], [2, 1]])
    assert links.egress_bytes_per_second.tolist() == [4.5, 3.5]
    assert links.ingress_bytes_per_second.tolist() == [7.5, 6.5]
    assert links.uplink_bytes_per_second.tolist() == [np.inf, 1.25]
    assert source == dict.fromkeys(("links", "ports", "uplinks"), f"file {tmp_path / 'topology.json'}")


def test_what_the_file_s_own_run_had_to_guess_is_still_said(tmp_path):
    guessed = dataclasses.replace(example(), source={"ports": f"config; {PORTS_TAKEN}", "uplinks": NO_UPLINKS})
    _, source = take_saved(tmp_path, guessed)
    path = tmp_path / "topology.json"
    assert (source["ports"], source["uplinks"]) == (f"file {path}; {PORTS_TAKEN}", f"file {path}; {NO_UPLINKS}")


def test_a_rack_that_the_file_does_not_know_has_no_limit(tmp_path):
    links, source = take_saved(tmp_path, example(), racks=("left", "middle"))
    assert links.uplink_bytes_per_second.tolist() == [1.25, np.inf]
    assert source["uplinks"] == f"file {tmp_path / 'topology.json'}; of middle {NO_UPLINKS}"


def test_nodes_are_found_with_a_domain_or_without_and_what_may_be_several_is_named(tmp_path):
    links, _ = take_saved(tmp_path, example(), nodes=("n1.cluster.local", "n0"))
    assert links.bytes_per_second.tolist() == example().bytes_per_second[np.ix_([1, 0], [1, 0])].tolist()
    domains = dataclasses.replace(example(), node_names=("n0.a", "n0.b", "n2.a"))
    with pytest.raises(
        ClusterError, match=r"has no links of n0 \(n0 may be n0.a or n0.b\); the run's nodes are n0, n2"
    ):
        take_saved(tmp_path, domains, nodes=("n0", "n2"))


def test_nodes_that_the_file_lacks_are_named(tmp_path):
    with pytest.raises(
        ClusterError, match=r"has no links of n7, n8; the run's nodes are n0, n7, n8, the file's n0, n1"
    ):
        take_saved(tmp_path, example(), nodes=("n0", "n7", "n8"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bytes_per_second": np.zeros((3, 3))},
            "bytes_per_second: entry [0][0] = 0, n0 to n0, must be finite and above 0",
        ),
        (
            {"latency_seconds": np.full((3, 3), np.nan)},
            "latency_seconds: entry [0][0] = nan, n0 to n0, must be finite and 0 or",
        ),
        ({"egress_bytes_per_second": np.full(3, -1.0)}, "egress_bytes_per_second: entry [0] = -1, n0, must be finite"),
        ({"ingress_bytes_per_second": np.full(3, np.inf)}, "ingress_bytes_per_second: entry [0] = inf, n0, must be"),
        ({"uplink_bytes_per_second": np.zeros(2)}, "uplink_bytes_per_second: entry [0] = 0, left, must be above 0"),
    ],
)
def test_figures_of_a_file_that_cannot_be_are_rejected(tmp_path, fields, message):
    with pytest.raises(ClusterError) as rejected:
        take_saved(tmp_path, dataclasses.replace(example(), **fields))
    assert str(rejected.value).startswith(f"{tmp_path / 'topology.json'}: {message}")
