"""The whole measurement: its parts' shares of time and bytes, what is measured again, and what comes of it."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.measure import cluster as measure
from hpcmoe.cluster.measure.pairs import SIZES
from hpcmoe.config import ClusterConfig
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all


def rates_of(rack_of_node, within, between, **changes):
    """Make rates of two kinds, with some links changed, as i_j=rate."""
    rates = np.where(np.equal.outer(rack_of_node, rack_of_node), within, between).astype(float)
    np.fill_diagonal(rates, 1.0)  # a node's own memory is of no kind
    for link, rate in changes.items():
        i, j = map(int, link[1:].split("_"))
        rates[i, j] = rate
    return rates


def test_slow_links_are_told_from_their_own_kind_the_slowest_first():
    racks = np.array([0, 0, 0, 1, 1, 1])
    rates = rates_of(racks, 100, 10, n0_1=69, n4_3=40, n5_0=2, n0_5=7.5)
    slow = measure.find_slow_links(rates, racks)
    assert [(i, j) for i, j, _ in slow] == [(5, 0), (4, 3), (0, 1)]
    assert [share for _, _, share in slow] == pytest.approx([0.2, 0.4, 0.69])


@pytest.mark.parametrize("racks", [[0], [0, 0], [0, 1], [0, 0, 0], [0, 0, 1, 1]])
def test_even_links_are_not_slow(racks):
    racks = np.array(racks)
    assert measure.find_slow_links(rates_of(racks, 100, 10), racks) == []
    assert measure.make_repeats(rates_of(racks, 100, 10), racks) == []


def test_doubtful_links_are_measured_again_the_slowest_first_and_apart():
    racks = np.array([0, 0, 1, 1, 2, 2])
    rates = rates_of(racks, 100, 10, n0_2=1, n2_0=3, n1_3=2, n4_2=5, n3_4=8, n5_1=9)
    made = [pairs.tolist() for pairs in measure.make_repeats(rates, racks)]
    assert made == [[[0, 2]], [[1, 3]], [[2, 4]], [[3, 4]]]  # all of these cross a common uplink


@given(st.lists(st.integers(0, 2), min_size=3, max_size=12), st.integers(0, 2**32))
def test_repeats_hold_each_doubtful_pair_once_and_no_node_twice_in_a_round(racks, seed):
    racks = np.unique(racks, return_inverse=True)[1]
    rates = np.random.default_rng(seed).uniform(0.1, 1.0, (len(racks), len(racks)))
    doubtful = {tuple(sorted(link[:2])) for link in measure.find_slow_links(rates, racks, measure._DOUBTFUL)}
    made = measure.make_repeats(rates, racks)
    assert sorted(tuple(pair) for pairs in made for pair in pairs.tolist()) == sorted(doubtful)
    assert all(len(np.unique(pairs)) == pairs.size for pairs in made)


def test_too_few_bytes_are_refused_with_the_arithmetic():
    measure.check_bytes(393216, 4)
    measure.check_bytes(1, 1)
    with pytest.raises(ClusterError) as rejected:
        measure.check_bytes(393215, 4)
    assert str(rejected.value) == (
        "[cluster] measure_bytes = 393215: must be at least 3 other nodes x 65536 / 0.5 of all = 393216"
    )


class Counted:
    """A communicator that counts the bytes of messages to other ranks, and can make one link slow at first."""

    def __init__(self, comm):
        self.comm, self.sent = comm, 0

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def count(self, box):
        if box.nbytes > 16:  # neither announcements nor acknowledgements
            self.sent += box.nbytes

    def Isend(self, box, *rest):
        self.count(box)
        return self.comm.Isend(box, *rest)

    def Issend(self, box, *rest):
        self.count(box)
        return self.comm.Issend(box, *rest)


@pytest.mark.mpi
@pytest.mark.parametrize("num_bytes", [2**21, 10**8])
@pytest.mark.parametrize("num_racks", [1, 2])
def test_all_is_measured_within_its_seconds_and_bytes_and_all_ranks_know_it(comm, num_bytes, num_racks):
    counted, nodes = Counted(comm), comm.size
    rack_of_node = np.arange(nodes) * min(num_racks, nodes) // nodes
    keys = ClusterConfig(measure_seconds=0.6, measure_bytes=num_bytes)
    begin = time.monotonic()
    links = measure.measure_links(counted, np.arange(nodes), rack_of_node, keys)  # as if each rank were a node
    assert time.monotonic() - begin < 100.0  # on a busy machine
    assert SIZES[0] * (nodes - 1) <= counted.sent <= num_bytes

    rates, between = links.bytes_per_second, ~np.eye(nodes, dtype=bool)
    assert rates.shape == links.latency_seconds.shape == (nodes, nodes)
    assert (rates > 1e6).all() and np.isfinite(rates).all()
    assert (links.latency_seconds > 0).all() and (links.latency_seconds < 10).all()
    alone = np.where(between, rates, 0)
    assert (links.egress_bytes_per_second >= alone.max(axis=1)).all()
    assert (links.ingress_bytes_per_second >= alone.max(axis=0)).all()
    assert links.uplink_bytes_per_second.shape == (max(rack_of_node) + 1,)
    assert (links.uplink_bytes_per_second > 1e6).all()
    for theirs in gather_to_all(comm, links):
        for field in links.__slots__:
            np.testing.assert_array_equal(getattr(theirs, field), getattr(links, field))


@pytest.mark.mpi
def test_ranks_of_one_node_measure_their_node(comm):
    links = measure.measure_links(comm, np.zeros(comm.size, np.int64), np.zeros(1, np.int64), ClusterConfig())
    assert links.bytes_per_second.shape == (1, 1) and links.bytes_per_second[0, 0] > 1e7
    assert links.egress_bytes_per_second.tolist() == links.ingress_bytes_per_second.tolist()
    assert links.egress_bytes_per_second[0] == links.bytes_per_second[0, 0]
    assert links.uplink_bytes_per_second.tolist() == [np.inf]


@pytest.mark.mpi
def test_a_link_that_was_disturbed_is_measured_again(comm, monkeypatch):
    if comm.size < 3:
        pytest.skip("a slow link needs others beside it")
    first = []

    def disturbed(*arguments):
        rates, latency = measure_pairs(*arguments)
        if not first:
            rates[0, 1], latency[0, 1] = 1.0, 9.0
            first.append(True)
        return rates, latency

    measure_pairs = measure.measure_pairs
    monkeypatch.setattr(measure, "measure_pairs", disturbed)
    links = measure.measure_links(comm, np.arange(comm.size), np.zeros(comm.size, np.int64), ClusterConfig())
    assert links.bytes_per_second[0, 1] > 1e6
    assert links.latency_seconds[0, 1] < 9.0
