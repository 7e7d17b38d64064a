"""The network is the same at any number of ranks, and its counts are those of all ranks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import gather_logical, make_config, open_small_job

from hpcmoe.model.language import Dense
from hpcmoe.model.routing_stats import count_routings, make_routing_stats
from hpcmoe.wait import gather_to_all


def draw(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.mpi
@pytest.mark.parametrize("changes", [{}, {"parallel__tensor": 2}, {"parallel__data": 2}])
def test_weights_are_drawn_alike_at_any_number_of_ranks_and_any_split(comm, shared, changes):
    if comm.size % 2 and changes:
        pytest.skip("needs an even number of ranks")
    alone = comm.Split(comm.rank)
    (shared / str(comm.rank)).mkdir()
    with open_small_job(alone, shared / str(comm.rank)) as (_, _, state):
        expected = gather_logical(alone, state, lambda p: p.data)
    with open_small_job(comm, shared, **changes) as (_, _, state):
        drawn = gather_logical(comm, state, lambda p: p.data)
    assert drawn.keys() == expected.keys()
    assert all(torch.equal(drawn[name], weights) for name, weights in expected.items())
    alone.Free()


@pytest.mark.parametrize("attention", [True, False])
def test_a_token_sees_its_own_sequence_up_to_itself(attention):
    model = make_config(model__attention=attention).model
    dense = Dense(model, draw)
    x = draw(2 * model.sequence_length, model.hidden).requires_grad_()
    token = model.sequence_length + 2  # the third of the second sequence
    dense(x)[1][token].sum().backward()
    seen = x.grad.any(dim=1).nonzero().flatten().tolist()
    assert seen == ([token - 2, token - 1, token] if attention else [token])


def test_the_residual_goes_around_norm_and_without_attention_is_the_input():
    model = make_config(model__attention=False).model
    x = 3 * draw(7, model.hidden)
    residual, normed = Dense(model, draw)(x)
    assert torch.equal(residual, x)
    assert torch.allclose(normed.square().mean(dim=1), torch.ones(7), rtol=1e-3)
    assert torch.allclose(normed / x, (normed / x)[:, :1].expand_as(x), rtol=1e-4)


@pytest.mark.parametrize("kept", [None, torch.tensor([[False, True], [True, False]])])
def test_each_layers_routing_is_counted_in_a_row(kept):
    routings = [
        SimpleNamespace(
            tokens_of_expert=torch.tensor(tokens), probability_sum=torch.tensor([1.5, 0.5]), z_sum=torch.tensor(7.0),
            kept=kept,
        )
        for tokens in ([3, 1], [0, 4])
    ]  # fmt: skip
    drops = 0 if kept is None else 2
    assert count_routings(routings).tolist() == [[3, 1, 1.5, 0.5, 7, drops], [0, 4, 1.5, 0.5, 7, drops]]


def test_routing_stats_add_up_micro_batches():
    first, second = np.array([[3.0, 1, 2.5, 1.5, 7, 2]]), np.array([[0.0, 4, 1, 3, 5, 0]])
    stats = make_routing_stats([first, second], num_tokens=8, own_tokens=np.array([[2, 1]]), top_k=1)
    assert stats.tokens_of_expert.tolist() == [[3, 5]]
    assert stats.utilisation.tolist() == [[0.75, 1.25]]
    assert stats.num_dropped == 2 and stats.z_loss == 12 / 8
    assert stats.aux_loss == pytest.approx(2 * (3 / 4 * 2.5 + 1 / 4 * 1.5) / 8 + 2 * (4 / 4 * 3) / 8)


@pytest.mark.mpi
def test_watched_layers_keep_what_enters_and_leaves_them(comm, shared):
    with open_small_job(comm, shared) as (job, _, _):
        network, starts, load = job.stepper.network, np.arange(14), np.ones((2, 4))
        job.stepper.run(job.training, starts, load, "evaluate", (0, 1))
        seen = network.take_activations()
        assert set(seen) == {f"layer{layer}/{name}" for layer in (0, 1) for name in ("input", "output", "experts")}
        assert np.array_equal(seen["layer0/output"], seen["layer1/input"])
        assert not np.array_equal(seen["layer1/output"], seen["layer1/input"])
        assert sum(gather_to_all(comm, len(seen["layer1/output"]))) == 14 * 5

        # The experts kept are those that were counted.
        chosen = sum(gather_to_all(comm, np.bincount(seen["layer1/experts"].ravel(), minlength=4)))
        assert np.array_equal(chosen, network.routing.wait_stats().tokens_of_expert[1])
        job.stepper.run(job.training, starts, load, "evaluate")
        assert network.take_activations() == {}


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stack_infers_in_its_precision(comm, shared, dtype):
    with open_small_job(comm, shared, run__mode="infer", model__dtype=dtype) as (job, _, _):
        network = job.stepper.network
        experts = [p for layer in network.layers for p in layer.experts.parameters()]
        assert {p.dtype for p in experts} <= {getattr(torch, dtype)}
        outcome = job.stepper.run(job.training, np.arange(14), np.ones((2, 4)), "infer", (1,))
        assert outcome.loss is None and outcome.stats.tokens_of_expert.sum() == 2 * 14 * 5 * 2
        output = network.take_activations()["layer1/output"]
        assert np.isfinite(output).all() and (output.any() or len(output) == 0)


def test_an_untrained_head_guesses_evenly(comm, tmp_path):
    with open_small_job(comm, tmp_path) as (job, _, _):
        outcome = job.stepper.run(job.training, np.arange(14), np.ones((2, 4)), "evaluate")
    assert outcome.loss == pytest.approx(math.log(256), abs=0.2)
