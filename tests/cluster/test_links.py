"""The measurement of links, and links given by the config or a file."""

import itertools
import time

import numpy as np
import pytest

from hpcmoe.cluster import links
from hpcmoe.config import Cluster
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all


@pytest.mark.parametrize("num_nodes", range(1, 10))
@pytest.mark.parametrize("seconds", [0.01, 100.0])
def test_rounds_have_every_pair_once_and_are_disjoint(num_nodes, seconds):
    rounds = links.make_rounds(num_nodes, seconds)
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(num_nodes), 2))
    for pairs in rounds:
        nodes = list(itertools.chain(*pairs))
        assert len(nodes) == len(set(nodes))


def test_pairs_are_measured_alone_while_time_allows():
    assert {len(pairs) for pairs in links.make_rounds(8, 2.0)} == {1}
    assert len(links.make_rounds(8, 0.1)) == 7
    assert len(links.make_rounds(128, 2.0)) == 127
    assert len(links.make_rounds(7, 0.1)) == 7  # odd: one node rests in each


def test_bandwidth_is_free_of_latency_and_of_a_shaper_s_burst():
    def seconds(num_bytes):
        return 30e-6 + max(num_bytes - 200_000, 0) / 25e6

    sizes = [0, *(2**k for k in range(16, 21))]
    assert links.estimate_bandwidth({size: seconds(size) for size in sizes}) == pytest.approx(25e6)


def test_bandwidth_survives_noise_and_a_single_size():
    assert links.estimate_bandwidth({0: 1e-6, 65536: 2.0, 262144: 1.0}) == 262144
    assert links.estimate_bandwidth({0: 1e-3, 65536: 1e-3 + 65536 / 1e6}) == pytest.approx(1e6)


class Link:
    """A link on a clock of its own."""

    def __init__(self, bytes_per_second, latency_seconds):
        self.now, self.bytes_per_second, self.latency_seconds = 0.0, bytes_per_second, latency_seconds

    def clock(self):
        return self.now

    def time_messages(self, num_bytes, repeats):
        seconds = self.latency_seconds + num_bytes / self.bytes_per_second
        self.now += 2 * seconds * repeats  # a round trip each
        return [seconds] * repeats


@pytest.mark.parametrize("bytes_per_second", [2e6, 25e6, 1e9, 1e11])
def test_messages_grow_within_their_time(bytes_per_second, monkeypatch):
    link = Link(bytes_per_second, 50e-6)
    monkeypatch.setattr(links.time, "perf_counter", link.clock)
    bandwidth, latency = links.ramp(link.time_messages, 0.3)
    assert bandwidth == pytest.approx(bytes_per_second, rel=1e-3)  # a one-byte message is not all latency
    assert latency == pytest.approx(50e-6, rel=0.1)
    assert link.now < 0.35


def test_config_links_are_taken_as_they_are():
    given = Cluster(
        links="config", bytes_per_second=((1e9, 1e8), (2e8, 1e9)), latency_seconds=((0.0, 1e-5), (2e-5, 0.0))
    )
    bandwidth, latency, source = links.find_links(given, ("a", "b"), None, None)
    assert bandwidth.tolist() == [[1e9, 1e8], [2e8, 1e9]]
    assert latency.tolist() == [[0, 1e-5], [2e-5, 0]]
    assert source == "config"


def test_latency_left_out_of_the_config_is_zero_and_said_to_be():
    bandwidth, latency, source = links.find_links(
        Cluster(links="config", bytes_per_second=((1.0,),)), ("a",), None, None
    )
    assert latency.tolist() == [[0.0]]
    assert source == "config; latency not given, taken as 0"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bytes_per_second": ((1.0,) * 3,) * 3}, "[cluster] bytes_per_second is 3 x 3, the run has 2 nodes"),
        ({"bytes_per_second": ((1.0, 1.0), (1.0,))}, "[cluster] bytes_per_second is 2 x 1 or 2, the run has 2 nodes"),
        (
            {"bytes_per_second": ((1.0, 0.0), (1.0, 1.0))},
            "[cluster] bytes_per_second: entry [0][1] = 0, n0 to n1, must be above 0",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (-2e9, 1.0))},
            "[cluster] bytes_per_second: entry [1][0] = -2e+09, n1 to n0, must be above 0",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (1.0, float("nan")))},
            "[cluster] bytes_per_second: entry [1][1] = nan, n1 to n1, must be above 0",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (1.0, 1.0)), "latency_seconds": ((0.0, -1.0), (0.0, 0.0))},
            "[cluster] latency_seconds: entry [0][1] = -1, n0 to n1, must be 0 or above",
        ),
        (
            {"bytes_per_second": ((1.0, 1.0), (1.0, 1.0)), "latency_seconds": ((0.0,),)},
            "[cluster] latency_seconds is 1 x 1, the run has 2 nodes",
        ),
    ],
)
def test_config_links_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ClusterError) as refused:
        links.find_links(Cluster(links="config", **keys), ("n0", "n1"), None, None)
    assert str(refused.value) == message


@pytest.mark.mpi
def test_every_link_is_measured_and_all_ranks_know_it(comm):
    begin = time.monotonic()
    bandwidth, latency = links.measure_links(comm, np.arange(comm.size), 0.5)  # as if each rank were a node
    assert time.monotonic() - begin < 5.0
    assert bandwidth.shape == latency.shape == (comm.size, comm.size)
    assert (bandwidth > 1e6).all() and np.isfinite(bandwidth).all()
    assert (latency > 0).all() and (latency < 0.1).all()
    np.testing.assert_array_equal(bandwidth, bandwidth.T)
    for theirs in gather_to_all(comm, bandwidth):
        np.testing.assert_array_equal(theirs, bandwidth)


@pytest.mark.mpi
def test_ranks_of_one_node_measure_their_node(comm):
    bandwidth, latency = links.measure_links(comm, np.zeros(comm.size, np.int64), 0.5)
    assert bandwidth.shape == latency.shape == (1, 1)
    assert bandwidth[0, 0] > 1e7


@pytest.mark.mpi
def test_nodes_may_have_ranks_that_are_not_neighbours(comm):
    node_of_rank = np.arange(comm.size) % 2
    bandwidth, _ = links.measure_links(comm, node_of_rank, 0.3)
    assert (bandwidth > 1e6).all()
