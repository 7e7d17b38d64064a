"""Micro-batches in lanes take turns as their kind says: none is lost, none holds another up, all time is counted."""

import random
import time

import pytest
import torch
from lanes_by_hand import BACKWARD, FORWARD, Layer, open_network
from torch.utils.checkpoint import checkpoint

from hpcmoe.clock import Clock, Stage, Timer
from hpcmoe.pipeline.lanes import SCHEDULES, Lanes
from hpcmoe.wait import call_at_pauses

FINAL = {m: [4.0 * (m + 1)] * 3 for m in range(5)}  # each of two layers doubles


def path_of(micro_batch, training):
    """List what one micro-batch must go through, in this order."""
    forward = [(stage, layer, micro_batch) for layer in (0, 1) for stage in FORWARD]
    return forward + [(stage, layer, micro_batch) for layer in (1, 0) for stage in BACKWARD] * training


def make_delays(seed):
    """Draw how often a stage waits; without a seed it never does."""
    draw = random.Random(seed)
    return lambda micro_batch: 0 if seed is None else draw.choice([0, 0, 3, 40])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("in_flight", [1, 2, 3, 7])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_micro_batch_passes_forward_and_in_training_backward(kind, in_flight, training, seed):
    """Five micro-batches, so that with two or three in flight lanes have different numbers of them; twice."""
    with open_network(kind, make_delays(seed), left=3) as network:
        for step in (1, 2):
            with torch.set_grad_enabled(training):
                results = network.run(5, in_flight)
            assert {number: x.tolist() for number, x in results} == FINAL
            assert [number for number, _ in results] == list(range(5))
            for micro_batch in range(5):
                assert [op for op in network.turns() if op[2] == micro_batch] == path_of(micro_batch, training)
            assert len(network.trace) == 5 * 2 * len(path_of(0, training))  # two pieces each, and no more
            assert not training or network.weight.grad.tolist() == [step * 4.0 * (1 + 2 + 3 + 4 + 5)] * 3
            assert network.dispatcher.is_idle and not network.lanes.lanes and not network.lanes.contexts
            network.trace.clear()
            network.dispatcher.left = 3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_at_most_so_many_are_in_flight(kind):
    with open_network(kind, make_delays(3)) as network:
        network.run(7, 3)
    under_way = [{op[2] for op in network.turns()[: n + 1]} & {op[2] for op in network.turns()[n:]} for n in range(84)]
    assert len(network.turns()) == 84
    assert max(map(len, under_way)) == (1 if kind == "serial" else 3)


def test_overlapping_lanes_hand_their_turns_on_in_a_circle_behind_what_makes_rows_travel():
    with open_network("overlap") as network, torch.no_grad():
        network.run(2, 2)
    turns = [(stage.value, layer, micro_batch) for stage, layer, micro_batch in network.turns()]
    assert turns == [
        ("dispatch", 0, 0), ("dispatch", 0, 1), ("compute", 0, 0), ("compute", 0, 1),
        ("combine", 0, 0), ("dispatch", 1, 0), ("combine", 0, 1), ("dispatch", 1, 1),
        ("compute", 1, 0), ("compute", 1, 1), ("combine", 1, 0), ("combine", 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("num_micro_batches", [4, 5])
@pytest.mark.parametrize("training", [True, False])
def test_the_order_of_overlapping_lanes_is_the_same_however_long_they_wait(num_micro_batches, training):
    traces = []
    for seed in (None, 0, 1, 1):
        with open_network("overlap", make_delays(seed)) as network, torch.set_grad_enabled(training):
            network.run(num_micro_batches, 3)
            traces.append(network.trace)
    assert all(trace == traces[0] for trace in traces[1:]) and len(traces[0]) == 24 * num_micro_batches // (
        2 - training
    )


@pytest.mark.parametrize("kind", ["serial", "overlap"])
def test_gradients_are_the_same_bits_at_every_run(kind):
    """Every micro-batch adds another number, so that another order would round otherwise."""
    values = torch.rand(6, 1000, generator=torch.Generator().manual_seed(0)) ** 9
    grads = []
    for seed in (0, 1, 2):
        with open_network(kind, make_delays(seed)) as network:
            network.weight = torch.ones(1000, requires_grad=True)

            def step(micro_batch, network=network):
                network.step(micro_batch)
                (network.weight * values[micro_batch]).sum().backward()

            network.lanes.run(step, 6, 4)
            grads.append(network.weight.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    backward = torch.zeros(1000)
    for value in values.flip(0):
        backward += value
    assert not torch.equal(values.sum(dim=0), backward)  # the order matters to these numbers


def test_a_lane_that_waits_holds_no_other_up():
    """The first micro-batch's first dispatch waits until the second is all the way through both layers."""
    with open_network("arrival") as network, torch.no_grad():
        patience = iter(range(10_000))

        def holds(stage, layer, micro_batch):
            waits = micro_batch == 0 and (Stage.COMBINE, 1, 1) not in network.turns()
            assert not waits or next(patience, None) is not None, "the second lane never went on"
            return waits

        network.holds = holds
        network.run(2, 2)
    assert [op[2] for op in network.turns()] == [1] * 6 + [0] * 6


def test_sending_and_fetching_go_before_an_experts_next_piece():
    """Of two lanes that both come to their experts, the other's dispatch is done between two pieces of the first."""
    with open_network("arrival") as network, torch.no_grad():
        network.run(2, 2)
    dispatched = [network.trace.index((1, Stage.DISPATCH, 0, micro_batch)) for micro_batch in (0, 1)]
    computed = [network.trace.index((0, Stage.COMPUTE, 0, micro_batch)) for micro_batch in (0, 1)]
    assert max(dispatched) < min(computed) + 2


def test_one_piece_of_one_expert_is_done_at_a_time():
    """Both lanes stand at their experts: between two pieces everybody's messages are looked at."""
    with open_network("arrival") as network, torch.no_grad():
        pokes_of_piece = []
        pieces = network.pieces

        def noting(stage, layer, micro_batch):
            for worked in pieces(stage, layer, micro_batch):
                if worked and stage == Stage.COMPUTE:
                    pokes_of_piece.append(network.dispatcher.pokes)
                yield worked

        network.pieces = noting
        network.run(2, 2)
    assert len(set(pokes_of_piece)) == len(pokes_of_piece) == 8


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_others_want_is_done_before_a_step_ends(kind):
    with open_network(kind, left=10_000) as network:
        network.run(1, 1)
        assert network.dispatcher.is_idle and network.dispatcher.pokes >= 10_000


@pytest.mark.parametrize("kind", SCHEDULES)
def test_tasks_advance_while_anybody_waits(kind):
    """Every stage waits for a sum that only pokes end."""
    with open_network(kind) as network, torch.no_grad():
        left = [50]

        def poke():
            left[0] -= 1
            return False

        network.lanes.pokes.append(poke)
        network.holds = lambda *_: left[0] > 0
        network.run(2, 2)
    assert left[0] <= 0 and len(network.trace) == 24


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_is_called_at_pauses_is_called_wherever_a_lane_waits(kind):
    def fail(_):
        raise RuntimeError("rank 1 has left")

    with open_network(kind) as network, torch.no_grad(), call_at_pauses(fail):
        network.dispatcher.wait_for_change = lambda backoff: backoff.pause()
        network.run(3, 2)  # nobody waits
        network.delays = lambda micro_batch: 1
        with pytest.raises(RuntimeError, match="rank 1 has left"):
            network.run(3, 2)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_all_seconds_of_a_run_are_counted_once(kind):
    """Stages that work, stages that wait, and what is between them."""
    with open_network(kind, make_delays(0)) as network:
        clock, inner = network.lanes.clock, network.pieces

        def pieces(*at):
            for worked in inner(*at):
                time.sleep(2e-4)
                yield worked

        def step(micro_batch):
            time.sleep(1e-3)
            network.step(micro_batch)

        network.pieces = pieces
        begin = time.perf_counter()
        with clock.measure(Timer.DATA):
            network.lanes.run(step, 5, 3)
        wall = time.perf_counter() - begin
        seconds = clock.pop_seconds()
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert {Timer.DENSE, Timer.DISPATCH, Timer.COMPUTE, Timer.COMBINE} < set(seconds)
    assert seconds[Timer.DENSE] >= 5e-3 and seconds[Timer.COMPUTE] >= 5 * 8 * 2e-4
    assert clock.running == []


def test_a_stages_work_and_its_waiting_are_told_apart():
    """An expert's work is compute; what it waits for is dispatch."""
    with open_network("serial", lambda micro_batch: 1) as network, torch.no_grad():
        network.dispatcher.wait_for_change = lambda backoff: time.sleep(2e-3)
        network.run(1, 1)
        seconds = network.lanes.clock.pop_seconds()
    assert seconds[Timer.DISPATCH] >= 2 * 2 * 2 * 2e-3 > 2e-3 > seconds[Timer.COMPUTE]  # two stages, two pieces, layers


@pytest.mark.parametrize("kind", SCHEDULES)
def test_contexts_are_shown_after_each_stage(kind):
    """A layer's context lasts from its forward pass to the end of its backward pass."""
    with open_network(kind) as network:
        seen = []
        network.lanes.observe = lambda contexts: seen.append(len(contexts))
        network.run(1, 1)
        assert seen == [1] * 3 + [2] * 6 + [1] * 3
        network.run(2, 2)
        assert max(seen) == {"serial": 2, "overlap": 4, "arrival": 3}[kind] and not network.lanes.contexts


def test_outside_a_run_a_stage_goes_on_in_the_callers_thread():
    with open_network("overlap", make_delays(0), left=5) as network:
        number, x = network.step(0)
        assert (number, x.tolist()) == (0, FINAL[0]) and network.turns() == path_of(0, True)
        assert network.dispatcher.waits > 0
        network.lanes.end_exchange()
        assert network.dispatcher.is_idle


def test_inside_a_run_the_end_of_an_exchange_waits_for_nobody():
    with open_network("serial", left=5) as network:
        network.lanes.run(lambda micro_batch: network.lanes.end_exchange(), 1, 1)
        assert network.dispatcher.pokes >= 5 and network.dispatcher.is_idle  # at the run's end


def test_no_micro_batches_are_no_work():
    with open_network("arrival", left=5) as network:
        assert network.run(0, 3) == [] and network.dispatcher.is_idle


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="backwards"):
        Lanes([], Clock(), "backwards")


def test_random_numbers_are_each_micro_batches_own():
    """Also where a checkpoint goes back to those of an earlier moment, while other lanes draw theirs."""
    drawn = []
    for kind in SCHEDULES:
        for in_flight in (1, 2, 3):
            with open_network(kind, make_delays(in_flight)) as network:

                def step(_, network=network):
                    first = torch.rand(3)
                    x = torch.ones(3, requires_grad=True)
                    masked = checkpoint(lambda x: Layer.apply(x, network, 0) * torch.rand(3), x, use_reentrant=False)
                    masked.sum().backward()
                    return torch.stack([first, masked.detach(), x.grad, torch.rand(3)])

                torch.manual_seed(0)
                results = network.lanes.run(step, 5, in_flight)
                drawn.append(torch.stack([*results, torch.rand(4, 3)]))
    assert all(torch.equal(numbers, drawn[0]) for numbers in drawn)
    assert torch.equal(drawn[0][:5, 1], drawn[0][:5, 2])
    assert len(drawn[0].unique()) == 5 * 3 * 3 + 12  # none twice
