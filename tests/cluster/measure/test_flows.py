"""What several flows at once tell of ports and uplinks, on made-up figures and between the ranks of this machine."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.measure import flows as ports
from hpcmoe.cluster.measure.rounds import make_port_rounds, make_uplink_rounds
from hpcmoe.wait import gather_to_all


def share_out(flows, rack_of_node, own, port, uplink):
    """Carry flows as a network would, all of them grown alike until something is full -> bytes a second [flows]."""
    racks = rack_of_node[flows]
    crossing = racks[:, 0] != racks[:, 1]
    users = [(own[i, j], np.arange(len(flows)) == k) for k, (i, j) in enumerate(flows)]
    users += [(rate, flows[:, end] == node) for end in (0, 1) for node, rate in enumerate(port)]
    users += [(rate, crossing & (racks[:, end] == rack)) for end in (0, 1) for rack, rate in enumerate(uplink)]
    rates, grows = np.zeros(len(flows)), np.ones(len(flows), bool)
    while grows.any():
        rates[grows] += min((r - rates[use].sum()) / (use & grows).sum() for r, use in users if (use & grows).any())
        for rate, use in users:
            if rates[use].sum() >= rate * (1 - 1e-9):
                grows &= ~use
    return rates


def carry(rounds, rack_of_node, own, port, uplink):
    """Carry each round's flows -> (sent, received) [rounds, nodes]."""
    carried = np.zeros((2, len(rounds), len(own)))
    for turn, flows in enumerate(rounds):
        rates = share_out(flows, rack_of_node, own, port, uplink)
        for end in (0, 1):
            np.add.at(carried[end, turn], flows[:, end], rates)
    return carried


def infer(rack_of_node, own, port, uplink):
    """Measure a network without noise, and infer -> (egress, ingress, uplinks)."""
    found = ports.infer_ports(own, *carry(make_port_rounds(rack_of_node, 9.0), rack_of_node, own, port, uplink))
    rounds = make_uplink_rounds(rack_of_node, 9.0)
    carried = carry(rounds, rack_of_node, own, port, uplink)
    return *found, ports.infer_uplinks(rounds, rack_of_node, own, found, carried)


def pair_rates(rack_of_node, port, uplink, link=np.inf):
    """Find what each pair has alone."""
    port, uplink = np.array(port), np.array(uplink)
    over = np.minimum.outer(uplink, uplink)[np.ix_(rack_of_node, rack_of_node)]
    inside = np.equal.outer(rack_of_node, rack_of_node)
    return np.minimum(np.minimum(np.minimum.outer(port, port), link), np.where(inside, np.inf, over))


@pytest.mark.parametrize(
    ("racks", "port", "uplink", "link"),
    [
        ([0, 0, 1, 1], [2000] * 4, [200, 200], np.inf),  # the four shaped hosts
        ([0, 0, 0, 1, 1, 1], [2000, 1000, 2000, 2000, 2000, 2000], [300, 300], np.inf),
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], [10] * 9, [15, 15, 15], np.inf),
        ([0, 1, 2] * 4, [100] * 12, [120, 200, 250], np.inf),
        ([0, 0, 0, 1, 1, 1], [10] * 6, [12, 12], 3),  # a pair alone fills no port: two flows a node show the uplink
    ],
)
def test_ports_and_uplinks_are_found_where_they_bind(racks, port, uplink, link):
    rack_of_node = np.array(racks)
    own = pair_rates(rack_of_node, port, uplink, link)
    egress, ingress, uplinks = infer(rack_of_node, own, port, uplink)
    if link == np.inf:
        np.testing.assert_allclose(egress, port)
        np.testing.assert_allclose(ingress, port)
    np.testing.assert_allclose(uplinks, uplink)


@pytest.mark.parametrize("racks", [[0, 0, 1, 1], [0, 1], [0, 0, 0, 1], [0, 1, 2, 2, 2]])
def test_uplinks_that_hold_nobody_back_have_no_limit(racks):
    rack_of_node = np.array(racks)
    port, uplink = [10.0] * len(racks), [1000.0] * (max(racks) + 1)
    _, _, uplinks = infer(rack_of_node, pair_rates(rack_of_node, port, uplink), port, uplink)
    assert np.isinf(uplinks).all()


def test_an_uplink_carries_both_ways_what_it_carries_the_worse_way():
    racks, own = np.array([0, 0, 1, 1]), np.full((4, 4), 100.0)
    rounds = make_uplink_rounds(racks, 9.0)
    carried = np.array([[[40.0, 60, 0, 0], [0, 0, 20, 30]], [[0, 0, 50, 50], [25, 25, 0, 0]]])
    assert ports.infer_uplinks(rounds, racks, own, np.full((2, 4), 100.0), carried).tolist() == [50, 50]


def test_nothing_is_said_of_racks_whose_peers_send_to_others_too():
    flows, own = np.array([[0, 1], [0, 2]]), np.full((3, 3), 10.0)
    able = ports.able_to_carry(flows, np.arange(3), own, np.full((2, 3), 10.0))
    assert able.tolist() == [[10, 0, 0], [0, 0, 0]]


def test_one_rack_has_no_uplink_to_find():
    egress, ingress, uplinks = infer(np.zeros(3, np.int64), np.full((3, 3), 5.0), [8.0, 9.0, 20.0], [np.inf])
    assert (egress.tolist(), ingress.tolist(), uplinks.tolist()) == ([8, 9, 10], [8, 9, 10], [np.inf])


@given(
    st.lists(st.integers(0, 2), min_size=2, max_size=9).map(lambda racks: np.unique(racks, return_inverse=True)[1]),
    st.data(),
)
def test_ports_and_uplinks_are_never_below_what_a_pair_has_and_never_above_the_truth(rack_of_node, data):
    size = len(rack_of_node)
    port = data.draw(st.lists(st.floats(1, 100), min_size=size, max_size=size))
    num_racks = int(max(rack_of_node)) + 1
    uplink = data.draw(st.lists(st.floats(1, 100), min_size=num_racks, max_size=num_racks))
    own = pair_rates(rack_of_node, port, uplink)
    egress, ingress, uplinks = infer(rack_of_node, own, port, uplink)
    np.fill_diagonal(own, 0)
    for found, alone in ((egress, own.max(axis=1)), (ingress, own.max(axis=0))):
        assert (found >= alone * (1 - 1e-6)).all() and (found <= np.array(port) * (1 + 1e-6)).all()
    assert ((uplinks <= np.array(uplink) * (1 + 1e-6)) | np.isinf(uplinks)).all()


@given(st.integers(1, 60), st.floats(1.0, 1e3), st.floats(0.0, 0.9), st.floats(0.0, 2.0))
def test_a_steady_flow_s_rate_is_found_in_any_window(messages, rate, begin, length):
    arrivals = list(np.arange(1, messages + 1) / messages)
    found = ports.rate_within(arrivals[::-1], rate / messages, begin, begin + length)
    assert found == pytest.approx(rate, rel=1e-6)


def test_a_burst_before_the_window_does_not_count():
    arrivals = [0.01, 0.02, 0.03, 0.1, *np.arange(0.2, 1.2, 0.1)]
    assert ports.rate_within(arrivals, 100, 0.25, 1.0) == pytest.approx(1000)


@given(st.lists(st.floats(0.0, 1e12), min_size=1, max_size=5), st.integers(10**4, 10**10))
def test_messages_of_a_flow_fit_into_its_bytes(bytes_alone, bytes_of_flow):
    sizes = ports.choose_sizes(np.array(bytes_alone), bytes_of_flow)
    assert (sizes >= 1).all() and (sizes <= ports._MAX_SIZE).all()
    assert (2 * ports._CHANNELS * sizes <= bytes_of_flow).all()


def test_the_flows_of_a_node_are_dealt_to_its_ranks():
    flows = np.array([[0, 1], [0, 2], [1, 2], [0, 3]])
    dealt = ports.ranks_of_flows(flows, np.array([0, 1, 0, 2, 2, 3]))
    assert dealt.tolist() == [[0, 1], [2, 3], [1, 4], [0, 5]]


class Counted:
    """A communicator that counts the bytes that large messages carry."""

    def __init__(self, comm):
        self.comm, self.sent = comm, 0

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Issend(self, box, *rest):
        self.sent += box.nbytes
        return self.comm.Issend(box, *rest)


@pytest.mark.mpi
@pytest.mark.parametrize("num_bytes", [10**5, 10**8])
def test_flows_are_carried_within_their_seconds_and_bytes_and_all_ranks_know(comm, num_bytes):
    counted, own = Counted(comm), np.full((comm.size, comm.size), 1e9)
    rounds = [np.array([pair]) for pair in itertools.permutations(range(comm.size), 2)]
    rounds += make_port_rounds(np.zeros(comm.size, np.int64), 9.0)
    begin = time.monotonic()
    sent, received = ports.measure_flows(counted, np.arange(comm.size), rounds, own, 0.5, num_bytes)
    assert time.monotonic() - begin < 100.0  # on a busy machine
    assert counted.sent <= num_bytes
    assert sent.shape == received.shape == (len(rounds), comm.size)
    for turn, flows in enumerate(rounds):
        assert np.flatnonzero(sent[turn]).tolist() == sorted(set(flows[:, 0].tolist()))
        assert np.flatnonzero(received[turn]).tolist() == sorted(set(flows[:, 1].tolist()))
    np.testing.assert_allclose(sent.sum(axis=1), received.sum(axis=1))
    for theirs in gather_to_all(comm, (sent, received)):
        np.testing.assert_array_equal(theirs, (sent, received))


@pytest.mark.mpi
def test_several_ranks_of_a_node_carry_its_flows(comm):
    node_of_rank = np.arange(comm.size) % 2
    num_nodes = max(node_of_rank) + 1
    rounds = [np.array(list(itertools.permutations(range(num_nodes), 2)))] if num_nodes > 1 else []
    sent, received = ports.measure_flows(comm, node_of_rank, rounds, np.full((num_nodes, num_nodes), 1e9), 0.2, 10**7)
    assert sent.shape == (len(rounds), num_nodes)
    assert (sent > 0).all() and (received > 0).all()
