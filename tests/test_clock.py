"""Every second is booked to one stage: the innermost."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe import clock
from hpcmoe.clock import Clock


class FakeTime:
    """A clock on the wall that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)


@pytest.fixture
def wall(monkeypatch):
    return FakeTime(monkeypatch)


def test_an_inner_stage_is_taken_off_the_outer(wall):
    c = Clock()
    wall.now += 100  # no stage: nobody's
    with c.measure("compute"):
        wall.now += 1
        with c.measure("dispatch"):
            wall.now += 10
        with c.measure("compute"):  # a stage within itself counts once
            wall.now += 2
        wall.now += 4
    wall.now += 100
    assert c.pop_seconds() == {"compute": 7, "dispatch": 10}
    assert c.pop_seconds() == {}


def test_a_stage_that_fails_is_booked_and_over(wall):
    c = Clock()
    with c.measure("data"):
        with pytest.raises(ValueError), c.measure("route"):
            wall.now += 3
            raise ValueError
        wall.now += 1
    assert c.pop_seconds() == {"data": 1, "route": 3}


def test_taking_within_a_stage_cuts_it_in_two(wall):
    c = Clock()
    with c.measure("compute"):
        wall.now += 1
        assert c.pop_seconds() == {"compute": 1}
        wall.now += 2
    assert c.pop_seconds() == {"compute": 2}


nests = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=8)


@given(nests)
def test_stages_sum_to_the_elapsed_time(nest):
    c = Clock()

    def walk(nest, depth):
        with c.measure(f"depth {depth}"):
            for inner in nest:
                walk(inner, depth + 1)

    started = time.perf_counter()
    walk(nest, 0)
    elapsed = time.perf_counter() - started
    assert 0 < sum(c.pop_seconds().values()) <= elapsed
