"""Packed sequences come each once an epoch, in an order of seed and epoch that any step finds by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.model.order import number_sequences, permute


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_a_permutation_maps_one_to_one(size, seed, epoch):
    mapped = permute(np.arange(size), size, (seed, epoch))
    assert sorted(mapped.tolist()) == list(range(size))


def test_it_maps_single_numbers_of_sizes_that_no_memory_holds():
    size = 2**60 + 12345
    numbers = np.array([0, 1, size - 1])
    mapped = permute(numbers, size, (1, 2))
    assert len(set(mapped.tolist())) == 3 and (mapped < size).all() and (mapped >= 0).all()
    assert permute(numbers[2:], size, (1, 2)).tolist() == mapped[2:].tolist()
    assert permute(numbers[:0], size, (1, 2)).tolist() == []


def test_it_looks_random():
    size, draws = 12, 2000
    counts = np.zeros((size, size))
    followers = 0
    for epoch in range(draws):
        mapped = permute(np.arange(size), size, (0, epoch))
        counts[np.arange(size), mapped] += 1
        followers += (np.diff(mapped) == 1).sum()
    spread = (draws * (1 / size) * (1 - 1 / size)) ** 0.5
    assert np.abs(counts - draws / size).max() < 5 * spread
    assert followers / draws == pytest.approx((size - 1) / size, abs=0.1)  # of a random permutation


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
def test_steps_read_epoch_after_epoch_whole(num_sequences, num_packed, seed):
    num_steps = -(-3 * num_packed // num_sequences)
    numbers = np.concatenate(
        [number_sequences(step, num_sequences, num_packed, seed) for step in range(1, num_steps + 1)]
    )
    for epoch in range(3):
        of_epoch = numbers[epoch * num_packed : (epoch + 1) * num_packed]
        assert sorted(of_epoch.tolist()) == list(range(num_packed))


def test_each_seed_and_each_epoch_has_an_order_of_its_own():
    orders = {tuple(number_sequences(step, 50, 50, seed).tolist()) for seed in (0, 1, 2**40) for step in (1, 2, 3)}
    assert len(orders) == 9
