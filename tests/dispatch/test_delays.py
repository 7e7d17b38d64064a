"""Slow and silent ranks corrupt nothing: random hesitation everywhere, over hundreds of seeds, with hardly any room."""

import random
import time

import pytest
import torch
from journeys import check_backward, check_forward, check_pools_are_free, go, make_round_trip, run_both_ways
from small import open_small_exchange

from hpcmoe.comm.transport import MessageRequest
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.sizes import fit_parcels

HIDDEN, TOP_K, SLOTS, TOKENS, PARCEL_TOKENS = 4, 3, 2, 8, 2
SHAPES = [(1, False), (2, False), (2, True), (3, True), (4, False)]  # nodes, once
SEEDS = [range(4), pytest.param(range(4, 14), marks=pytest.mark.full)]
MODES = {"deterministic": (True, True), "in order": (True, False), "by arrival": (False, False)}


class RandomDelays:
    """Decides by seed when to do nothing, and when to do something late."""

    def __init__(self):
        self.begin(0, 0)

    def begin(self, rank, seed):
        """Take on another rhythm: some ranks are mostly silent, some never."""
        self.random = random.Random(f"{rank} {seed}")
        self.idle, self.late = self.random.choice([0.0, 0.2, 0.6]), self.random.choice([0.0, 0.01, 0.05])

    def hesitate(self):
        """Whether to let an occasion pass."""
        return self.random.random() < self.idle

    def sleep(self):
        """Be late, now and then."""
        if self.random.random() < self.late:
            time.sleep(self.random.choice([0, 1e-5, 1e-4, 5e-4]))


def delay_everything(exchange, delays, monkeypatch):
    """Have progress, sight and every word on the board come late; messages hesitate in the transport."""
    poke, look, sync = exchange.poke, Arrivals.look, exchange.window.sync
    monkeypatch.setattr(Arrivals, "look", lambda self: [] if delays.hesitate() else look(self))
    monkeypatch.setattr(exchange, "poke", lambda: not delays.hesitate() and poke())
    monkeypatch.setattr(exchange.window, "sync", lambda: (delays.sleep(), sync(), delays.sleep()))
    late = LateSends(exchange.transport, delays)
    monkeypatch.setattr(exchange.transport, "send_rows", late.send_rows)
    monkeypatch.setattr(exchange.transport, "poke", late.poke)


class LateSends:
    """Reads the rows of a message late, as MPI does with long ones: whoever writes them too early spoils them."""

    def __init__(self, transport, delays):
        self.delays, self.send, self.progress = delays, transport.send_rows, transport.poke
        self.waiting, self.under_way = [], []

    def send_rows(self, rows, peer, tag):
        """Note the message down."""
        request = MessageRequest()
        self.waiting.append((rows, peer, tag, request))
        return request

    def poke(self):
        """Send what was noted down, in order, when it is time."""
        while self.waiting and not self.delays.hesitate():
            *message, request = self.waiting.pop(0)
            self.under_way.append((self.send(*message), request))
        moved = self.progress()
        for sent, request in self.under_way:
            request.done = sent.done
        self.under_way = [entry for entry in self.under_way if not entry[1].done]
        return moved


def fit(shape, room):
    """The smallest pool, or one in which a parcel may lie in another's way."""
    served = SLOTS * (2 if shape[1] else 1)  # of a node of two ranks at least
    wanted = (PARCEL_TOKENS, 30 * room, 30 * room + 25, min(TOP_K, served), 4 * HIDDEN)
    tokens, rows, at_once = fit_parcels(*wanted)
    assert tokens == PARCEL_TOKENS
    return {"parcel_tokens": tokens, "pool_rows": rows, "parcels_at_once": at_once}


def slowly(way, delays):
    """Sleep between the pieces of a way."""
    for _ in way:
        delays.sleep()
        yield


def run(exchange, delays, seed, **how):
    """Two micro-batches there and back, one of them full, at this seed's pace -> the round_trips."""
    delays.begin(exchange.routes.rank, f"{seed} {how.pop('again', 0)}")
    shares = random.Random(seed)
    counts = [TOKENS, shares.randrange(TOKENS + 1) * (exchange.routes.rank != seed % 3)]
    favourite = shares.choice([None, None, shares.randrange(len(exchange.routes.place_of_slot))])
    how |= {"favourite": favourite, "kept_share": shares.choice([0.2, 0.9, 1.0])}
    round_trips = [make_round_trip(exchange, count, seed, berth, **how) for berth, count in enumerate(counts)]
    ways = [run_both_ways(exchange, round_trip) for round_trip in round_trips]
    shares = random.Random(f"{exchange.routes.rank} {seed}")  # from here on ranks differ
    go(exchange, *(slowly(way, delays) for way in shares.sample(ways, 2)))
    return round_trips


@pytest.fixture(params=[(shape, mode) for shape in SHAPES for mode in MODES],
                ids=lambda p: f"{p[0][0]} nodes{', once' * p[0][1]}, {p[1]}")  # fmt: skip
def slow(comm, request, monkeypatch):
    """Open an exchange in which everything dawdles -> (exchange, delays, mode)."""
    shape, mode = request.param
    if shape[0] > comm.size:
        pytest.skip(f"needs {shape[0]} ranks")
    in_order, deterministic = MODES[mode]
    delays, room = RandomDelays(), list(MODES).index(mode)
    with open_small_exchange(
        comm, HIDDEN, num_nodes=shape[0], once=shape[1], hesitate=lambda: delays.hesitate(), slots=SLOTS, top_k=TOP_K,
        tokens=TOKENS, num_berths=2, batch_rows=9, expert_rows=40, in_order=in_order, deterministic=deterministic,
        **fit(shape, room),
    ) as exchange:  # fmt: skip
        delay_everything(exchange, delays, monkeypatch)
        yield exchange, delays, mode


@pytest.mark.mpi
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_delays_change_nothing(slow, seeds):
    exchange, delays, _ = slow
    for seed in seeds:
        for round_trip in run(exchange, delays, seed):
            check_forward(exchange, round_trip)
            check_backward(exchange, round_trip)
        check_pools_are_free(exchange)


@pytest.mark.mpi
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_delays_change_the_order_of_work_only_where_they_may(slow, seeds):
    """With deterministic work every sum is the same bit for bit; else the same rows still meet in the same batches."""
    exchange, delays, mode = slow
    for seed in seeds[::3]:
        first, second = (run(exchange, delays, seed, whole=False, again=again) for again in range(2))
        for one, other in zip(first, second, strict=True):
            if mode == "deterministic":
                assert batches_of(one) == batches_of(other) and one.backward_order == other.backward_order
                assert sums_of(one) == sums_of(other)
            if mode != "by arrival":
                assert sorted(batches_of(one)) == sorted(batches_of(other))
            assert torch.allclose(one.output, other.output, atol=1e-5)
            if exchange.routes.most_served == 0 or mode != "by arrival":
                assert torch.equal(one.output, other.output) and torch.equal(one.grad_x, other.grad_x)


def batches_of(round_trip):
    """What met in each batch, in order."""
    return [(batch.slips, batch.slip_of_row.tolist(), batch.offset_of_row.tolist()) for batch in round_trip.batches]


def sums_of(round_trip):
    """The gradients' sums by slot, added up in the order of the work."""
    total = {}
    for slot, grad in round_trip.weight_grads:
        total[slot] = grad + total.get(slot, 0)
    return {slot: grad.tolist() for slot, grad in total.items()}
