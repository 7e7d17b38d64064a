"""Memory as estimated from the config is what the arrays then take, byte for byte, and nearly so for activations."""

import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import make_config, open_small_job
from standin import watch_job
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcmoe.experts.feed_forward import Expert, GroupedExperts
from hpcmoe.experts.layer import LayerContext
from hpcmoe.experts.shapes import MATRICES
from hpcmoe.prepare.activations import ActivationTracker, find_arrays, measure_memory
from hpcmoe.prepare.memory import Memory, estimate_working
from hpcmoe.wait import gather_to_all

CASES = {
    "gelu": {},
    "relu, biases": {"experts__kind": "relu", "experts__bias": True},
    "swiglu": {"experts__kind": "swiglu"},
    "swiglu, biases, without attention": {
        "experts__kind": "swiglu", "experts__bias": True, "model__attention": False,
    },
    "without attention, one choice": {"model__attention": False, "model__top_k": 1},
    "three choices, three in flight": {"model__top_k": 3, "pipeline__in_flight": 3},
    "serial": {"pipeline__schedule": "serial", "model__num_layers": 3},
    "bfloat16": {"model__dtype": "bfloat16"},
}  # fmt: skip


def take_step(job, optimizer, purpose="train"):
    """Run one step and measure what there is -> Memory."""
    if optimizer is not None:
        optimizer.zero_gradients()
    config = job.config
    load = np.ones((config.model.num_layers, config.model.num_experts))
    job.stepper.run(job.training, np.arange(config.data.batch_sequences), load, purpose)
    if optimizer is not None:
        optimizer.step(1)
    stepper, adamw = job.stepper, optimizer and optimizer.adamw
    return measure_memory(stepper.network, adamw, stepper.dispatcher, stepper.tracker)


def open_job(comm, folder, **changes):
    """A job with rows wide enough for matrices to outweigh indexes."""
    sizes = {"hidden": 32, "feed_forward": 64, "num_experts": 8, "sequence_length": 16}
    return open_small_job(comm, folder, **{f"model__{key}": size for key, size in sizes.items()} | changes)


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_a_training_rank_is_as_estimated(comm, tmp_path, case):
    with open_job(comm, tmp_path, **CASES[case]) as (job, optimizer, _):
        assert job.stepper.dispatcher.buffer_bytes == job.memory.buffers
        measured = take_step(job, optimizer)
    estimated = job.memory
    for name in ("states", "one_expert", "experts", "dense", "gradients", "optimizer"):
        assert getattr(measured, name) == getattr(estimated, name), name
    assert (
        0.85 * estimated.activations < measured.activations < estimated.activations
    )  # no hook sees gradients that pass


def test_inference_has_parameters_buffers_and_what_passes_through(comm, tmp_path):
    with open_job(comm, tmp_path, run__mode="infer") as (job, _, _):
        measured = take_step(job, None, "infer")
    estimated = job.memory
    varying = {"buffers": 0, "activations": 0, "copies": 0}
    assert dataclasses.replace(measured, **varying) == dataclasses.replace(estimated, **varying)
    assert measured.activations == pytest.approx(estimated.activations, rel=0.3)
    assert estimated.copies <= measured.copies <= 2 * estimated.copies  # packing fills small matrices up
    assert estimated.gradients == estimated.optimizer == 0 and estimated.states == 1


@pytest.mark.mpi
def test_ranks_with_all_slots_full_take_what_was_estimated(comm, shared):
    with open_small_job(comm, shared, model__num_experts=2 * comm.size) as (job, optimizer, _):
        measured = take_step(job, optimizer)
    for name in ("one_expert", "experts", "dense", "gradients", "optimizer"):
        assert getattr(measured, name) == getattr(job.memory, name), name


@pytest.mark.mpi
@pytest.mark.parametrize("changes", [{}, {"model__num_experts": 2}, {"model__top_k": 1, "model__attention": False}])
def test_the_fullest_rank_keeps_no_more_than_was_estimated(comm, shared, changes):
    """Routers are as they are drawn, and lean as they do then."""
    with open_job(comm, shared, **changes) as (job, optimizer, _):
        of_ranks = gather_to_all(comm, take_step(job, optimizer).activations)
    assert 0.4 * job.memory.activations < max(of_ranks) <= 1.1 * job.memory.activations


@pytest.mark.mpi
@pytest.mark.parametrize("bias", [False, True])
def test_the_copy_for_checkpoints_is_what_rank_0_saves(comm, shared, bias):
    changes = {"write__asynchronous": True, "experts__bias": bias, "model__num_experts": 2 * comm.size}
    with open_small_job(comm, shared, **changes) as (job, _, state):
        held = state.collect({})  # the few numbers of the balance besides
        saved = sum(array.nbytes for part, array in held if not part.name.startswith("balance/"))
        assert saved == job.memory.snapshot if comm.rank == 0 else 0 < saved < job.memory.snapshot
        assert job.budget.needs["copy for checkpoints"] == job.memory.snapshot
        assert job.memory.total > job.memory.snapshot + job.memory.activations


@pytest.mark.parametrize(
    "changes", [{"write__checkpoint_every": 0}, {"write__asynchronous": False}, {"run__mode": "infer"}]
)
def test_without_a_thread_that_writes_there_is_no_copy(comm, tmp_path, changes):
    with open_small_job(comm, tmp_path, **({"write__asynchronous": True} | changes)) as (job, _, _):
        assert job.memory.snapshot == 0 and "copy for checkpoints" not in str(job.budget)


@pytest.mark.mpi
def test_a_rank_keeps_its_share_of_the_dense_parts_moments(comm, shared):
    with open_small_job(comm, shared, model__num_experts=2 * comm.size, train__shard_optimizer=True) as job_and_more:
        job, optimizer, _ = job_and_more
        measured = take_step(job, optimizer)
    of_ranks = gather_to_all(comm, measured.optimizer)
    estimated, dense = job.memory, job.memory.dense
    assert sum(of_ranks) == comm.size * 2 * estimated.experts + 2 * dense  # each moment is on one rank
    assert max(abs(own - estimated.optimizer) for own in of_ranks) <= 2 * 4 * 8 * 3  # rows are whole
    assert estimated.dense_with_state == 2 * dense + 2 * (dense // comm.size)


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_on_a_device_matrices_are_cast_for_training_and_never_packed(comm, shared, monkeypatch, mode):
    changes = {"model__dtype": "bfloat16", "run__mode": mode, "comm__transport": "mpi", "comm__buffers": "staged"}
    with watch_job(monkeypatch), open_job(comm, shared, **changes) as (job, _, _):
        measured = take_step(job, None, mode)  # AdamW would have the casts forgotten
        estimated = job.memory
    assert measured.copies * estimated.experts == estimated.copies * measured.experts  # a slot may be empty
    assert (measured.copies > 0) == (mode == "train")


@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_experts_on_a_device_make_what_is_estimated(kind, dtype, mode):
    """What is there at most, of all that is made and freed in a pass."""
    changes = {"experts__kind": kind, "model__dtype": dtype, "run__mode": mode}
    config = make_config(model__hidden=64, model__feed_forward=160, **changes)
    num_rows, precision, trains = 512, getattr(torch, dtype), mode == "train"
    mesh = SimpleNamespace(tensor_parallel=1, group=SimpleNamespace(size=1))
    sizes = SimpleNamespace(tokens=num_rows // 2, expert_rows=num_rows, dtype=precision)

    shapes = dict.fromkeys(MATRICES[kind], (160, 64)) | {"down": (64, 160)}
    weights = [
        {name: torch.randn(shape, dtype=torch.float32 if trains else precision) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    experts = GroupedExperts([Expert(kind, own) for own in weights])
    experts.stack_weights()
    slots = [(0, num_rows // 2), (1, num_rows // 2)]
    x, gates, kept = torch.randn(num_rows, 64, dtype=precision), torch.rand(num_rows), []
    for _ in range(2 * trains):  # casts and gradients are there from the first pass on
        experts(slots, x, kept)
    if trains:
        experts.backward(slots, x, gates, kept)
        most = find_peak(lambda: experts.backward(slots, x.clone(), gates, kept))
    else:
        most = find_peak(lambda: experts(slots, x.clone(), None))
    assert most == pytest.approx(estimate_working(config.spec, mesh, 2, sizes), rel=0.05)


def find_peak(call):
    """Find the most bytes held at one time by the tensors that operations return within a call."""
    with LiveTensors() as live:
        call()
    return live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Follows the tensors that operations make; what a processor's kernel allocates beside is not among them."""

    def __init__(self):
        super().__init__()
        self.references = []  # to every tensor returned, views too: a storage lives as long as one of them
        self.given = set()  # addresses of storages that were there before
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        """Run an operation, then add up the storages that are alive."""
        keywords = keywords or {}
        self.given |= storages_of((arguments, keywords)).keys() - storages_of(self.living()).keys()
        result = function(*arguments, **keywords)
        self.references += [weakref.ref(tensor) for tensor in tensors_of(result)]
        made = storages_of(self.living())
        self.peak_bytes = max(self.peak_bytes, sum(made[address] for address in made.keys() - self.given))
        return result

    def living(self):
        """List the tensors returned so far that are still there."""
        return [tensor for reference in self.references if (tensor := reference()) is not None]


def tensors_of(tree):
    """List the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages_of(tree):
    """Find the storages of the tensors in nested containers -> {address: bytes}."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(tree)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_the_peak_counts_each_storage_made_and_none_that_was_there():
    there = torch.ones(100)

    def call():
        x = torch.zeros(1000)
        x[:10].add_(1)  # a view, and an operation in place
        y = x * 2 + 1  # x, and two more
        there[:50].add_(1)
        del x
        return y + 1

    assert find_peak(call) == 3 * 4000


def test_sums_of_memory():
    memory = Memory(
        states=4, one_expert=10, experts=20, dense=3, gradients=23, optimizer=46, buffers=100, copies=9,
        activations=1000, working=70, snapshot=500,
    )  # fmt: skip
    assert memory.per_expert == 40
    assert memory.dense_with_state == 4 * 3
    assert memory.total == 20 + 3 + 23 + 46 + 100 + 9 + 1000 + 70 + 500


def test_the_tracker_counts_saved_tensors_once_and_no_parameters():
    network = nn.Linear(8, 8, bias=False)
    tracker = ActivationTracker(network)
    x = torch.ones(5, 8)
    with tracker.hooks():
        y = network(x)  # saves x and the weight
        z = y * y  # saves y, twice
        loss = z.sin().sum()  # saves z
    tracker.observe([])
    assert tracker.peak_bytes == 3 * 5 * 8 * 4
    assert len(tracker.saved) == 3

    # What backward lets go counts no more, and the most remains.
    loss.backward()
    assert tracker.saved == {}
    tracker.observe([])
    assert tracker.peak_bytes == 3 * 5 * 8 * 4


def test_the_tracker_counts_what_contexts_keep():
    x = torch.ones(4)
    batches = [(x[:2], torch.ones(6))]
    context = LayerContext(micro_batch=0, training=True, plan=None, gates=x, notice=None, batches=batches)
    tracker = ActivationTracker(nn.Linear(1, 1))
    tracker.observe([context])
    assert tracker.peak_bytes == (4 + 6) * 4


def test_tensors_are_found_in_whatever_holds_them():
    @dataclasses.dataclass(frozen=True, slots=True)
    class Held:
        tensor: torch.Tensor
        number: int

    tensors = [torch.ones(1) for _ in range(4)]
    found = list(find_arrays({"a": tensors[0], "b": [tensors[1], (tensors[2], None)], "c": Held(tensors[3], 7)}))
    assert all(one is other for one, other in zip(found, tensors, strict=True))
