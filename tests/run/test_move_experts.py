"""Experts move between slots with whatever an optimizer keeps of them, and new parameters join its groups."""

import numpy as np
import pytest
import torch
from torch import nn

from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.placement.migrate import keep_slots, list_moves
from hpcmoe.run import move_experts
from hpcmoe.run.move_experts import LayerChange
from hpcmoe.wait import gather_to_all

SLOTS, HIDDEN, INNER = 2, 3, 4  # slots a rank
OPTIMIZERS = {
    "none": None,
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


class Ranks:
    """The ranks of a test as a problem or a placement describes them, all on one node."""

    def __init__(self, num_ranks):
        self.num_ranks, self.slots_per_rank = num_ranks, SLOTS
        self.node_of_rank, self.distance = np.zeros(num_ranks, np.int64), np.zeros((1, 1), np.int64)


def make_replica(value=0.0):
    weights = {"up": torch.full((INNER, HIDDEN), value), "down": torch.full((HIDDEN, INNER), -value)}
    return Expert("gelu", weights | {"up_bias": torch.full((INNER,), value)})


def draw_slots(comm, seed):
    """Slots of all ranks with an expert a rank, some twice, and some slots empty -> [S]."""
    random = np.random.default_rng(seed)
    while True:
        slots = random.permutation(np.append(np.arange(comm.size), random.integers(-1, comm.size, comm.size)))
        if all(a != b or a < 0 for a, b in slots.reshape(-1, SLOTS)):
            return slots


def make_layer(comm, slots, layer):
    own = slots.reshape(-1, SLOTS)[comm.rank]
    return LocalExperts([make_replica(10.0 * layer + e + 1) if e >= 0 else nn.Identity() for e in own])


def step(layers, all_slots, optimizer, comm, stepped=lambda expert: True):
    """Step with gradients that depend on the expert alone, as sums over its replicas would."""
    for layer, slots in zip(layers, all_slots, strict=True):
        for expert, replica in zip(slots.reshape(-1, SLOTS)[comm.rank], layer.replicas, strict=True):
            for number, parameter in enumerate(replica.parameters()):
                if parameter.requires_grad and stepped(expert):
                    parameter.grad = torch.full_like(parameter, 0.1 * (expert + 1) + number)
    optimizer.step()
    optimizer.zero_grad()


def make_optimizer(make, layers):
    parameters = [p for layer in layers for p in layer.parameters()]
    biases = [p for p in parameters if p.dim() == 1] + [nn.Parameter(torch.zeros(1))]  # a rank may have no expert
    groups = [{"params": [p for p in parameters if p.dim() > 1]}, {"params": biases, "lr": 0.3}]
    return make(groups)


def describe(layers, all_slots, optimizer, comm):
    """All that is known of each expert on this rank -> {(layer, expert): numbers}."""
    told = {}
    group_of = {} if optimizer is None else {p: n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for number, (layer, slots) in enumerate(zip(layers, all_slots, strict=True)):
        for expert, replica in zip(slots.reshape(-1, SLOTS)[comm.rank].tolist(), layer.replicas, strict=True):
            assert isinstance(replica, Expert) == (expert >= 0)
            for name, parameter in replica.named_parameters():
                state = {} if optimizer is None else optimizer.state.get(parameter, {})
                told[number, expert, name] = (
                    parameter.tolist(), parameter.requires_grad, group_of.get(parameter),
                    {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in state.items()},
                )  # fmt: skip
    return told


def assert_same_everywhere(comm, told):
    """All replicas of an expert are alike -> what is known of all experts."""
    everything = {}
    for of_rank in gather_to_all(comm, told):
        for key, value in of_rank.items():
            assert everything.setdefault(key, value) == value
    return everything


def move(comm, layers, before, after, optimizer):
    ranks = Ranks(comm.size)
    after = [keep_slots(old, new, SLOTS) for old, new in zip(before, after, strict=True)]
    moves = list_moves(ranks, np.array(before), np.array(after))
    changes = [
        LayerChange(local=layer, before=old, after=new, moves=moves.of_layer(number), make_replica=make_replica)
        for number, (layer, old, new) in enumerate(zip(layers, before, after, strict=True))
    ]
    move_experts.move_experts(comm, changes, optimizer)
    assert all(not layer.awaits_weights for layer in layers)
    return after


@pytest.mark.mpi
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_expert_is_the_same_wherever_it_moves(comm, monkeypatch, name):
    monkeypatch.setattr(move_experts, "STAGING_BYTES", 16 * comm.size)  # less than a matrix
    slots = [draw_slots(comm, seed) for seed in (1, 2)]
    layers = [make_layer(comm, own, number) for number, own in enumerate(slots)]
    for number, layer in enumerate(layers):
        for replica in layer.local_replicas():
            replica.up_bias.requires_grad_(number == 0)  # frozen in one layer
    optimizer = OPTIMIZERS[name] and make_optimizer(OPTIMIZERS[name], layers)
    for turn in range(4):
        if optimizer is not None:  # some experts have no state yet
            step(layers, slots, optimizer, comm, stepped=lambda expert, turn=turn: expert > 0 or turn > 1)
        before = assert_same_everywhere(comm, describe(layers, slots, optimizer, comm))
        slots = move(comm, layers, slots, [draw_slots(comm, 10 * turn + n) for n in range(2)], optimizer)
        assert assert_same_everywhere(comm, describe(layers, slots, optimizer, comm)) == before

        # The optimizer has what is there, and nothing else.
        if optimizer is not None:
            known = [p for group in optimizer.param_groups for p in group["params"]]
            held = [p for layer in layers for p in layer.parameters()]
            assert len(known) == len(held) + 1 and {id(p) for p in held} < {id(p) for p in known}
            assert {id(p) for p in optimizer.state} <= {id(p) for p in known}


@pytest.mark.mpi
def test_gradients_of_a_slot_that_gets_another_expert_are_dropped(comm):
    before, after = np.arange(2 * comm.size) // 2, np.roll(np.arange(2 * comm.size) // 2, 2)
    before[1::2] = after[1::2] = -1
    layer = make_layer(comm, before, 0)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    move(comm, [layer], [before], [after], None)
    assert all((parameter.grad is None) == (comm.size > 1) for parameter in layer.parameters())
