"""A case file becomes the problem it states, or one line that says what is wrong with it."""

import json

import numpy as np
import pytest
from cases import UNUSED, make_case, make_domains, put, write_case
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from hpcmoe.errors import ConfigError, HpcmoeError, PlacementError
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.problem import check_problem

NAN, INF = float("nan"), float("inf")
CASE = make_case()
DOMAINS = make_domains(make_case())


def read(tmp_path, case, **options):
    """Read a case through its file."""
    return read_case(write_case(tmp_path / "case.json", case), **options)


def test_every_key_arrives(tmp_path):
    problem, notes = read(tmp_path, CASE, objective="ports", count_latency=True)
    assert (problem.num_layers, problem.num_experts, problem.slots_per_rank, problem.replicate) == (3, 8, 1, False)
    assert problem.node_of_rank.tolist() == CASE["rank_to_node"] and problem.rack_of_node.tolist() == [0, 0, 1, 1]
    off = ~np.eye(4, dtype=bool)
    assert (problem.bytes_per_second[off] == np.array(CASE["B"])[off]).all()
    assert (problem.latency_seconds[off] == 5e-6).all()
    assert problem.egress_bytes_per_second.tolist() == CASE["nic_out"]
    assert problem.ingress_bytes_per_second.tolist() == CASE["nic_in"]
    assert problem.uplink_bytes_per_second.tolist() == CASE["uplink"]
    assert problem.memory_bytes.tolist() == CASE["M"] and problem.expert_bytes == 35_000_000
    assert problem.bytes_per_token == 8192 and problem.seconds_per_token == 2e-7
    assert problem.tokens_of_rank.tolist() == CASE["home_tokens_per_rank"]
    np.testing.assert_allclose(problem.probability, np.repeat(np.array(CASE["P"])[:, None], 4, axis=1), rtol=1e-12)
    assert problem.objective == "ports" and problem.count_latency and notes == []
    check_problem(problem)


def test_ports_default_to_the_fastest_link_of_their_node(tmp_path):
    problem, _ = read(tmp_path, make_case(nic_out=None, nic_in=None, rack=None, uplink=None))
    links = np.where(np.eye(4), 0.0, CASE["B"])
    assert problem.egress_bytes_per_second.tolist() == links.max(axis=1).tolist()
    assert problem.ingress_bytes_per_second.tolist() == links.max(axis=0).tolist()
    assert problem.rack_of_node.tolist() == [0] * 4 and problem.uplink_bytes_per_second.tolist() == [INF]


def test_a_rack_without_uplinks_has_no_limit(tmp_path):
    problem, _ = read(tmp_path, make_case(uplink=None, rack=["b", "a", "b", "c"]))
    assert problem.rack_of_node.tolist() == [1, 0, 1, 2] and problem.uplink_bytes_per_second.tolist() == [INF] * 3


def test_uplinks_are_by_number_or_in_order_of_the_names(tmp_path):
    by_number, _ = read(tmp_path, make_case(rack=[2, 2, 0, 0], uplink=[1.0, 2.0, INF]))
    assert by_number.rack_of_node.tolist() == [2, 2, 0, 0] and by_number.uplink_bytes_per_second.tolist() == [1, 2, INF]
    by_name, _ = read(tmp_path, make_case(rack=[20, 20, 7, 7], uplink=[1.0, 2.0]))
    assert by_name.rack_of_node.tolist() == [1, 1, 0, 0]


def test_domains_give_each_node_its_own_probabilities(tmp_path):
    problem, notes = read(tmp_path, DOMAINS)
    for layer, node, expert in np.ndindex(3, 4, 8):
        weights, of_domain = DOMAINS["P_src_node_domain_weights"][node], DOMAINS["P_domain"][layer]
        expected = sum(weight * row[expert] for weight, row in zip(weights, of_domain, strict=True))
        assert problem.probability[layer, node, expert] == pytest.approx(expected)
    assert notes == ["P is not used: P_src_node_domain_weights and P_domain give each node its own"]
    assert read(tmp_path, {key: value for key, value in DOMAINS.items() if key != "P"})[1] == []


def test_probabilities_are_brought_to_sum_to_one(tmp_path):
    problem, _ = read(tmp_path, put(CASE, "P", 0, value=[(1 + 9e-7) / 8] * 8))
    assert problem.probability.sum(axis=2) == pytest.approx(1, abs=1e-14)


def test_what_is_ignored_or_assumed_is_noted(tmp_path):
    _, notes = read(tmp_path, make_case(seconds_per_token=None) | {UNUSED: 1, "name": None})
    assert notes == [
        f"unknown keys ignored: '{UNUSED}', 'name'",
        "seconds_per_token is not given and taken as 0: computing costs nothing",
    ]
    assert read(tmp_path, make_case(seconds_per_token=None), objective="ports")[1] == []


ALLOWED = {
    "a diagonal of zeros": put(CASE, "B", 1, 1, value=0),
    "a diagonal of nulls": put(CASE, "B", 1, 1, value=None),
    "an infinite diagonal": put(put(CASE, "B", 1, 1, value=INF), "L", 2, 2, value=NAN),
    "whole numbers with a point": make_case(E=8.0, rank_to_node=[0.0, 0, 1.0, 1, 2.0, 2, 3.0, 3], expert_bytes=1e6),
    "ports without limit": make_case(nic_out=[INF] * 4, uplink=[INF, 1e9]),
    "no tokens": make_case(home_tokens_per_rank=[0] * 8),
    "memory beyond counting": make_case(M=[1e300] * 4),
    "one node": make_case(nodes=1, ranks=8, nic_out=None, nic_in=None, uplink=None),
    "a node without ranks": put(put(CASE, "rank_to_node", 6, value=0), "rank_to_node", 7, value=0)
    | {"slots_per_gpu": 2},
    "null for what is optional": CASE | {"nic_out": None, "uplink": None},
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_unusual_cases_are_read(tmp_path, name):
    problem, _ = read(tmp_path, ALLOWED[name])
    check_problem(problem)
    assert (problem.egress_bytes_per_second > 0).all() and (problem.memory_bytes >= 0).all()


BROKEN = {
    "B[1][2] = 0: must be finite and > 0": put(CASE, "B", 1, 2, value=0),
    "B[1][2] = -1: must be finite and > 0 (and 1 more)": put(put(CASE, "B", 1, 2, value=-1), "B", 3, 0, value=0),
    "B[0][3] = nan: must be finite and > 0": put(CASE, "B", 0, 3, value=NAN),
    "B[0][2] = nan: must be finite": put(CASE, "B", 0, 2, value=None),
    "B[0][1] = inf: must be finite": put(CASE, "B", 0, 1, value=INF),
    "B[1] has 3 entries, nodes = 4": put(CASE, "B", 1, value=[1e9] * 3),
    "B has 0 entries, nodes = 4": make_case(B=[]),
    "B[1][2] = 'fast': must be a valid number": put(CASE, "B", 1, 2, value="fast"),
    "B[1][2] = true: must be a valid number": put(CASE, "B", 1, 2, value=True),
    "B[0] = 1000000000.0: must be a valid list (and 3 more)": make_case(B=[1e9] * 4),
    "B: at worst inf s": put(CASE, "B", 1, 2, value=1e-320),
    "L[2][3] = -1e-06: must be finite and >= 0": put(CASE, "L", 2, 3, value=-1e-6),
    "M[2] = nan: must be finite and >= 0": put(CASE, "M", 2, value=NAN),
    "M has 5 entries, nodes = 4": make_case(M=[1e10] * 5),
    "nic_in[3] = 0: must be > 0": put(CASE, "nic_in", 3, value=0),
    "uplink[1] = -2: must be > 0": put(CASE, "uplink", 1, value=-2),
    "uplink has 2 entries, but rack is not given": make_case(rack=None),
    "uplink has 2 entries, rack names 3 racks: ['a', 'b', 'c']": make_case(rack=["a", "b", "c", "a"]),
    "rack[0] = 1.5: must be": make_case(rack=[1.5, 0, 0, 0]),
    "sum of P[1] = 1.5: must be 1, to within 1e-06": put(CASE, "P", 1, value=[1.5, *[0] * 7]),
    "P[1][2] = -0.5: must be finite and >= 0": put(CASE, "P", 1, 2, value=-0.5),
    "P[2][0] = nan: must be finite": put(CASE, "P", 2, 0, value=NAN),
    "P has 2 entries, layers = 3": make_case(P=CASE["P"][:2]),
    "P[0] has 8 entries, E = 7": make_case(E=7),
    "sum of P[1] = 0.": put(DOMAINS, "P", 1, 2, value=0),
    "sum of P_domain[1][2]": put(DOMAINS, "P_domain", 1, 2, value=[1, 1, *[0] * 6]),
    "sum of P_src_node_domain_weights[3] = 0:": put(DOMAINS, "P_src_node_domain_weights", 3, value=[0] * 3),
    "P_src_node_domain_weights[1] has 3, P_domain[0] has 3 entries, D = 2": put(
        DOMAINS, "P_src_node_domain_weights", 0, value=[0.5] * 2
    ),
    "P_domain: missing, but P_src_node_domain_weights is given": DOMAINS | {"P_domain": None},
    "P_src_node_domain_weights: missing, but P_domain is given": DOMAINS | {"P_src_node_domain_weights": None},
    "P: missing; either P or": make_case(P=None),
    "replicate = 1: must be a valid boolean": make_case(replicate=1),
    "rank_to_node[3] = 4: must be below nodes = 4": put(CASE, "rank_to_node", 3, value=4),
    "rank_to_node[3] = -1: must be": put(CASE, "rank_to_node", 3, value=-1),
    "rank_to_node has 8, home_tokens_per_rank has 8 entries, G = 9": make_case(G=9),
    "home_tokens_per_rank[0] = -5: must be finite and >= 0": put(CASE, "home_tokens_per_rank", 0, value=-5),
    "B: at worst 1.": make_case(home_tokens_per_rank=[1e300] * 8),
    "E: missing": {key: value for key, value in CASE.items() if key != "E"},
    "E = 0: must be greater than or equal to 1": make_case(E=0),
    "E = 8.5: must be a valid integer": make_case(E=8.5),
    "G = 1000000000000: must be less than": make_case(G=10**12),
    "slots_per_gpu = 100000000: layers 3 x G 8 x 100000000 = 2400000000 slots": make_case(slots_per_gpu=10**8),
    "expert_bytes = 0: must be greater than or equal to 1": make_case(expert_bytes=0),
    "bytes_per_token = 0: must be finite and > 0": make_case(bytes_per_token=0),
    "seconds_per_token = -1: must be finite and >= 0": make_case(seconds_per_token=-1),
    "9 experts do not fit into 8 ranks x 1 slots = 8; E, G, slots_per_gpu": make_case(experts=9),
    "8 experts x 3 layers x 35 MB = 840 MB do not fit: node n0 with 200 MB and 6 slots holds 5 of 24, all 4 nodes 20":
        make_case(M=[2e8] * 4),
    "8 experts x 3 layers x 35 MB = 840 MB do not fit: node n1 with 0 B and 6 slots holds 0 of 24, all 4 nodes 18":
        make_case(M=[1e12, 0, 1e12, 1e12]),
    "8 experts x 3 layers x 35 MB = 840 MB do not fit: node n0 with 34 MB and 6 slots holds 0": make_case(M=[34e6] * 4),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_case_is_one_line(tmp_path, line):
    with pytest.raises(HpcmoeError) as caught:
        read(tmp_path, BROKEN[line])
    assert str(caught.value).startswith(f"{tmp_path / 'case.json'}: {line}")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_several_errors_are_a_line_each(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, put(put(CASE, "B", 1, 2, value=0), "M", 0, value=NAN))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["B[1][2] = 0", "M[0] = nan"]


NOT_CASES = {
    "not JSON": '{"E": 1',
    "not JSON: nested too deeply": "[" * 100_000,
    "not JSON: a whole number has thousands": '{"E": ' + "9" * 5000 + "}",
    "must hold one JSON object, not [1, 2]": "[1, 2]",
    "must hold one JSON object, not null": "null",
    "E: stands 2 times, must stand once": '{"E": 1, "E": 2}',
}


@pytest.mark.parametrize("line", NOT_CASES)
def test_what_is_no_case_is_one_line(tmp_path, line):
    path = tmp_path / "case.json"
    path.write_text(NOT_CASES[line])
    with pytest.raises(ConfigError) as caught:
        read_case(path)
    assert str(caught.value).startswith(f"{path}: {line}") and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_case(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_case(tmp_path)
    (tmp_path / "case.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_case(tmp_path / "case.json")
    (tmp_path / "case.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CASE).encode())  # as Windows writes it
    read_case(tmp_path / "case.json")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_what_does_not_fit_is_refused_and_nothing_else(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    nodes, layers, experts, slots = (int(rng.integers(1, most)) for most in (5, 4, 7, 4))
    case = make_case(nodes, 2, experts, layers, slots, nic_out=None, nic_in=None, rack=None, uplink=None)
    case |= {"rank_to_node": rng.integers(0, nodes, 2 * nodes).tolist(), "expert_bytes": 10}
    case["M"] = rng.integers(0, 10 * layers * experts, nodes).tolist()

    # Send each layer's experts, as a flow, to nodes: at most a replica each and slots from a layer, memory from them all.
    source, sink = layers + nodes, layers + nodes + 1
    capacity = np.zeros((layers + nodes + 2,) * 2, np.int32)
    capacity[source, :layers] = experts
    of_node = np.bincount(case["rank_to_node"], minlength=nodes) * slots
    capacity[:layers, layers:source] = np.minimum(of_node, experts)
    capacity[layers:source, sink] = np.array(case["M"]) // 10
    fits = maximum_flow(csr_array(capacity), source, sink).flow_value == layers * experts

    path = write_case(tmp_path_factory.getbasetemp() / "fits.json", case)
    if fits:
        read_case(path)
    else:
        with pytest.raises(PlacementError):
            read_case(path)
