"""Each node's rack, by every way in which Slurm tells it, and what is told where it does not."""

import logging
from types import SimpleNamespace

import pytest

from hpcmoe.cluster import racks as chapter
from hpcmoe.cluster.racks import expand_hosts, find_racks, read_switches, split_address
from hpcmoe.errors import ClusterError

NO_WORD = "no word of racks: one for all"
TREE = """SwitchName=leafA Level=0 LinkSpeed=1 Nodes=n[1-2]
SwitchName=leafB Level=0 LinkSpeed=1 Nodes=n[3-4]
SwitchName=core Level=1 LinkSpeed=1 Nodes=n[1-4] Switches=leaf[A-B]
SwitchName=top Level=2 LinkSpeed=1 Nodes=n[1-4] Switches=core
"""
BLOCKS = """BlockName=b1 BlockIndex=0 Nodes=n[1-2] BlockSize=2
BlockName=b2 BlockIndex=1 Nodes=n[3-4] BlockSize=2
AggregatedBlock=b[1-2] BlockIndex=2 Nodes=n[1-4] BlockSize=4
"""


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for key in ("SLURM_JOB_ID", "SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN"):
        monkeypatch.delenv(key, raising=False)


def info(name, address="", pattern=""):
    return SimpleNamespace(name=name, address=address, address_pattern=pattern)


def find(names, addresses=None, pattern=""):
    """Find the racks of nodes with one rank each."""
    infos = [[info(*pair, pattern)] for pair in zip(names, addresses or [""] * len(names), strict=True)]
    return find_racks(infos, tuple(names), ())


@pytest.fixture
def scontrol(monkeypatch, tmp_path):
    """Put a scontrol on the path, within a job: a function that has it run a shell script."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def write(text):
        (tmp_path / "answer").write_text(text)
        act(f"cat {tmp_path / 'answer'}")

    def act(script):
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)

    return SimpleNamespace(write=write, act=act)


# Addresses


@pytest.mark.parametrize(
    ("address", "pattern", "name", "split"),
    [
        ("s.r0.n0", "switch.switch.node", "n0", ("r0", "n0")),
        ("s.r0.n0.cluster.local", "switch.switch.node", "n0", ("r0", "n0.cluster.local")),
        ("s.r0.n0.cluster.local", "switch.switch.node", "else", ("r0", "n0.cluster.local")),
        ("b8.tux1", "block.node", "tux1", ("b8", "tux1")),
        ("b8.10.140.71.103", "block.node", "10.140.71.103", ("b8", "10.140.71.103")),
        ("root.CELL1.isw.belenos386", "switch.switch.switch.node", "belenos386", ("isw", "belenos386")),
        ("opasw[06,14-15,07,11].opasw13.cn-0256", "switch.switch.node", "cn-0256", ("opasw13", "cn-0256")),
        ("a[1.b-2.c].d.n", "switch.switch.node", "n", ("d", "n")),  # dots within brackets
        ("n1.local", "node", "n1.local", (None, "n1.local")),
        ("..n5", "switch.switch.node", "n5", (None, "n5")),  # under no switch
        ("short", "switch.switch.node", "short", (None, "")),  # fewer labels than the pattern has
        # without a pattern: by the name, else the last label
        ("s.r0.n0", "", "n0", ("r0", "n0")),
        ("s.r0.n0.cluster.local", "", "n0.cluster.local", ("r0", "n0.cluster.local")),
        ("s.r0.n0.cluster.local", "", "n0", ("r0", "n0.cluster.local")),
        ("s.r0.n0", "", "n0.cluster.local", ("r0", "n0")),
        ("n0.cluster.local", "", "n0", (None, "n0.cluster.local")),
        ("s.r0.n0", "", "host17", ("r0", "n0")),
        ("s.r0.n0", "strange", "n0", ("r0", "n0")),
        ("r8:2.n0", "ring:position.node", "n0", ("r8", "n0")),
        ("t1:0:1:2.n0", "torus:x:y:z.node", "n0", ("t1", "n0")),
        ("", "", "n0", (None, "")),
    ],
)
def test_an_address_is_split_by_its_pattern_or_else_by_the_name(address, pattern, name, split):
    assert split_address(address, pattern, name) == split


def test_racks_are_the_lowest_switches_of_the_addresses(monkeypatch):
    addresses = ["s.a.n1.x.y", "s.a.n2.x.y", "s.b.n3.x.y"]
    expected = (["a", "a", "b"], "SLURM_TOPOLOGY_ADDR")
    assert find(["n1", "n2", "n3"], addresses, "switch.switch.node") == expected
    monkeypatch.setenv("SLURM_TOPOLOGY_ADDR_PATTERN", "switch.switch.node")  # rank 0's, where a info has none
    assert find(["n1", "n2", "n3"], addresses) == expected


def test_a_flat_cluster_is_one_rack_and_scontrol_need_not_say_so(scontrol, caplog):
    scontrol.act("exit 1")
    racks = find(["n1.local", "n2.local"], ["n1.local", "n2.local"], "node")
    assert racks == (["rack0", "rack0"], "SLURM_TOPOLOGY_ADDR_PATTERN: no switches") and not caplog.records


@pytest.mark.parametrize("names", [["n1", "n3"], ["n1.cluster.local", "n3.cluster.local"]])
@pytest.mark.parametrize("addresses", [["s.x.n1", "s.x.n1"], ["s.x.n1", ""], ["", ""], ["s.x.n9", "s.y.n1"]])
def test_addresses_that_were_handed_on_or_are_missing_leave_it_to_scontrol(scontrol, caplog, names, addresses):
    scontrol.write(TREE)
    assert find(names, addresses, "switch.switch.node") == (["leafA", "leafB"], "scontrol show topology")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_ranks_of_one_node_that_disagree_leave_it_to_scontrol(scontrol):
    scontrol.write(TREE)
    infos = [[info("n1", "s.x.n1"), info("n1", "s.y.n1")], [info("n3", "s.z.n3")]]
    assert find_racks(infos, ("n1", "n3"), ()) == (["leafA", "leafB"], "scontrol show topology")


def test_addresses_that_contradict_each_other_are_told_where_nobody_else_can(caplog):
    assert find(["n1", "n2"], ["s.x.n1", "s.x.n1"]) == (["rack0", "rack0"], NO_WORD)
    assert [record.getMessage() for record in caplog.records] == [
        "Slurm tells no rack of n1, n2 (SLURM_TOPOLOGY_ADDR of n1, n2 is another node's): all are taken as one"
    ]


def test_a_node_without_an_address_is_named_and_stands_apart(caplog):
    racks = find(["n1", "n2", "n3"], ["s.a.n1", "s.b.n2", ""])
    assert racks == (["a", "b", "unknown"], "SLURM_TOPOLOGY_ADDR")
    assert 'no rack of n3 (no switch in SLURM_TOPOLOGY_ADDR of n3): "unknown" stands' in caplog.text


# scontrol


@pytest.mark.parametrize(
    ("text", "racks"),
    [
        (TREE, ["leafA", "leafA", "leafB", "leafB"]),
        (BLOCKS, ["b1", "b1", "b2", "b2"]),
        ("SwitchName=a Nodes=n[1-4]\nSwitchName=core Switches=a Nodes=n[1-4]\n", ["a"] * 4),  # no levels
        ("RingName=r1 Nodes=n[1-2] RingSize=2\nRingName=r2 Nodes=n[3-4] RingSize=2\n", ["r1", "r1", "r2", "r2"]),
        ("TorusName=t Dims=2x2x1 Nodes=n[1-4]\n  TorusName=t PlacementDims=2x1x1(2) Anchors=2\n", ["t"] * 4),
        ("SwitchName=a Level=0 Nodes=n1.x,n2.x,n3.x,n4.x\n", ["a"] * 4),
    ],
)
def test_switches_and_blocks_are_told_by_scontrol(scontrol, caplog, text, racks):
    scontrol.write(text)
    assert find([f"n{k}" for k in range(1, 5)]) == (racks, "scontrol show topology")
    assert find([f"n{k}.cluster.local" for k in range(1, 5)])[0] == ([*racks] if "n1.x" not in text else ["rack0"] * 4)


@pytest.mark.parametrize(
    "text",
    [
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=leafB Level=0 LinkSpeed=1 Nodes=n[3-\n",  # cut
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=leafB Level=0 LinkSpeed=1 Nodes=\n",
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=leafB Level=0\nSwi",
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=leafB Level=0 Nodes=(null)\n",
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=core Level=1 Nodes=n[1-3] Switches=leafA\n",
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=core Nodes=n[1-3] Switches=leafA\n",
        "SwitchName=leafA Level=0 Nodes=n[1-2],n[3\n=\nNodes=n3\nSwitchName= Level=0 Nodes=n3\n",
        "SwitchName=leafA Level=0 Nodes=n[1-2]\nSwitchName=leafB Level=0 Nodes=n[0-999999999]\n",
        "BlockName=leafA BlockIndex=0 Nodes=n[1-2] BlockSize=2\nAggregatedBlock=x BlockIndex=2 Nodes=n[1-3]\n",
    ],
)
def test_what_is_known_is_used_and_what_is_not_is_a_warning_with_the_node(scontrol, caplog, text):
    scontrol.write(text)
    assert find(["n1", "n2", "n3"]) == (["leafA", "leafA", "unknown"], "scontrol show topology")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith("Slurm tells no rack of n3 (")


def test_an_address_stands_in_for_what_scontrol_does_not_know(scontrol):
    scontrol.write("SwitchName=leafA Level=0 Nodes=n1\n")
    racks = find(["n1", "n2", "n3"], ["", "s.leafB.n2", ""])
    assert racks == (["leafA", "leafB", "unknown"], "scontrol show topology, SLURM_TOPOLOGY_ADDR")


def warnings_of(caplog):
    """Read the warnings' text, or "" where there is none."""
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("text", [TREE, BLOCKS])
def test_wherever_scontrol_is_cut_racks_are_right_or_a_warning_names_the_nodes(scontrol, caplog, monkeypatch, text):
    names = ["n1", "n2", "n3", "n4"]
    scontrol.write(text)
    whole = find(names)[0]
    for length in range(1, len(text)):
        caplog.clear()
        monkeypatch.setattr(chapter, "show_topology", text[:length].splitlines)
        racks, said = find(names)[0], warnings_of(caplog)
        assert all(rack in (right, "unknown", "rack0") for rack, right in zip(racks, whole, strict=True))
        lost = [name for name, rack, right in zip(names, racks, whole, strict=True) if rack != right]
        assert all(name in said for name in lost), (text[:length], said)


@pytest.mark.parametrize("text", ["", "(null)\n", "No topology information available\n"])
def test_a_flat_scontrol_is_no_reason_to_warn(scontrol, caplog, text):
    scontrol.write(text)
    assert find(["n1", "n2"]) == (["rack0", "rack0"], NO_WORD) and not warnings_of(caplog)


@pytest.mark.parametrize(("addresses", "pattern"), [
    (["n1", "n2"], "switch.node"), (["r0.n1", "r1.n2"], "switch.switch.node"), (["s..n1", "s..n2"], ""),
    (["s.n1", ""], "switch.switch.node"),
])  # fmt: skip
def test_addresses_that_have_lost_their_switches_are_named(caplog, addresses, pattern):
    assert find(["n1", "n2"], addresses, pattern) == (["rack0", "rack0"], NO_WORD)
    assert "no rack of n1, n2 (no switch in SLURM_TOPOLOGY_ADDR of n1, n2): all are taken as one" in warnings_of(caplog)


def test_names_that_may_be_several_are_named(scontrol, caplog):
    scontrol.write("SwitchName=a Level=0 Nodes=n1.a,n2.a\nSwitchName=b Level=0 Nodes=n1.b\n")
    assert find(["n1", "n2"])[0] == ["unknown", "a"]
    assert "Slurm tells no rack of n1 (n1 may be n1.a or n1.b)" in caplog.text


def test_an_empty_topology_is_one_rack(scontrol, caplog):
    scontrol.act("echo 'No topology information available' >&2")
    assert find(["n1", "n2"]) == (["rack0", "rack0"], NO_WORD) and not caplog.records


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 60", "has not answered in 0.2 s"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "ends with status 1: Unable to contact slurm contr"),
        ("exit 3", "ends with status 3: it says nothing"),
        ("printf '\\377\\376=\\n'; kill -9 $$", "ends with status -9"),
    ],
)
def test_a_scontrol_that_does_not_answer_is_a_warning(scontrol, caplog, monkeypatch, script, said):
    monkeypatch.setattr(chapter, "SCONTROL_SECONDS", 0.2 if "sleep" in script else 20)
    scontrol.act(script)
    assert find(["n1", "n2"]) == (["rack0", "rack0"], NO_WORD)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().startswith("Slurm tells no rack of n1, n2 (")
    assert said in record.getMessage() and record.getMessage().endswith("all are taken as one")


def test_without_scontrol_that_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find(["n1", "n2"]) == (["rack0", "rack0"], NO_WORD)
    assert "scontrol show topology cannot be run: No such file or directory" in caplog.text


def test_scontrol_is_not_told_to_cut_its_lines(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_TOPO_LEN", "20")
    scontrol.act('echo "SwitchName=a Level=0 Nodes=n1${SLURM_TOPO_LEN}"')
    assert find(["n1"])[0] == ["a"]


def test_the_first_of_two_switches_over_a_node_counts():
    read, errors = read_switches(["SwitchName=a Level=0 Nodes=n1", "SwitchName=b Level=0 Nodes=n[1-2]"])
    assert (read, errors) == ({"n1": "a", "n2": "b"}, [])


def test_nodes_of_one_name_have_one_rack(scontrol):
    scontrol.write(TREE)
    infos = [[info("n1")], [info("n1")], [info("n4")]]
    assert find_racks(infos, ("n1", "n1.1", "n4"), ())[0] == ["leafA", "leafA", "leafB"]


def test_many_nodes_are_named_in_part(scontrol, caplog):
    scontrol.act("exit 1")
    find([f"n{k}" for k in range(20)])
    assert "n0, n1, n2, n3, n4, n5, n6, n7 and 12 more" in caplog.text


@pytest.mark.parametrize(
    ("text", "hosts", "unread"),
    [
        ("n1", ["n1"], ""),
        ("n[1-3],m", ["n1", "n2", "n3", "m"], ""),
        ("n[08-10,12]-ib[0-1]", [f"n{k}-ib{i}" for k in ("08", "09", "10", "12") for i in "01"], ""),
        ("n[1-2].x.y", ["n1.x.y", "n2.x.y"], ""),
        ("10.0.0.1,10.0.0.2", ["10.0.0.1", "10.0.0.2"], ""),
        ("a,n[1-2],n[3-", ["a", "n1", "n2"], "n[3-"),
        ("n[3-1]", [], "n[3-1]"),
        ("n[1-2,x],m", ["m"], "n[1-2,x]"),
        ("n[],m", ["m"], "n[]"),
        ("a,,b", ["a", "b"], ""),
        ("n]1[", [], "n]1["),
        ("n[1-99999]m[1-99999]", [], "n[1-99999]m[1-99999]"),
        ("[", [], "["),
    ],
)
def test_lists_of_hosts_are_expanded_as_far_as_they_are_whole(text, hosts, unread):
    assert expand_hosts(text) == (hosts, unread)


def test_racks_of_the_config_must_fit():
    with pytest.raises(ClusterError, match="racks has 1 entries, the run has 2 nodes"):
        find_racks([[info("a")], [info("b")]], ("a", "b"), ("x",))
