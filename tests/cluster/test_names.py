"""A node is found by its name, with its domain or without, where only one can be meant."""

import pytest

from hpcmoe.cluster.names import format_ambiguous, is_same_node, match_names


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        (["n1", "n2"], ["n2", "n1"], {"n1": "n1", "n2": "n2"}),
        (["n1"], ["n1.cluster.local", "n10.cluster.local"], {"n1": "n1.cluster.local"}),
        (["n1.cluster.local"], ["n1", "n10"], {"n1.cluster.local": "n1"}),
        (["n1.cluster"], ["n1.cluster.local"], {"n1.cluster": "n1.cluster.local"}),
        (["n1"], ["n1", "n1.a"], {"n1": "n1"}),  # exactly so
        (["n1.a", "n1.b"], ["n1.b", "n1.a"], {"n1.a": "n1.a", "n1.b": "n1.b"}),
        (["n1.a"], ["n1.b"], {}),
        (["n1", "n1.a"], ["n1"], {"n1": "n1"}),  # the name is taken
        (["10.0.0.1"], ["10.0.0.1"], {"10.0.0.1": "10.0.0.1"}),
        (["10", "10.0.0.1"], ["10.0.0.2"], {}),  # addresses have no domain
        ([], ["n1"], {}),
        (["n1"], [], {}),
    ],
)
def test_names_match_up_to_a_domain(wanted, known, found):
    assert match_names(wanted, known) == (found, {})


def test_what_may_be_several_is_not_matched_and_named():
    assert match_names(["n1"], ["n1.a", "n1.b"]) == ({}, {"n1": ["n1.a", "n1.b"]})
    assert match_names(["n1.a", "n1.b"], ["n1"]) == ({}, {"n1.a": ["n1"], "n1.b": ["n1"]})
    assert format_ambiguous({"n1": ["n1.a", "n1.b"], "m.x": ["m"]}) == "n1 may be n1.a or n1.b; m.x may be m"


def test_two_names_of_one_node():
    assert is_same_node("n1", "n1.x") and is_same_node("n1.x", "n1") and is_same_node("n1", "n1")
    assert not is_same_node("n1", "n10") and not is_same_node("n1.x", "n1.y") and not is_same_node("10", "10.1.2.3")
