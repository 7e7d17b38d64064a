"""Rows that leave come home; dispatch and combine are each the other's adjoint; micro-batches do not mix."""

import itertools

import numpy as np
import pytest
import torch
from round_trips import (
    check_backward,
    check_forward,
    check_pools_are_free,
    check_two_at_once,
    go,
    make_round_trip,
    run_backward,
    run_both_ways,
    run_forward,
)
from small import make_dispatcher, open_small_dispatcher, record_sends

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.comm.transport import HOMEWARD, Direction
from hpcmoe.dispatch.dispatcher import ExchangeId
from hpcmoe.wait import gather_to_all

HIDDEN, TOP_K, SLOTS = 4, 3, 2
SHAPES = [(1, False), (2, False), (2, True), (4, False), (3, True)]  # nodes, once
SIZES = {"slots": SLOTS, "top_k": TOP_K, "num_in_flight": 2, "batch_rows": 7, "message_tokens": 4, "pool_rows": 60,
         "messages_at_once": 1}  # fmt: skip


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]} nodes{', once' * shape[1]}")
def shape(comm, request):
    """Nodes, no more than ranks, and whether tokens go once to each."""
    num_nodes, once = request.param
    if num_nodes > comm.size:
        pytest.skip(f"needs {num_nodes} ranks")
    return {"num_nodes": num_nodes, "once": once}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_order", "deterministic"), [(True, True), (True, False), (False, False)])
def test_experts_alone_on_a_rank_map_every_kept_assignment(dtype, in_order, deterministic):
    dispatcher = make_dispatcher(
        HIDDEN, slots=4, top_k=TOP_K, dtype=dtype, in_order=in_order, deterministic=deterministic
    )
    round_trip = make_round_trip(dispatcher, 9, seed=1)
    assert 0 < round_trip.kept.sum() < 9 * TOP_K
    go(dispatcher, run_forward(dispatcher, round_trip))
    check_forward(dispatcher, round_trip)
    assert round_trip.output.dtype == dtype


@pytest.mark.mpi
@pytest.mark.parametrize(("in_order", "deterministic"), [(True, True), (True, False), (False, False)])
def test_identity_experts_give_every_kept_assignment_back(comm, shape, monkeypatch, in_order, deterministic):
    monkeypatch.setattr("round_trips.map_of", lambda slot, hidden: torch.eye(hidden))
    order = {"in_order": in_order, "deterministic": deterministic}
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES, **order) as dispatcher:
        for num_tokens in (20, (7 * comm.rank) % 13, 1):  # some ranks have none
            round_trip = make_round_trip(dispatcher, num_tokens, seed=num_tokens)
            go(dispatcher, run_forward(dispatcher, round_trip))
            assert torch.equal(round_trip.output, round_trip.x * round_trip.gates.sum(dim=1, keepdim=True))
        check_pools_are_free(dispatcher)


def dot(comm, a, b):
    """Inner product over all ranks, in float64."""
    return all_reduce(comm, np.array([(a.double() * b.double()).sum().item()]))[0]


@pytest.mark.mpi
@pytest.mark.parametrize("deterministic", [True, False])
def test_each_way_is_the_others_adjoint(comm, shape, deterministic):
    """<output, grad> = <x, grad_x> = sum of gates times gate gradients, and each is what its definition says."""
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES, deterministic=deterministic) as dispatcher:
        for seed in range(6):
            num_tokens = (7 * comm.rank + 5 * seed) % 21
            round_trip = make_round_trip(dispatcher, num_tokens, seed, kept_share=seed / 5)
            go(dispatcher, run_both_ways(dispatcher, round_trip))
            check_forward(dispatcher, round_trip)
            check_backward(dispatcher, round_trip)
            whole = dot(comm, round_trip.output, round_trip.grad)
            assert (
                whole == dot(comm, round_trip.x, round_trip.grad_x) == dot(comm, round_trip.gates, round_trip.grad_gate)
            )
            assert (whole != 0) == (seed > 0)
        check_pools_are_free(dispatcher)


@pytest.mark.mpi
@pytest.mark.parametrize("favourite", [0, -1])
def test_all_assignments_may_go_to_one_slot(comm, shape, favourite):
    """Nine of ten ranks' experts get nothing, and one all: in pieces, through a pool that holds a message or two."""
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES) as dispatcher:
        favourite %= SLOTS * comm.size
        round_trip = make_round_trip(dispatcher, 20, seed=2, favourite=favourite)
        go(dispatcher, run_both_ways(dispatcher, round_trip))
        check_forward(dispatcher, round_trip)
        check_backward(dispatcher, round_trip)
        rows = sum(len(x) for seen in round_trip.seen for _, x in seen)
        everyone = sum(gather_to_all(comm, int(round_trip.kept.sum())))
        assert rows == (everyone if favourite // SLOTS == comm.rank else 0)


@pytest.mark.mpi
def test_experts_get_the_rows_of_their_slots_and_no_others(comm, shape):
    """Each token says where its assignments go; what a batch calls a slot's rows are those."""
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES | {"top_k": 1}) as dispatcher:
        round_trip = make_round_trip(dispatcher, 17, seed=3)
        round_trip.x = torch.from_numpy(round_trip.slots).float().expand(-1, HIDDEN).contiguous()
        go(dispatcher, run_forward(dispatcher, round_trip))
        taken = np.zeros(comm.size * SLOTS, int)
        for slot, rows in itertools.chain(*round_trip.seen):
            number = comm.rank * SLOTS + slot
            assert (rows == number).all() and len(rows) <= 1.5 * dispatcher.sizes.batch_rows
            taken[number] += len(rows)
        expected = np.bincount(round_trip.slots[round_trip.kept], minlength=len(taken))
        assert np.array_equal(sum(gather_to_all(comm, taken)), sum(gather_to_all(comm, expected)))


@pytest.mark.mpi
def test_two_micro_batches_under_way_do_not_mix(comm, shape):
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES, deterministic=False) as dispatcher:
        for seed in range(5):
            check_two_at_once(dispatcher, 19, seed)


@pytest.mark.mpi
def test_the_way_back_meets_the_same_batches(comm, shape):
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES) as dispatcher:
        round_trip = make_round_trip(dispatcher, 20, seed=4)
        go(dispatcher, run_forward(dispatcher, round_trip))
        go(dispatcher, run_backward(dispatcher, round_trip))
        assert round_trip.backward_order == list(range(len(round_trip.batches)))


@pytest.mark.mpi
def test_traffic_is_counted_by_direction_and_peer(comm, shape):
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES) as dispatcher:
        round_trip = make_round_trip(dispatcher, 18, seed=5)
        go(dispatcher, run_both_ways(dispatcher, round_trip))
        traffic, routes = dispatcher.pop_traffic(), dispatcher.routes

        # Assignments are counted by their rank; rows by who receives them: a token once in each message, a local peer's
        # for each assignment.
        rank_of_assignment = round_trip.slots // SLOTS
        assert (
            traffic.assignments[0].tolist()
            == np.bincount(rank_of_assignment[round_trip.kept], minlength=comm.size).tolist()
        )
        rows = np.zeros(comm.size, int)
        rows[routes.local_peers] = traffic.assignments[0][routes.local_peers]
        node_of_rank = np.arange(comm.size) * shape["num_nodes"] // comm.size
        for t in range(18):
            away = [r for r in rank_of_assignment[t][round_trip.kept[t]] if r not in routes.local_peers]
            if shape["once"]:
                for node in {node_of_rank[r] for r in away}:
                    rows[next(r for r in routes.receivers if node_of_rank[r] == node)] += 1
            else:
                rows[list(set(away))] += 1
        receives = np.isin(np.arange(comm.size), routes.local_peers) & shape["once"]  # for local peers besides
        for direction in (Direction.DISPATCH, Direction.COMBINE_BACKWARD):
            assert traffic.rows[direction][~receives].tolist() == rows[~receives].tolist()
            assert (traffic.rows[direction] >= rows).all()

        # What went out came home, row for row and link for link.
        of_all = np.stack(gather_to_all(comm, traffic.rows), axis=1)  # [4, P, P]
        for out, back in HOMEWARD.items():
            assert np.array_equal(of_all[out], of_all[back].T)
        again = dispatcher.pop_traffic()
        assert not again.rows.any() and not again.assignments


@pytest.mark.mpi
def test_messages_are_a_header_and_messages_to_each_receiver(comm, shape):
    with open_small_dispatcher(comm, HIDDEN, **shape, **SIZES | {"message_tokens": 20, "pool_rows": 200}) as dispatcher:
        round_trip, sends = make_round_trip(dispatcher, 20, seed=6), record_sends(dispatcher.transport)
        go(dispatcher, run_forward(dispatcher, round_trip))
        others = len(dispatcher.routes.receivers)
        sent = len(round_trip.plan.messages)
        everyone = gather_to_all(comm, [dispatcher.routes.receivers[p.receiver] for p in round_trip.plan.messages])
        returned = sum(list(receivers).count(comm.rank) for receivers in everyone)
        assert len(sends) == others + sent + returned
        assert sent <= others


@pytest.mark.mpi
def test_nothing_is_announced_before_it_has_been_read(comm):
    """A rank that is far ahead waits with its next exchange until its local peers have read the last but one."""
    with open_small_dispatcher(comm, HIDDEN, **SIZES) as dispatcher:
        round_trip = make_round_trip(dispatcher, 5, seed=7, kept_share=0.0)
        exchange, handles = ExchangeId(0, 0, Direction.DISPATCH), []
        for number in range(1, 4):
            assert dispatcher.poll_ready(round_trip.plan, exchange) == (number < 3)
            if number < 3:
                handles.append(dispatcher.dispatch(round_trip.plan, round_trip.x, round_trip.gates, exchange))
            assert dispatcher.poll_results(handles[-1])  # it has no assignments
        comm.Barrier()
        for handle in handles:  # nobody has read so far
            handle.arrivals.poll()
        comm.Barrier()
        assert dispatcher.poll_ready(round_trip.plan, exchange)


def test_what_the_experts_take_is_padded_to_a_few_sizes_and_the_rest_counts_for_nothing():
    dispatcher = make_dispatcher(HIDDEN, top_k=1, slots=1, tokens=300)
    round_trip = make_round_trip(dispatcher, 300, seed=8, kept_share=1.0)
    exchange = ExchangeId(0, 0, Direction.DISPATCH)
    handle = dispatcher.dispatch(round_trip.plan, round_trip.x, round_trip.gates, exchange)
    places = handle.arrivals.find_rows(next(dispatcher.receive(handle)))
    for count in (1, 63, 65, 200, 297):
        rows, numbers = dispatcher.gather(places[:count])
        assert count <= len(rows) == len(numbers) <= 1.04 * count
        assert torch.equal(rows[:count], round_trip.x[:count]) and not numbers[count:].any()
        before = dispatcher.window.rows.copy()
        dispatcher.scatter(rows * 0 + 5, places[:count], numbers)
        changed = np.flatnonzero((before != dispatcher.window.rows).any(axis=1))
        assert set(changed) <= set(places[:count].tolist())


def test_the_announced_bytes_are_those_allocated():
    dispatcher = make_dispatcher(HIDDEN, num_in_flight=2)
    arrays = [getattr(dispatcher.window, name) for name in dispatcher.window.sizes.arrays(1)]
    held = sum(-(-array.nbytes // 4096) * 4096 for array in arrays)
    sent = sum(buffers.send.nbytes for buffers in dispatcher.in_flight_buffers)
    assert dispatcher.buffer_bytes == held + sent
