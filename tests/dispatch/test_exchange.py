"""Rows that leave come home; dispatch and combine are each the other's adjoint; buffers and traffic are counted."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import make_exchange

from hpcmoe.comm.mpi import all_reduce, open_mpi_transport
from hpcmoe.comm.transport import Direction, Loopback
from hpcmoe.dispatch.plan import make_plan, make_send_order

HIDDEN, TOP_K, SLOTS = 4, 3, 2


def make_flight(exchange, num_tokens, seed=0, berth=0, kept_share=0.8):
    """A micro-batch with random slots, some copies dropped, and its Plan. Collective over the transport's ranks."""
    transport = exchange.transport
    random = np.random.default_rng([transport.rank, seed])
    slots = random.integers(0, transport.size * SLOTS, (num_tokens, TOP_K))
    order = make_send_order(slots.ravel(), random.random(slots.size) < kept_share)
    sent = np.bincount(slots.ravel()[order], minlength=transport.size * SLOTS).reshape(transport.size, SLOTS)
    plan = make_plan(slots, order, sent, transport.start_counts(sent)())
    return SimpleNamespace(plan=plan, berth=berth, layer=0, micro_batch=berth)


def dispatch(exchange, flight, x):
    """Send the tokens x [T, H] -> rows at their experts [R, H], as they lie in the receive buffer."""
    exchange.start_outward(flight, x, torch.from_numpy(flight.plan.token_of_row), Direction.DISPATCH)
    arrived = torch.full((flight.plan.num_received, HIDDEN), torch.nan)
    for batch, rows in exchange.arrived_batches(flight):
        arrived[torch.from_numpy(batch.order)] = rows.float()
    return arrived


def combine(exchange, flight, y):
    """Send rows y [R, H] home, batch by batch, and sum each token's copies -> [T, H]."""
    for batch, _ in exchange.arrived_batches(flight):
        exchange.put_result(flight, batch, y[torch.from_numpy(batch.order)])
    exchange.start_homeward(flight, Direction.COMBINE)
    home = exchange.finish_homeward(flight).float()
    return torch.zeros(len(flight.plan.row_of_copy), HIDDEN).index_add(
        0, torch.from_numpy(flight.plan.token_of_row), home
    )


def draw_rows(count, seed):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [True, False])
def test_identity_experts_give_every_kept_copy_back(dtype, deterministic):
    exchange = make_exchange(Loopback(), HIDDEN, dtype=dtype, deterministic=deterministic)
    flight = make_flight(exchange, 9)
    x = draw_rows(9, seed=1).to(dtype)
    arrived = dispatch(exchange, flight, x)
    kept = np.bincount(flight.plan.token_of_row, minlength=9)
    assert 0 < kept.sum() < 9 * TOP_K
    assert torch.equal(combine(exchange, flight, arrived), x.float() * torch.from_numpy(kept)[:, None])


@pytest.fixture
def exchange(comm):
    """Open an exchange over MPI, its messages and batches of at most five rows, two berths. Collective."""
    with open_mpi_transport(comm, HIDDEN * 4, max_message_rows=5) as transport:
        yield make_exchange(transport, HIDDEN, num_berths=2, max_batch_rows=5)


def dot(comm, a, b):
    """Inner product over all ranks, in float64."""
    return all_reduce(comm, np.array([(a.double() * b.double()).sum().item()]))[0]


@pytest.mark.mpi
@pytest.mark.parametrize("deterministic", [True, False])
def test_combine_is_dispatchs_adjoint(comm, exchange, deterministic):
    """<dispatch(x), y> = <x, combine(y)> for any x and y: so each can be the other's backward."""
    exchange.sizes = dataclasses.replace(exchange.sizes, deterministic=deterministic)
    for seed in range(4):
        num_tokens = (7 * comm.rank + 5 * seed) % 13  # some ranks have none
        flight = make_flight(exchange, num_tokens, seed)
        x, y = draw_rows(num_tokens, seed + 10 * comm.rank), draw_rows(flight.plan.num_received, 99 - comm.rank)
        arrived = dispatch(exchange, flight, x)
        assert not arrived.isnan().any()
        left = dot(comm, arrived, y)
        assert left == pytest.approx(dot(comm, x, combine(exchange, flight, y)), rel=1e-5, abs=1e-5)


@pytest.mark.mpi
def test_experts_get_the_rows_of_their_slots(comm, exchange):
    """Each row carries its slot; what a batch calls a slot's rows are those."""
    flight = make_flight(exchange, 11)
    slot_of_row = np.repeat(np.arange(comm.size * SLOTS), flight.plan.sent_to_slot.ravel())
    rows = torch.from_numpy(slot_of_row).float()[:, None].expand(-1, HIDDEN)
    exchange.start_outward(flight, rows, None, Direction.COMBINE_BACKWARD)
    for batch, arrived in exchange.arrived_batches(flight):
        mine = comm.rank * SLOTS + np.repeat(np.arange(SLOTS), batch.rows_of_slot)
        assert torch.equal(arrived, torch.from_numpy(mine).float()[:, None].expand(-1, HIDDEN))
    exchange.start_homeward(flight, Direction.DISPATCH_BACKWARD)
    exchange.finish_homeward(flight)


@pytest.mark.mpi
def test_two_micro_batches_under_way_do_not_mix(comm, exchange):
    flights = [make_flight(exchange, 10, seed=berth, berth=berth) for berth in range(2)]
    xs = [draw_rows(10, seed=comm.rank + 100 * berth) for berth in range(2)]
    order = [torch.from_numpy(flight.plan.token_of_row) for flight in flights]
    ways = [1, -1][comm.rank % 2]  # half the ranks start the second first
    for flight, x, rows in list(zip(flights, xs, order, strict=True))[::ways]:
        exchange.start_outward(flight, x, rows, Direction.DISPATCH)
    for flight in flights:
        for batch, rows in exchange.arrived_batches(flight):
            exchange.put_result(flight, batch, 2 * rows)
        exchange.start_homeward(flight, Direction.COMBINE)
    for flight, x, rows in zip(reversed(flights), reversed(xs), reversed(order), strict=True):
        assert torch.equal(exchange.finish_homeward(flight), 2 * x[rows])


@pytest.mark.mpi
def test_traffic_is_counted_by_direction_and_peer(comm, exchange):
    flight = make_flight(exchange, 8)
    y = dispatch(exchange, flight, draw_rows(8, seed=0))
    combine(exchange, flight, y)
    traffic = exchange.take_traffic()
    assert traffic[Direction.DISPATCH].tolist() == flight.plan.send_counts.tolist()
    assert traffic[Direction.COMBINE].tolist() == flight.plan.recv_counts.tolist()
    assert not traffic[[Direction.COMBINE_BACKWARD, Direction.DISPATCH_BACKWARD]].any()
    assert not exchange.take_traffic().any()


def test_buffers_grow_where_more_rows_come_and_are_counted():
    exchange = make_exchange(Loopback(), HIDDEN, home_rows=60, expert_rows=10, num_berths=2)
    row_bytes = 4 * HIDDEN
    assert exchange.buffer_bytes == 2 * 2 * (60 + 10) * row_bytes

    # Twenty rows come to one berth: its experts' buffers grow to a quarter more, once.
    flight = make_flight(exchange, 20 // TOP_K + 1, kept_share=1.0)
    assert flight.plan.num_received == 21
    grown = 2 * 2 * 60 + 2 * 10 + 2 * 26
    for _ in range(2):
        x = draw_rows(7, seed=3)
        assert torch.equal(combine(exchange, flight, dispatch(exchange, flight, x)), TOP_K * x)
        assert exchange.buffer_bytes == grown * row_bytes


def test_waiting_for_rows_is_booked_to_dispatch_and_combine():
    exchange = make_exchange(Loopback(), HIDDEN, deterministic=False)
    flight = make_flight(exchange, 5)
    with exchange.clock.stage("compute"):
        combine(exchange, flight, dispatch(exchange, flight, draw_rows(5, seed=0)))
    assert set(exchange.clock.take()) == {"compute", "dispatch", "combine"}
