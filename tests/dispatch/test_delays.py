"""Slow and silent ranks corrupt nothing: random hesitation everywhere, over hundreds of seeds, with hardly any room."""

import random
import time

import pytest
import torch
from round_trips import check_backward, check_forward, check_pools_are_free, go, make_round_trip, run_both_ways
from small import open_small_dispatcher

from hpcmoe.comm.transport import MessageRequest
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.sizes import fit_messages

HIDDEN, TOP_K, SLOTS, TOKENS, MESSAGE_TOKENS = 4, 3, 2, 8, 2
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


def delay_everything(dispatcher, delays, monkeypatch):
    """Have progress, sight and every word on the descriptor table come late; messages hesitate in the transport."""
    poke, look, sync = dispatcher.poke, Arrivals.poll, dispatcher.window.sync
    monkeypatch.setattr(Arrivals, "poll", lambda self: [] if delays.hesitate() else look(self))
    monkeypatch.setattr(dispatcher, "poke", lambda: not delays.hesitate() and poke())
    monkeypatch.setattr(dispatcher.window, "sync", lambda: (delays.sleep(), sync(), delays.sleep()))
    late = LateSends(dispatcher.transport, delays)
    monkeypatch.setattr(dispatcher.transport, "send_rows", late.send_rows)
    monkeypatch.setattr(dispatcher.transport, "poke", late.poke)


class LateSends:
    """Reads the rows of a message late, as MPI does with long ones: whoever writes them too early spoils them."""

    def __init__(self, transport, delays):
        self.delays, self.send, self.progress = delays, transport.send_rows, transport.poke
        self.waiting, self.under_way = [], []

    def send_rows(self, rows, peer, tag):
        """Note the message down."""
        request = MessageRequest(sends=True)
        self.waiting.append((rows, peer, tag, request))
        return request

    def poke(self):
        """Send what was noted down, in order, when it is time."""
        while self.waiting and not self.delays.hesitate():
            *message, request = self.waiting.pop(0)
            self.under_way.append((self.send(*message), request))
        moved = self.progress()
        for sent, request in self.under_way:
            if sent.done:
                request.complete()
        self.under_way = [entry for entry in self.under_way if not entry[1].done]
        return moved


def fit(shape, room):
    """The smallest pool, or one in which a message may lie in another's way."""
    served = SLOTS * (2 if shape[1] else 1)  # of a node of two ranks at least
    wanted = (MESSAGE_TOKENS, 30 * room, 30 * room + 25, min(TOP_K, served), 4 * HIDDEN)
    tokens, rows, at_once = fit_messages(*wanted)
    assert tokens == MESSAGE_TOKENS
    return {"message_tokens": tokens, "pool_rows": rows, "messages_at_once": at_once}


def slowly(way, delays):
    """Sleep between the pieces of a way."""
    for _ in way:
        delays.sleep()
        yield


def run(dispatcher, delays, seed, **how):
    """Two micro-batches there and back, one of them full, at this seed's pace -> the round_trips."""
    delays.begin(dispatcher.routes.rank, f"{seed} {how.pop('again', 0)}")
    shares = random.Random(seed)
    counts = [TOKENS, shares.randrange(TOKENS + 1) * (dispatcher.routes.rank != seed % 3)]
    favourite = shares.choice([None, None, shares.randrange(len(dispatcher.routes.place_of_slot))])
    how |= {"favourite": favourite, "kept_share": shares.choice([0.2, 0.9, 1.0])}
    round_trips = [
        make_round_trip(dispatcher, count, seed, micro_batch, **how) for micro_batch, count in enumerate(counts)
    ]
    ways = [run_both_ways(dispatcher, round_trip) for round_trip in round_trips]
    shares = random.Random(f"{dispatcher.routes.rank} {seed}")  # from here on ranks differ
    go(dispatcher, *(slowly(way, delays) for way in shares.sample(ways, 2)))
    return round_trips


@pytest.fixture(params=[(shape, mode) for shape in SHAPES for mode in MODES],
                ids=lambda p: f"{p[0][0]} nodes{', once' * p[0][1]}, {p[1]}")  # fmt: skip
def slow(comm, request, monkeypatch):
    """Open an exchange in which everything is delayed at random -> (dispatcher, delays, mode)."""
    shape, mode = request.param
    if shape[0] > comm.size:
        pytest.skip(f"needs {shape[0]} ranks")
    in_order, deterministic = MODES[mode]
    delays, room = RandomDelays(), list(MODES).index(mode)
    with open_small_dispatcher(
        comm, HIDDEN, num_nodes=shape[0], once=shape[1], hesitate=lambda: delays.hesitate(), slots=SLOTS, top_k=TOP_K,
        tokens=TOKENS, num_in_flight=2, batch_rows=9, expert_rows=40, in_order=in_order, deterministic=deterministic,
        **fit(shape, room),
    ) as dispatcher:  # fmt: skip
        delay_everything(dispatcher, delays, monkeypatch)
        yield dispatcher, delays, mode


@pytest.mark.mpi
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_delays_change_nothing(slow, seeds):
    dispatcher, delays, _ = slow
    for seed in seeds:
        for round_trip in run(dispatcher, delays, seed):
            check_forward(dispatcher, round_trip)
            check_backward(dispatcher, round_trip)
        check_pools_are_free(dispatcher)


@pytest.mark.mpi
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_delays_change_the_order_of_work_only_where_they_may(slow, seeds):
    """With deterministic work every sum is the same bit for bit; else the same rows still meet in the same batches."""
    dispatcher, delays, mode = slow
    for seed in seeds[::3]:
        first, second = (run(dispatcher, delays, seed, whole=False, again=again) for again in range(2))
        for one, other in zip(first, second, strict=True):
            if mode == "deterministic":
                assert batches_of(one) == batches_of(other) and one.backward_order == other.backward_order
                assert sums_of(one) == sums_of(other)
            if mode != "by arrival":
                assert sorted(batches_of(one)) == sorted(batches_of(other))
            assert torch.allclose(one.output, other.output, atol=1e-5)
            if dispatcher.routes.most_served == 0 or mode != "by arrival":
                assert torch.equal(one.output, other.output) and torch.equal(one.grad_x, other.grad_x)


def batches_of(round_trip):
    """What met in each batch, in order."""
    return [
        (batch.descriptors, batch.descriptor_of_row.tolist(), batch.offset_of_row.tolist())
        for batch in round_trip.batches
    ]


def sums_of(round_trip):
    """The gradients' sums by slot, added up in the order of the work."""
    total = {}
    for slot, grad in round_trip.weight_grads:
        total[slot] = grad + total.get(slot, 0)
    return {slot: grad.tolist() for slot, grad in total.items()}
