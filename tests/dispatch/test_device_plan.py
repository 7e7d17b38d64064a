"""Plans made on the device are those of the host: the same replicas, each assignment by its slot, counts of all."""

import numpy as np
import pytest
import torch

from hpcmoe.comm.device import PlainDevice
from hpcmoe.dispatch.device_plan import DeviceBatch, DeviceChooser, DevicePlan
from hpcmoe.dispatch.plan import SlotChooser, find_slots_of_shards

EXPERT_OF_REPLICA = np.array([2, 0, -1, 1, 2, 0, 2, 3])
SHARES = np.array([0.5, 0.25, 0.0, 1.0, 0.3, 0.75, 0.2, 1.0])


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_the_device_chooses_the_same_replicas(rank, num_tokens, num_shards):
    experts = np.random.default_rng(rank).integers(0, 4, (num_tokens, 3))
    chooser = SlotChooser(EXPERT_OF_REPLICA, SHARES, find_slots_of_shards(8, 2, num_shards), 4, rank)
    chosen = DeviceChooser(chooser, torch.device("cpu")).choose(torch.from_numpy(experts))
    assert np.array_equal(chosen.numpy(), chooser.choose(experts))


def test_without_replicas_each_expert_has_its_slot():
    def choose(num_shards):
        slots = find_slots_of_shards(4, 1, num_shards)
        chooser = SlotChooser(np.array([2, -1, 0, 1]), np.array([1.0, 0, 1, 1]), slots, 3, 0)
        return DeviceChooser(chooser, torch.device("cpu")).choose(torch.tensor([[0, 2], [1, 0]])).tolist()

    assert choose(1) == [[2, 0], [3, 2]]
    assert choose(2) == [[4, 5, 0, 1], [6, 7, 4, 5]]


@pytest.mark.parametrize("num_tokens", [0, 1, 25])
def test_assignments_are_sorted_by_slot_and_dropped_ones_nowhere(num_tokens):
    random = np.random.default_rng(num_tokens)
    slots, kept = random.integers(0, 6, (num_tokens, 2)), random.random((num_tokens, 2)) < 0.7
    plan = DevicePlan(torch.from_numpy(slots), torch.from_numpy(kept), 6, PlainDevice())
    counts = np.diff(plan.ends.numpy(), prepend=0)
    assert counts.tolist() == np.bincount(slots[kept], minlength=6).tolist()
    assignments = plan.assignments.limit_to(counts.sum()).assignment_of_row.numpy()
    assert slots.ravel()[assignments].tolist() == np.repeat(np.arange(6), counts).tolist()
    assert plan.assignments.row_of_assignment.flatten()[assignments].tolist() == list(range(counts.sum()))
    assert (plan.assignments.row_of_assignment[torch.from_numpy(~kept)] == -1).all()


def test_a_batch_is_grouped_by_slot_and_within_it_by_rank():
    coming = np.array([[2, 0, 1], [0, 0, 3], [1, 0, 2]])  # 3 ranks, 3 slots
    batch = DeviceBatch(coming, PlainDevice())
    label = np.repeat(np.arange(9), coming.ravel())  # rank * 3 + slot of each row, as they lie
    assert [divmod(int(own), 3)[::-1] for own in label[batch.order]] == sorted(divmod(int(n), 3)[::-1] for n in label)
    assert batch.rows_of_slot.tolist() == [3, 0, 6] and batch.num_rows == 9
