"""The measurement of pairs of nodes: how a bandwidth is told from times, within seconds and bytes."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.measure import pairs as links
from hpcmoe.wait import gather_to_all


def test_bandwidth_of_short_messages_is_free_of_fixed_costs():
    sizes = [0, *links.SIZES[:4]]
    taken = {size: 50e-6 * (size > 0) + 20e-6 + size / 12e9 for size in sizes}
    assert links.telling_sizes(taken) == [2**19, 2**17]
    assert links.estimate_bandwidth(taken) == pytest.approx(12e9)


def test_bandwidth_of_long_messages_is_not_taken_from_a_disturbed_short_one():
    taken = {0: 50e-6, 2**18: 0.04, 2**20: 50e-6 + 2**20 / 25e6}
    assert links.telling_sizes(taken) == [2**20]
    assert links.estimate_bandwidth(taken) == pytest.approx(25e6)


def test_bandwidth_survives_noise_and_a_single_size():
    assert links.estimate_bandwidth({0: 0.5, 65536: 2.0, 262144: 1.0}) == 262144
    assert links.estimate_bandwidth({0: 1e-3, 65536: 1e-3 + 65536 / 1e6}) == pytest.approx(1e6)


class Link:
    """A link on a clock of its own, behind a shaper whose bucket lets a burst pass at once when it is full."""

    def __init__(self, bytes_per_second, latency_seconds, burst=0):
        self.now, self.bytes_per_second, self.latency_seconds = 0.0, bytes_per_second, latency_seconds
        self.burst, self.bucket, self.seen, self.sent = burst, burst, 0.0, 0

    def clock(self):
        return self.now

    def time_message(self, size):
        self.bucket = min(self.burst, self.bucket + (self.now - self.seen) * self.bytes_per_second)
        seconds = 2 * self.latency_seconds + max(size - self.bucket, 0) / self.bytes_per_second
        self.bucket, self.sent = max(self.bucket - size, 0), self.sent + size
        self.now += seconds
        self.seen = self.now
        return seconds


@pytest.mark.parametrize(
    ("bytes_per_second", "burst"), [(2e6, 0), (25e6, 0), (1e9, 0), (1e11, 0), (25e6, 2**17), (250e6, 2**18)]
)
def test_messages_grow_within_their_time(bytes_per_second, burst, monkeypatch):
    link = Link(bytes_per_second, 50e-6, burst)
    monkeypatch.setattr(links.time, "perf_counter", link.clock)
    bandwidth = links.ramp(link.time_message, 100e-6, 0.2, 10**9)
    assert bandwidth == pytest.approx(bytes_per_second, rel=0.05)
    assert link.now < 0.25


@pytest.mark.parametrize("num_bytes", [2**16, 10**5, 10**6, 10**8])
def test_messages_grow_within_their_bytes(num_bytes, monkeypatch):
    link = Link(1e9, 50e-6)
    monkeypatch.setattr(links.time, "perf_counter", link.clock)
    assert links.ramp(link.time_message, 100e-6, 10.0, num_bytes) == pytest.approx(1e9, rel=1e-6)
    assert num_bytes / 8 < link.sent <= num_bytes


@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0), st.floats(1.0, 2.0))
def test_noise_never_makes_a_link_many_times_faster(seconds, share, noise):
    taken = {0: 1e-6, 2**18: share * seconds, 2**20: noise * seconds}
    assert links.estimate_bandwidth(taken) <= 0.75 / links._STEEPEST * 2**20 / (noise * seconds)


@pytest.mark.mpi
@pytest.mark.parametrize("as_if", ["a rank a node", "ranks dealt to two nodes"])
def test_every_pair_is_measured_and_all_ranks_know_it(comm, as_if):
    node_of_rank = np.arange(comm.size) if as_if == "a rank a node" else np.arange(comm.size) % 2
    num_nodes = max(node_of_rank) + 1
    pairs = [np.array([(i, j)]) for i in range(num_nodes) for j in range(i, num_nodes)]
    begin = time.monotonic()
    rates, latency = links.measure_pairs(comm, node_of_rank, pairs, 0.5, 10**8)
    assert time.monotonic() - begin < 100.0  # on a busy machine
    assert rates.shape == latency.shape == (num_nodes, num_nodes)
    assert (rates > 1e6).all() and np.isfinite(rates).all()
    assert (latency > 0).all() and (latency < 10).all()
    np.testing.assert_array_equal(latency, latency.T)
    for theirs in gather_to_all(comm, (rates, latency)):
        np.testing.assert_array_equal(theirs, (rates, latency))


@pytest.mark.mpi
def test_pairs_that_no_round_has_stay_zero(comm):
    rates, latency = links.measure_pairs(comm, np.arange(comm.size), [np.array([[0, 0]])], 0.1, 10**7)
    assert np.flatnonzero(rates).tolist() == np.flatnonzero(latency).tolist() == [0]
    none = links.measure_pairs(comm, np.arange(comm.size), [], 0.1, 10**7)
    assert not np.any(none)
