"""Every slot has one way from each rank, every message one receiver, and each rank hears of every other once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.dispatch.routes import make_routes


@st.composite
def clusters(draw):
    """node_of_rank [P], in any order, once [nodes, nodes], slots of a rank."""
    num_nodes = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(0, num_nodes - 1), max_size=5))
    node_of_rank = np.array(draw(st.permutations([*range(num_nodes), *more])))
    once = np.array(draw(st.lists(st.booleans(), min_size=num_nodes**2, max_size=num_nodes**2)))
    return node_of_rank, once.reshape(num_nodes, num_nodes), draw(st.integers(1, 3))


def routes_of_all(cluster):
    node_of_rank, once, num_slots = cluster
    return [make_routes(node_of_rank, rank, num_slots, once) for rank in range(len(node_of_rank))]


@given(clusters())
def test_every_slot_has_one_place_and_each_way_one_run_of_places(cluster):
    node_of_rank, once, num_slots = cluster
    for rank, routes in enumerate(routes_of_all(cluster)):
        assert sorted(routes.place_of_slot) == list(range(len(node_of_rank) * num_slots))
        rank_of_place = np.argsort(routes.place_of_slot) // num_slots
        edges = routes.edges.tolist()
        assert edges[0] == routes.num_places == len(routes.local_peers) * num_slots and edges[-1] == len(rank_of_place)
        assert rank_of_place[: edges[0]].tolist() == np.repeat(routes.local_peers, num_slots).tolist()
        assert routes.local_peers.tolist() == np.flatnonzero(node_of_rank == node_of_rank[rank]).tolist()
        assert routes.local_peers[routes.local_index] == rank

        # A message serves the one rank that lands it, or all of that rank's node.
        for receiver, begin, end in zip(routes.receivers, edges, edges[1:], strict=False):
            served, node = np.unique(rank_of_place[begin:end]).tolist(), node_of_rank[receiver]
            assert node != node_of_rank[rank] and (end - begin) <= routes.most_served
            whole = np.flatnonzero(node_of_rank == node).tolist()
            assert served == (whole if once[node_of_rank[rank], node] else [receiver])
        assert len(routes.receivers) == len(edges) - 1


@given(clusters())
def test_whoever_sends_a_message_is_expected_where_it_lands_and_no_one_else(cluster):
    everyone = routes_of_all(cluster)
    sent = {(rank, int(receiver)) for rank, routes in enumerate(everyone) for receiver in routes.receivers}
    expected = [(sender, rank) for rank, routes in enumerate(everyone) for sender in routes.senders]
    assert sorted(sent) == sorted(expected)
    node_of_rank, once, _ = cluster
    for rank, routes in enumerate(everyone):
        for sender, served in zip(routes.senders, routes.served, strict=True):
            alone = [routes.local_index]
            assert list(served) == (
                list(range(len(routes.local_peers))) if once[node_of_rank[sender], node_of_rank[rank]] else alone
            )
        assert max(len(everyone[local_peer].senders) for local_peer in routes.local_peers) == routes.max_senders


@given(clusters())
def test_each_rank_hears_of_every_other_where_its_rows_are_announced(cluster):
    everyone, (node_of_rank, once, _) = routes_of_all(cluster), cluster
    for rank, routes in enumerate(everyone):
        heard = set()
        for peer, (publisher, message) in enumerate(zip(routes.publishers, routes.inbound_index, strict=True)):
            owner = routes.local_peers[publisher]
            if peer in routes.local_peers:
                assert (owner, message) == (peer, -1)
            else:
                assert everyone[owner].senders[message] == peer
                assert once[node_of_rank[peer], node_of_rank[rank]] or owner == rank
            heard.add((owner, message))
        assert len(heard) == len(everyone)


@given(clusters())
def test_local_peers_meet_the_other_nodes_in_the_same_order(cluster):
    """So that what one lands in order is what all of them wait for in order."""
    for routes in routes_of_all(cluster):
        peers = np.concatenate(routes.peers_by_node).tolist()
        assert sorted(peers) == list(range(len(routes.publishers))) and peers[0] == routes.rank
        assert sorted(peers[: len(routes.local_peers)]) == routes.local_peers.tolist()
        assert [peer for peer in peers if peer in routes.senders] == list(routes.senders)


@given(clusters())
def test_in_the_same_order_all_ranks_meet_all_peers_alike(cluster):
    """And so an expert's rows are in the same order wherever it is; who lands what is as before."""
    node_of_rank, once, num_slots = cluster
    orders = set()
    for rank in range(len(node_of_rank)):
        routes, usual = (make_routes(node_of_rank, rank, num_slots, once, same) for same in (True, False))
        peers = np.concatenate(routes.peers_by_node).tolist()
        orders.add(tuple(peers))
        assert sorted(peers) == list(range(len(node_of_rank)))
        assert [peer for peer in peers if peer in routes.senders] == list(routes.senders)
        assert sorted(routes.senders) == sorted(usual.senders) and (routes.receivers == usual.receivers).all()
    assert len(orders) == 1


def test_the_receivers_of_a_node_are_shared_out_over_its_ranks():
    node_of_rank = np.repeat([0, 1, 2], 4)
    for rank in range(4):
        routes = make_routes(node_of_rank, rank, 1, np.ones((3, 3), bool))
        assert routes.receivers.tolist() == [4 + rank, 8 + rank] and routes.senders == (4 + rank, 8 + rank)
    assert routes.min_local_peers == 4 and routes.most_served == 4 and routes.max_senders == 2
