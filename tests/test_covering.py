"""The tables of cases: everything meets that has to, in few rows, and the rest is there under --full."""

import itertools

import pytest
from covering import cover, table, usually
from hypothesis import given
from hypothesis import strategies as st

AXES = st.lists(st.integers(1, 4).map(range), min_size=1, max_size=4)


@given(AXES, st.integers(1, 3))
def test_every_few_values_meet_in_rows_of_the_product(axes, strength):
    rows, together = cover(*axes, strength=strength), min(strength, len(axes))
    assert set(rows) <= set(itertools.product(*axes))
    for chosen in itertools.combinations(range(len(axes)), together):
        met = {tuple(row[axis] for axis in chosen) for row in rows}
        assert met == set(itertools.product(*(axes[axis] for axis in chosen)))


def test_rows_are_few_and_always_the_same():
    assert cover("abc", "xy", strength=1) == [("a", "x"), ("b", "y"), ("c", "x")]
    assert cover("ab", "xy") == list(itertools.product("ab", "xy"))
    assert len(cover(*["abc"] * 4)) <= 11  # of 81; nine at least
    assert cover(*["abc"] * 4) == cover(*["abc"] * 4)


def test_a_table_is_the_whole_product_of_which_the_rest_is_full():
    rows = table("abc", "xy", also=[("b", "x")])
    assert rows[:4] == [("a", "x"), ("b", "y"), ("c", "x"), ("b", "x")]
    assert rows[4:] == [pytest.param("a", "y", marks=pytest.mark.full), pytest.param("c", "y", marks=pytest.mark.full)]


def test_usual_names_come_first_and_must_be_there():
    assert usually({"a": 1, "b": 2}, "b") == ["b", pytest.param("a", marks=pytest.mark.full)]
    with pytest.raises(AssertionError, match="c"):
        usually({"a": 1}, "c")
