"""hpcmoe.rebalance stands in for EPLB's rebalance_experts: the same maps, and no GPU fuller than its fullest."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hpcmoe
from hpcmoe.errors import PlacementError

SHAPES = [  # experts, replicas, groups, nodes, GPUs
    (12, 16, 4, 2, 8), (16, 16, 4, 2, 4), (8, 16, 8, 4, 4), (12, 12, 3, 2, 4), (6, 9, 1, 1, 3), (64, 80, 8, 4, 16),
    (4, 4, 4, 4, 4), (5, 8, 1, 1, 1),
]  # fmt: skip


def pack(weights, num_packs):
    """EPLB's packing, item by item: the heaviest first, onto the lightest pack that has a place."""
    packs = [[] for _ in range(num_packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [p for p in packs if len(p) < len(weights) // num_packs]
        min(open_packs, key=lambda p: sum(weights[i] for i in p)).append(item)
    return packs


def fullest_gpu_of_eplb(weights, num_replicas, num_groups, num_nodes, num_gpus):
    """The load of the fullest GPU where EPLB places one layer."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(weights) // num_groups
    in_group = [sum(weights[g * size : (g + 1) * size]) for g in range(num_groups)]
    fullest = 0.0
    for groups in pack(in_group, num_nodes):
        experts = [weights[g * size + e] for g in groups for e in range(size)]
        replicas = [1] * len(experts)
        for _ in range(num_replicas // num_nodes - len(experts)):
            replicas[max(range(len(experts)), key=lambda e: experts[e] / replicas[e])] += 1
        items = [experts[e] / replicas[e] for e in range(len(experts)) for _ in range(replicas[e])]
        fullest = max(fullest, *(sum(items[i] for i in gpu) for gpu in pack(items, num_gpus // num_nodes)))
    return fullest


def loads_of_gpus(weight, maps, num_gpus):
    """The load of each GPU: [layers, GPUs]."""
    expert_of_slot, _, count = maps
    each = np.take_along_axis(weight / count, expert_of_slot, axis=1)
    return each.reshape(len(weight), num_gpus, -1).sum(axis=2)


def draw(seed, num_experts, num_layers=3):
    """Loads of which few are far above the others."""
    return np.random.default_rng(seed).pareto(1.2, (num_layers, num_experts)).astype(np.float32)


@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_no_gpu_is_fuller_than_eplbs_fullest(shape, seed):
    num_experts, *sizes = shape
    weight = draw(seed, num_experts)
    fullest = loads_of_gpus(weight, hpcmoe.rebalance(weight, *sizes), sizes[-1]).max(axis=1)
    assert (fullest <= [fullest_gpu_of_eplb(row.tolist(), *sizes) * (1 + 1e-5) for row in weight]).all()


def test_gpus_are_better_balanced_than_by_eplb():
    weight = np.random.default_rng(1).gamma(2.0, size=(20, 64)).astype(np.float32)
    ours = loads_of_gpus(weight, hpcmoe.rebalance(weight, 80, 8, 4, 16), 16).max(axis=1)
    theirs = [fullest_gpu_of_eplb(row.tolist(), 80, 8, 4, 16) for row in weight]
    assert np.mean(ours / theirs) < 0.99


@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_the_maps_are_each_others_inverses(shape, seed):
    num_experts, num_replicas, *sizes = shape
    slots, slots_of_expert, count = hpcmoe.rebalance(draw(seed, num_experts), num_replicas, *sizes)
    assert slots.shape == (3, num_replicas) and slots_of_expert.shape == (3, num_experts, count.max())
    for layer in range(3):
        assert (count[layer] == np.bincount(slots[layer], minlength=num_experts)).all() and count.min() >= 1
        for expert in range(num_experts):
            held = slots_of_expert[layer, expert]
            assert held[held >= 0].tolist() == np.flatnonzero(slots[layer] == expert).tolist()


def test_the_experts_of_a_group_stay_on_one_node():
    slots, *_ = hpcmoe.rebalance(draw(5, 12), 16, 4, 2, 8)
    for row in slots.reshape(3, 2, 8) // 3:  # groups on both nodes
        assert set(row[0]) & set(row[1]) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_tensors_give_tensors_and_arrays_arrays(dtype):
    weight = torch.tensor([[90, 132, 40, 61], [20, 107, 104, 64]], dtype=dtype)
    tensors = hpcmoe.rebalance(weight, num_replicas=6, num_groups=1, num_nodes=1, num_gpus=2)
    arrays = hpcmoe.rebalance(weight.float().numpy(), 6, num_gpus=2)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert isinstance(array, np.ndarray) and tensor.dtype == torch.int64
        assert (tensor.numpy() == array).all()


@pytest.mark.parametrize(
    ("weight", "sizes", "text"),
    [
        ([[1.0, 2.0]], (3, 1, 1, 2), "num_replicas = 3: must be a multiple of num_gpus = 2"),
        ([[1.0, 2.0]], (4, 1, 4, 2), "num_gpus = 2: must be a multiple of num_nodes = 4"),
        ([[1.0, 2.0]], (1, 1, 1, 1), "num_replicas = 1: must be at least the 2 experts"),
        ([[1.0, 2.0, 3.0]], (4, 2, 1, 1), "the experts = 3: must be a multiple of num_groups = 2"),
        ([[1.0, 2.0]], (2, 1, 0, 1), "num_nodes = 0: must be at least 1"),
        ([[1.0, -2.0]], (2, 1, 1, 1), "weight[0][1] = -2: must be finite and >= 0"),
        ([1.0, 2.0], (2, 1, 1, 1), "weight has shape [2]: must be [layers, experts]"),
        ("many", (2, 1, 1, 1), "weight: must be an array of numbers, [layers, experts]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(weight, sizes, text):
    with pytest.raises(PlacementError) as error:
        hpcmoe.rebalance(weight, *sizes)
    assert str(error.value) == text
