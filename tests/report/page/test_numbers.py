"""Few digits, round ticks, curves and maps of few points that keep what is largest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.report.page.numbers import (
    choose_ticks,
    format_short,
    group_cells,
    name_groups,
    round_to_few_digits,
    thin_curve,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.14159, "3.14"), (0.0012, "0.0012"), (1e-5, "1.0e-5"), (999.7, "1000"), (4484, "4484"),
     (34428, "34.4k"), (999_600, "1M"), (7.5e6, "7.5M"), (2.5e12, "2500G"), (-12345, "-12.3k"), (float("nan"), "-"),
     (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert format_short(value) == text


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low, span):
    ticks = choose_ticks(low, low + span)
    assert len(ticks) <= 6 and all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) + 1e-9 for tick in ticks)
    assert len(ticks) >= 2 or span < 1e-6 * abs(low)


@given(st.floats(1e-9, 1e12))
def test_what_is_rounded_up_is_not_below(value):
    assert value <= round_to_few_digits(value) * 1.00001 <= 2 * value * 1.001


def test_a_thinned_curve_keeps_its_ends_and_its_peaks():
    x, y = np.arange(100_000), np.zeros(100_000)
    y[12_345], y[54_321] = 7.0, -3.0
    fewer_x, fewer_y = thin_curve(x, y)
    assert len(fewer_x) <= 242 and fewer_y.max() == 7 and fewer_y.min() == -3
    assert (fewer_x[0], fewer_x[-1]) == (0, 99_999) and (np.diff(fewer_x) > 0).all()


def test_groups_of_cells_are_their_largest():
    values = np.arange(12.0).reshape(6, 2)
    values[4:, 1] = np.nan
    np.testing.assert_array_equal(group_cells(values, 3, 0), [[2, 3], [6, 7], [10, np.nan]])
    assert name_groups(6, 3) == ["0-1", "2-3", "4-5"] and name_groups(3, 8) == ["0", "1", "2"]
