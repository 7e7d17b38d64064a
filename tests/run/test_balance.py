"""The load is an exponential average of what was measured."""

import numpy as np
import pytest

from hpcmoe.run.balance import even_load, update_load


def test_the_load_starts_even():
    assert np.array_equal(even_load(2, 3), np.ones((2, 3)))


def test_each_step_moves_the_load_by_its_share_of_the_window():
    load, utilisation = np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]])
    assert np.allclose(update_load(load, utilisation, 10), [[1.1, 0.9]])
    assert np.array_equal(update_load(load, utilisation, 1), utilisation)


def test_a_steady_utilisation_becomes_the_load_and_the_old_fades_as_an_exponential():
    load = np.array([1.0])
    for _ in range(10):
        load = update_load(load, np.array([3.0]), 10)
    assert load == pytest.approx(3 - 2 * 0.9**10)
