"""Micro-batches that travel to experts who do a small linear map each, and what that must give by the definition."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.dispatcher import ExchangeId
from hpcmoe.wait import Backoff

DEADLINE_SECONDS = 300.0  # a round_trip that takes longer is stuck, however busy the machine is


@dataclass(eq=False)
class RoundTrip:
    """A micro-batch of this rank, what its experts have seen, and what came of it forward and backward."""

    micro_batch: int
    slots: np.ndarray  # [T, K]
    kept: np.ndarray  # [T, K] bool
    plan: Any
    gates: torch.Tensor  # [T, K]
    x: torch.Tensor  # [T, H]
    grad: torch.Tensor  # [T, H], of the output
    word: int = 0  # of this rank to all others
    handle: Any = None
    output: Any = None  # [T, H]
    grad_x: Any = None  # [T, H]
    grad_gate: Any = None  # [T, K]
    batches: list = field(default_factory=list)  # in the order in which they were worked on
    seen: list = field(default_factory=list)  # rows that this rank's experts had, batch by batch, chunk by chunk
    weight_grads: list = field(default_factory=list)  # (slot, gradient) in the order of the work
    backward_order: list = field(default_factory=list)  # the batches' indices in it


def make_round_trip(dispatcher, num_tokens, seed, micro_batch=0, kept_share=0.8, whole=True, favourite=None):
    """A micro-batch of this rank, with slots, gates and rows by seed; whole numbers have exact sums in any order.

    favourite: a slot to which all tokens go, and only there. As a router's, a token's slots all differ.
    """
    sizes, routes = dispatcher.sizes, dispatcher.routes
    random = np.random.default_rng([routes.rank, seed, micro_batch])
    num_slots = len(routes.place_of_slot)
    shape = (num_tokens, min(sizes.top_k, num_slots))
    slots = random.permuted(np.tile(np.arange(num_slots), (num_tokens, 1)), axis=1)[:, : shape[1]]
    kept = random.random(shape) < kept_share
    if favourite is not None:
        slots = (favourite + np.tile(np.arange(shape[1]), (num_tokens, 1))) % num_slots
        kept[:, 1:] = False
    gates = random.integers(1, 4, shape) / 2 if whole else random.random(shape)
    draw = (lambda *shape: random.integers(-3, 4, shape)) if whole else (lambda *shape: random.standard_normal(shape))
    return RoundTrip(
        micro_batch=micro_batch,
        slots=slots,
        kept=kept,
        plan=dispatcher.make_plan(slots, kept),
        gates=torch.from_numpy(gates * kept).float(),
        x=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
        grad=torch.from_numpy(draw(num_tokens, sizes.hidden)).to(sizes.dtype),
    )


def map_of(slot, hidden):
    """The matrix [H, H] of the expert in a slot of the group."""
    return torch.from_numpy(np.random.default_rng(slot).integers(-1, 2, (hidden, hidden))).float()


def start(dispatcher, round_trip, rows, direction):
    """Dispatch rows [T, H] as soon as may be; yields until then."""
    exchange = ExchangeId(0, round_trip.micro_batch, direction, round_trip.word)
    while not dispatcher.poll_ready(round_trip.plan, exchange):
        yield
    round_trip.handle = dispatcher.dispatch(round_trip.plan, rows, round_trip.gates, exchange)


def run_forward(dispatcher, round_trip):
    """Dispatch, compute and combine, leaving round_trip.output; yields where it waits."""
    first_slot, hidden = dispatcher.routes.rank * dispatcher.routes.num_slots, dispatcher.sizes.hidden
    yield from start(dispatcher, round_trip, round_trip.x, Direction.DISPATCH)
    handle = round_trip.handle
    for batch in dispatcher.receive(handle):
        if batch is None:
            yield
            continue
        seen = []
        for chunk in dispatcher.split(handle, batch):
            rows, _ = dispatcher.gather(chunk.rows)
            seen += zip([slot for slot, _ in chunk.slots], rows.split(lengths_of(chunk.slots, rows)), strict=False)
            results = [own.float() @ map_of(first_slot + slot, hidden).T for slot, own in seen[-len(chunk.slots) :]]
            dispatcher.scatter(torch.cat(results).to(rows.dtype), chunk.rows)
            yield
        dispatcher.return_batch(handle, batch)
        round_trip.batches.append(batch)
        round_trip.seen.append(seen)
    while not dispatcher.poll_results(handle):
        yield
    round_trip.output = dispatcher.combine(handle, round_trip.gates)


def run_backward(dispatcher, round_trip):
    """Go back from round_trip.grad, setting grad_x, grad_gate, weight_grads, backward_order; yield where it waits."""
    first_slot, hidden = dispatcher.routes.rank * dispatcher.routes.num_slots, dispatcher.sizes.hidden
    yield from start(dispatcher, round_trip, round_trip.grad, Direction.COMBINE_BACKWARD)
    handle = round_trip.handle
    for index in dispatcher.receive_again(handle, round_trip.batches):
        if index is None:
            yield
            continue
        batch, seen = round_trip.batches[index], iter(round_trip.seen[index])
        round_trip.backward_order.append(index)
        for chunk in dispatcher.split(handle, batch):
            rows, gates = dispatcher.gather(chunk.rows)
            of_input, of_gate, lengths = [], [], lengths_of(chunk.slots, rows)
            for grads, gates_of_slot in zip(rows.float().split(lengths), gates[:, None].split(lengths), strict=True):
                if len(of_input) == len(chunk.slots):
                    break
                slot, x = next(seen)
                matrix, weighed = map_of(first_slot + slot, hidden), gates_of_slot * grads
                of_input.append(weighed @ matrix)
                of_gate.append((grads * (x.float() @ matrix.T)).sum(dim=1))
                round_trip.weight_grads.append((slot, weighed.T @ x.float()))
            dispatcher.scatter(torch.cat(of_input), chunk.rows, torch.cat(of_gate))
            yield
        assert next(seen, None) is None
        dispatcher.return_batch(handle, batch)
    while not dispatcher.poll_results(handle):
        yield
    round_trip.grad_x = dispatcher.combine(handle, torch.ones_like(round_trip.gates))
    round_trip.grad_gate = dispatcher.gather_gate_grads(handle)


def lengths_of(slots, rows):
    """How many of the rows [m, H] each slot has, and how many are padding."""
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
        moved = dispatcher.poke()
        ways = [way for way in ways if next(way, way) is not way]
        if moved:
            backoff.reset()
        else:
            dispatcher.wait_for_change(backoff)


def check_two_at_once(dispatcher, num_tokens, seed):
    """Take two micro-batches both ways at once, half the ranks beginning with the second, and check both."""
    round_trips = [make_round_trip(dispatcher, num_tokens, seed, micro_batch) for micro_batch in range(2)]
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
