"""What micro-batches in flight keep is as estimated, within a few percent, whatever the shape, and in the head too."""

import contextlib

import numpy as np
import pytest
import torch
from small import open_small_job
from torch import nn

from hpcmoe.experts.layer import LayerContext
from hpcmoe.prepare.activations import ActivationTracker, find_arrays, locate
from hpcmoe.wait import gather_to_all

NEAR = 0.04  # relative: the rows of a portion are rounded up, tensors of a few numbers are not counted
SHAPES = {
    "plain": {},
    "one layer": {"model__num_layers": 1},
    "one layer without attention": {"model__num_layers": 1, "model__attention": False},
    "one layer, narrow, without attention": {
        "model__num_layers": 1, "model__attention": False, "model__hidden": 8, "model__feed_forward": 8,
    },
    "six layers": {"model__num_layers": 6},
    "three layers without attention": {"model__num_layers": 3, "model__attention": False},
    "wide": {"model__hidden": 128, "model__feed_forward": 256},
    "one choice": {"model__top_k": 1},
    "one choice, weighed by the load": {"model__top_k": 1, "dispatch__load_feedback_on": "both"},
    "three choices": {"model__top_k": 3},
    "all of the experts": {"model__top_k": 8},
    "gates as they are, weighed by the load": {
        "dispatch__renormalize": False, "dispatch__load_feedback_on": "both",
    },
    "sixty-four experts": {"model__num_experts": 64},
    "a capacity that drops nothing": {"dispatch__capacity_factor": 8.0},
    "bfloat16": {"model__dtype": "bfloat16"},
    "bfloat16, one layer without attention": {
        "model__dtype": "bfloat16", "model__num_layers": 1, "model__attention": False,
    },
    "swiglu": {"experts__kind": "swiglu"},
    "swiglu, biases, bfloat16, four choices": {
        "experts__kind": "swiglu", "experts__bias": True, "model__dtype": "bfloat16", "model__top_k": 4,
    },
    "serial": {"pipeline__schedule": "serial"},
    "serial, one layer": {"pipeline__schedule": "serial", "model__num_layers": 1},
    "three in flight": {"pipeline__in_flight": 3},
    "four of four": {"pipeline__in_flight": 4, "pipeline__micro_batches": 4, "data__batch_sequences": 16},
    "one micro-batch": {"pipeline__micro_batches": 1},
    "whichever has rows": {"pipeline__schedule": "arrival", "pipeline__deterministic": False},
    "small products": {"experts__gemm_rows": 8},
}  # fmt: skip
OF_TRAINING = ("all of the experts", "swiglu", "small products")  # in inference nothing of these stays


@contextlib.contextmanager
def open_job(comm, folder, **changes):
    """A job whose micro-batches are alike, and as large as can be."""
    sizes = {"hidden": 32, "feed_forward": 64, "num_experts": 8, "sequence_length": 16}
    sizes = {f"model__{key}": size for key, size in sizes.items()} | {"data__batch_sequences": 15}
    with open_small_job(comm, folder, **sizes | changes) as (job, *_):
        yield job


def measure(job, purpose="train"):
    """Run one step -> bytes that it had in flight at most, with the gradients that autograd passes and no hook sees."""
    config = job.config
    load = np.ones((config.model.num_layers, config.model.num_experts))
    job.stepper.run(job.training, np.arange(config.data.batch_sequences), load, purpose)
    sizes = job.stepper.dispatcher.sizes
    passing = sizes.num_in_flight * sizes.tokens * config.model.hidden * 4 * (purpose == "train")
    return job.stepper.tracker.peak_bytes + passing


@pytest.mark.parametrize("shape", SHAPES)
def test_training_keeps_what_is_estimated(comm, tmp_path, shape):
    near = 0.1 if shape == "whichever has rows" else NEAR  # one may be on its way back while another comes to the head
    with open_job(comm, tmp_path, **SHAPES[shape]) as job:
        assert measure(job) == pytest.approx(job.memory.activations, rel=near)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in OF_TRAINING])
def test_inference_passes_on_what_is_estimated(comm, tmp_path, shape):
    """But for the chosen experts, which nobody's context holds."""
    with open_job(comm, tmp_path, run__mode="infer", **SHAPES[shape]) as job:
        assert 0.87 * job.memory.activations <= measure(job, "infer") <= job.memory.activations


@pytest.mark.mpi
@pytest.mark.parametrize("case", ["nodes", "shards"])
def test_ranks_that_share_the_load_keep_what_is_estimated_for_even_rows(comm, shared, monkeypatch, case):
    """With shards and with messages between nodes; where routers lean, the mean of the ranks is still even."""
    if case == "shards" and comm.size % 2:
        pytest.skip("needs an even number of ranks")
    monkeypatch.setattr("hpcmoe.prepare.memory.FULLEST", 1.0)
    changes = {"num_nodes": comm.size} if case == "nodes" else {"parallel__tensor": 2}
    with open_job(comm, shared, data__batch_sequences=6 * comm.size, **changes) as job:
        of_ranks = gather_to_all(comm, measure(job))
    assert np.mean(of_ranks) == pytest.approx(job.memory.activations, rel=2 * NEAR)


def test_the_head_has_the_logarithms_of_all_bytes_probabilities(comm, tmp_path):
    """With a layer that keeps next to nothing they are most of what there is, for one micro-batch at a time."""
    changes = {"model__num_layers": 1, "model__attention": False, "model__hidden": 8, "model__feed_forward": 8}
    with open_job(comm, tmp_path, pipeline__schedule="serial", **changes) as job:
        tokens = job.stepper.dispatcher.sizes.tokens
        measured = measure(job)
    assert 1024 * tokens < measured < 2 * 1024 * tokens


def test_the_tracker_sees_what_is_saved_and_let_go_within_an_op():
    network = nn.Linear(8, 8, bias=False)
    tracker = ActivationTracker(network)
    tracker.observe([])
    with tracker.hooks():
        network(torch.ones(5, 8)).sin().sum().backward()  # saves x and what goes into the sine
    tracker.observe([])
    assert tracker.peak_bytes == 2 * 5 * 8 * 4


def test_what_contexts_hold_and_autograd_saves_is_counted_once():
    x = torch.ones(100, requires_grad=True)
    context = LayerContext(micro_batch=0, training=True, plan=None, gates=x, notice=None)
    tracker = ActivationTracker(nn.Linear(1, 1))
    tracker.observe([context])
    with tracker.hooks():
        y = x.sin()
        assert tracker.peak_bytes == 400
        y.sum().backward()
    context.output = torch.ones(25)
    context.kept = [[(x[:3],)]]
    tracker.observe([context])
    assert tracker.peak_bytes == 400 + 100
    tracker.observe([])
    assert tracker.context_bytes == tracker.autograd_bytes == 0


def test_arrays_of_numpy_are_found_and_views_are_what_they_view():
    array, tensor = np.arange(12), torch.arange(6)
    found = list(find_arrays({"a": array[:4].reshape(2, 2), "b": [tensor[2:], (None, 3)]}))
    assert [locate(each) for each in found] == [(array.ctypes.data, 96), (tensor.data_ptr(), 48)]
