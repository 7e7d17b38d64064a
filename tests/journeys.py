"""Micro-batches that travel to experts who do a small linear map each, and what that must give by the definition."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from hpcmoe.comm.transport import Direction
from hpcmoe.wait import Backoff

DEADLINE_SECONDS = 300.0  # a journey that takes longer is stuck, however busy the machine is


def make_journey(exchange, num_tokens, seed, berth=0, kept_share=0.8, whole=True, favourite=None):
    """A micro-batch of this rank, with slots, gates and rows by seed; whole numbers have exact sums in any order.

    favourite: a slot to which all tokens go, and only there. As a router's, a token's slots all differ.
    """
    sizes, routes = exchange.sizes, exchange.routes
    random = np.random.default_rng([routes.rank, seed, berth])
    num_slots = len(routes.place_of_slot)
    shape = (num_tokens, min(sizes.top_k, num_slots))
    slots = random.permuted(np.tile(np.arange(num_slots), (num_tokens, 1)), axis=1)[:, : shape[1]]
    kept = random.random(shape) < kept_share
    if favourite is not None:
        slots = (favourite + np.tile(np.arange(shape[1]), (num_tokens, 1))) % num_slots
        kept[:, 1:] = False
    gates = random.integers(1, 4, shape) / 2 if whole else random.random(shape)
    draw = (lambda *shape: random.integers(-3, 4, shape)) if whole else (lambda *shape: random.standard_normal(shape))
    return SimpleNamespace(
        layer=0,
        micro_batch=berth,
        berth=berth,
        slots=slots,
        kept=kept,
        plan=exchange.make_plan(slots, kept),
        gates=torch.from_numpy(gates * kept).float(),
        x=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
        grad=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
        batches=[],  # in the order in which they were worked on
        seen=[],  # rows that this rank's experts took, batch by batch, chunk by chunk
    )


def map_of(slot, hidden):
    """The matrix [H, H] of the expert in a slot of the group."""
    return torch.from_numpy(np.random.default_rng(slot).integers(-1, 2, (hidden, hidden))).float()


def travel_forward(exchange, journey):
    """Dispatch, compute and combine, leaving journey.output [T, H]; yields where it waits."""
    first_slot, hidden = exchange.routes.rank * exchange.routes.num_slots, exchange.sizes.hidden
    while not exchange.may_start(journey):
        yield
    exchange.start_outward(journey, journey.x, journey.gates, Direction.DISPATCH)
    for batch in exchange.batches(journey):
        if batch is None:
            yield
            continue
        places, seen = exchange.rows_of(journey, batch), []
        for part, slots in batch.portions(exchange.sizes.batch_rows):
            rows, _ = exchange.take(places[part])
            seen += zip([slot for slot, _ in slots], rows.split(spread(slots, rows)), strict=False)
            results = [own.float() @ map_of(first_slot + slot, hidden).T for slot, own in seen[-len(slots) :]]
            exchange.lay(torch.cat(results).to(rows.dtype), places[part])
            yield
        exchange.finish(journey, batch)
        journey.batches.append(batch)
        journey.seen.append(seen)
    while not exchange.is_home(journey):
        yield
    journey.output = exchange.sum_home(journey, journey.gates)


def travel_backward(exchange, journey):
    """Go back from journey.grad, leaving grad_x [T, H] and grad_gate [T, K]; yields where it waits.

    Also weight_grads, a list in the order of the work, and backward_order, the batches' numbers in it.
    """
    first_slot, hidden = exchange.routes.rank * exchange.routes.num_slots, exchange.sizes.hidden
    journey.weight_grads, journey.backward_order = [], []
    while not exchange.may_start(journey):
        yield
    exchange.start_outward(journey, journey.grad, journey.gates, Direction.COMBINE_BACKWARD)
    for number in exchange.batches_again(journey, journey.batches):
        if number is None:
            yield
            continue
        batch = journey.batches[number]
        journey.backward_order.append(number)
        places, seen = exchange.rows_of(journey, batch), iter(journey.seen[number])
        for part, slots in batch.portions(exchange.sizes.batch_rows):
            rows, gates = exchange.take(places[part])
            by_input, by_gate, lengths = [], [], spread(slots, rows)
            for grads, gates_of_slot in zip(rows.float().split(lengths), gates[:, None].split(lengths), strict=True):
                if len(by_input) == len(slots):
                    break
                slot, x = next(seen)
                matrix, weighed = map_of(first_slot + slot, hidden), gates_of_slot * grads
                by_input.append(weighed @ matrix)
                by_gate.append((grads * (x.float() @ matrix.T)).sum(dim=1))
                journey.weight_grads.append((slot, weighed.T @ x.float()))
            exchange.lay(torch.cat(by_input), places[part], torch.cat(by_gate))
            yield
        assert next(seen, None) is None
        exchange.finish(journey, batch)
    while not exchange.is_home(journey):
        yield
    journey.grad_x = exchange.sum_home(journey, torch.ones_like(journey.gates))
    journey.grad_gate = exchange.numbers_home(journey)


def spread(slots, rows):
    """How many of the rows [m, H] each slot has, and how many are too many."""
    lengths = [count for _, count in slots]
    assert sum(lengths) <= len(rows)
    return [*lengths, len(rows) - sum(lengths)]


def travel_both_ways(exchange, journey):
    """Go forward and back."""
    yield from travel_forward(exchange, journey)
    yield from travel_backward(exchange, journey)


def go(exchange, *ways):
    """Take all ways to their ends, then wait until this rank owes nobody anything."""
    backoff, deadline = Backoff(), time.monotonic() + DEADLINE_SECONDS
    ways = list(ways)
    while ways or not exchange.is_idle:
        assert time.monotonic() < deadline, "stuck"
        news = exchange.count_news()
        moved = exchange.poke()
        ways = [way for way in ways if next(way, way) is not way]
        if moved:
            backoff.reset()
        else:
            exchange.wait_for_news(backoff, news)


def check_two_at_once(exchange, num_tokens, seed):
    """Take two micro-batches both ways at once, half the ranks beginning with the second, and check both."""
    journeys = [make_journey(exchange, num_tokens, seed, berth) for berth in range(2)]
    in_order = journeys if exchange.transport.rank % 2 == 0 else journeys[::-1]
    go(exchange, *[travel_both_ways(exchange, journey) for journey in in_order])
    for journey in journeys:
        check_forward(exchange, journey)
        check_backward(exchange, journey)


def check_forward(exchange, journey):
    """The output is the sum of the kept copies' maps of their token, times their gates."""
    assert torch.equal(journey.output.float(), expected_output(journey, exchange.sizes.hidden))


def check_backward(exchange, journey):
    """The gradients of tokens and gates are those of <output, grad>."""
    hidden = exchange.sizes.hidden
    assert torch.equal(journey.grad_x.float(), expected_grad_x(journey, hidden))
    assert torch.equal(journey.grad_gate.float(), expected_grad_gate(journey, hidden))


def maps_of_copies(journey, hidden):
    """The matrix of each copy [T, K, H, H], zero where it was dropped."""
    maps = torch.stack([map_of(slot, hidden) for slot in range(journey.slots.max(initial=0) + 1)])
    return maps[torch.from_numpy(journey.slots)] * torch.from_numpy(journey.kept)[:, :, None, None]


def expected_output(journey, hidden):
    """sum over k of gate * M x."""
    return torch.einsum("tk,tkij,tj->ti", journey.gates, maps_of_copies(journey, hidden), journey.x.float())


def expected_grad_x(journey, hidden):
    """sum over k of gate * M^T grad."""
    return torch.einsum("tk,tkij,ti->tj", journey.gates, maps_of_copies(journey, hidden), journey.grad.float())


def expected_grad_gate(journey, hidden):
    """grad . M x of each copy."""
    return torch.einsum("ti,tkij,tj->tk", journey.grad.float(), maps_of_copies(journey, hidden), journey.x.float())


def check_all_is_given_back(exchange):
    """No row of any pool is taken any more."""
    for berth, pool in enumerate(exchange.hall.pools):
        first = exchange.window.first_row + exchange.sizes.num_berths * exchange.sizes.home_window_rows
        whole = [(first + berth * exchange.sizes.pool_rows, exchange.sizes.pool_rows)]
        assert pool.runs == (whole if exchange.sizes.pool_rows else [])
