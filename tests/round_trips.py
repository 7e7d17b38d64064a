"""Micro-batches that travel to experts who do a small linear map each, and what that must give by the definition."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from hpcmoe.comm.transport import Direction
from hpcmoe.wait import Backoff

DEADLINE_SECONDS = 300.0  # a round_trip that takes longer is stuck, however busy the machine is


def make_round_trip(dispatcher, num_tokens, seed, buffer_index=0, kept_share=0.8, whole=True, favourite=None):
    """A micro-batch of this rank, with slots, gates and rows by seed; whole numbers have exact sums in any order.

    favourite: a slot to which all tokens go, and only there. As a router's, a token's slots all differ.
    """
    sizes, routes = dispatcher.sizes, dispatcher.routes
    random = np.random.default_rng([routes.rank, seed, buffer_index])
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
        micro_batch=buffer_index,
        buffer_index=buffer_index,
        slots=slots,
        kept=kept,
        plan=dispatcher.make_plan(slots, kept),
        gates=torch.from_numpy(gates * kept).float(),
        x=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
        grad=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
        batches=[],  # in the order in which they were worked on
        seen=[],  # rows that this rank's experts took, batch by batch, chunk by chunk
    )


def map_of(slot, hidden):
    """The matrix [H, H] of the expert in a slot of the group."""
    return torch.from_numpy(np.random.default_rng(slot).integers(-1, 2, (hidden, hidden))).float()


def run_forward(dispatcher, round_trip):
    """Dispatch, compute and combine, leaving round_trip.output [T, H]; yields where it waits."""
    first_slot, hidden = dispatcher.routes.rank * dispatcher.routes.num_slots, dispatcher.sizes.hidden
    while not dispatcher.poll_ready(round_trip):
        yield
    dispatcher.dispatch(round_trip, round_trip.x, round_trip.gates, Direction.DISPATCH)
    for batch in dispatcher.receive(round_trip):
        if batch is None:
            yield
            continue
        places, seen = dispatcher.find_rows(round_trip, batch), []
        for part, slots in batch.split_chunks(dispatcher.sizes.batch_rows):
            rows, _ = dispatcher.gather(places[part])
            seen += zip([slot for slot, _ in slots], rows.split(spread(slots, rows)), strict=False)
            results = [own.float() @ map_of(first_slot + slot, hidden).T for slot, own in seen[-len(slots) :]]
            dispatcher.scatter(torch.cat(results).to(rows.dtype), places[part])
            yield
        dispatcher.return_batch(round_trip, batch)
        round_trip.batches.append(batch)
        round_trip.seen.append(seen)
    while not dispatcher.poll_results(round_trip):
        yield
    round_trip.output = dispatcher.combine(round_trip, round_trip.gates)


def run_backward(dispatcher, round_trip):
    """Go back from journey.grad, leaving grad_x [T, H] and grad_gate [T, K]; yields where it waits.

    Also weight_grads, a list in the order of the work, and backward_order, the batches' numbers in it.
    """
    first_slot, hidden = dispatcher.routes.rank * dispatcher.routes.num_slots, dispatcher.sizes.hidden
    round_trip.weight_grads, round_trip.backward_order = [], []
    while not dispatcher.poll_ready(round_trip):
        yield
    dispatcher.dispatch(round_trip, round_trip.grad, round_trip.gates, Direction.COMBINE_BACKWARD)
    for number in dispatcher.receive_again(round_trip, round_trip.batches):
        if number is None:
            yield
            continue
        batch = round_trip.batches[number]
        round_trip.backward_order.append(number)
        places, seen = dispatcher.find_rows(round_trip, batch), iter(round_trip.seen[number])
        for part, slots in batch.split_chunks(dispatcher.sizes.batch_rows):
            rows, gates = dispatcher.gather(places[part])
            by_input, by_gate, lengths = [], [], spread(slots, rows)
            for grads, gates_of_slot in zip(rows.float().split(lengths), gates[:, None].split(lengths), strict=True):
                if len(by_input) == len(slots):
                    break
                slot, x = next(seen)
                matrix, weighed = map_of(first_slot + slot, hidden), gates_of_slot * grads
                by_input.append(weighed @ matrix)
                by_gate.append((grads * (x.float() @ matrix.T)).sum(dim=1))
                round_trip.weight_grads.append((slot, weighed.T @ x.float()))
            dispatcher.scatter(torch.cat(by_input), places[part], torch.cat(by_gate))
            yield
        assert next(seen, None) is None
        dispatcher.return_batch(round_trip, batch)
    while not dispatcher.poll_results(round_trip):
        yield
    round_trip.grad_x = dispatcher.combine(round_trip, torch.ones_like(round_trip.gates))
    round_trip.grad_gate = dispatcher.gather_gate_grads(round_trip)


def spread(slots, rows):
    """How many of the rows [m, H] each slot has, and how many are too many."""
    lengths = [count for _, count in slots]
    assert sum(lengths) <= len(rows)
    return [*lengths, len(rows) - sum(lengths)]


def run_both_ways(dispatcher, round_trip):
    """Go forward and back."""
    yield from run_forward(dispatcher, round_trip)
    yield from run_backward(dispatcher, round_trip)


def go(dispatcher, *ways):
    """Take all ways to their ends, then wait until this rank owes nobody anything."""
    backoff, deadline = Backoff(), time.monotonic() + DEADLINE_SECONDS
    ways = list(ways)
    while ways or not dispatcher.is_idle:
        assert time.monotonic() < deadline, "stuck"
        sequence_number = dispatcher.read_sequence_number()
        moved = dispatcher.poke()
        ways = [way for way in ways if next(way, way) is not way]
        if moved:
            backoff.reset()
        else:
            dispatcher.wait_for_change(backoff, sequence_number)


def check_two_at_once(dispatcher, num_tokens, seed):
    """Take two micro-batches both ways at once, half the ranks beginning with the second, and check both."""
    round_trips = [make_round_trip(dispatcher, num_tokens, seed, buffer_index) for buffer_index in range(2)]
    in_order = round_trips if dispatcher.transport.rank % 2 == 0 else round_trips[::-1]
    go(dispatcher, *[run_both_ways(dispatcher, round_trip) for round_trip in in_order])
    for round_trip in round_trips:
        check_forward(dispatcher, round_trip)
        check_backward(dispatcher, round_trip)


def check_forward(dispatcher, round_trip):
    """The output is the sum of the kept assignments' maps of their token, times their gates."""
    assert torch.equal(round_trip.output.float(), expected_output(round_trip, dispatcher.sizes.hidden))


def check_backward(dispatcher, round_trip):
    """The gradients of tokens and gates are those of <output, grad>."""
    hidden = dispatcher.sizes.hidden
    assert torch.equal(round_trip.grad_x.float(), expected_grad_x(round_trip, hidden))
    assert torch.equal(round_trip.grad_gate.float(), expected_grad_gate(round_trip, hidden))


def maps_of_assignments(round_trip, hidden):
    """The matrix of each assignment [T, K, H, H], zero where it was dropped."""
    maps = torch.stack([map_of(slot, hidden) for slot in range(round_trip.slots.max(initial=0) + 1)])
    return maps[torch.from_numpy(round_trip.slots)] * torch.from_numpy(round_trip.kept)[:, :, None, None]


def expected_output(round_trip, hidden):
    """sum over k of gate * M x."""
    return torch.einsum(
        "tk,tkij,tj->ti", round_trip.gates, maps_of_assignments(round_trip, hidden), round_trip.x.float()
    )


def expected_grad_x(round_trip, hidden):
    """sum over k of gate * M^T grad."""
    return torch.einsum(
        "tk,tkij,ti->tj", round_trip.gates, maps_of_assignments(round_trip, hidden), round_trip.grad.float()
    )


def expected_grad_gate(round_trip, hidden):
    """grad . M x of each assignment."""
    return torch.einsum(
        "ti,tkij,tj->tk", round_trip.grad.float(), maps_of_assignments(round_trip, hidden), round_trip.x.float()
    )


def check_pools_are_free(dispatcher):
    """No row of any pool is taken any more."""
    for buffer_index, pool in enumerate(dispatcher.receive_pool.pools):
        first = dispatcher.window.first_row + dispatcher.sizes.num_in_flight * dispatcher.sizes.home_window_rows
        whole = [(first + buffer_index * dispatcher.sizes.pool_rows, dispatcher.sizes.pool_rows)]
        assert pool.runs == (whole if dispatcher.sizes.pool_rows else [])
