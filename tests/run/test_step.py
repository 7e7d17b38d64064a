"""A step is over the whole batch, leaves gradients only in training, and measures activations once."""

import dataclasses

import numpy as np
import pytest
import torch
from small import open_small_job

from hpcmoe.errors import ConfigError
from hpcmoe.wait import gather_to_all

LOAD = np.ones((2, 4))


def gradients(job):
    return [p.grad.clone() for p in job.stepper.network.parameters() if p.grad is not None]


@pytest.mark.mpi
@pytest.mark.parametrize("purpose", ["train", "evaluate", "infer"])
def test_a_step_counts_all_tokens_and_only_training_leaves_gradients(comm, shared, purpose):
    with open_small_job(comm, shared, parallel__tensor=2 - comm.size % 2) as (job, optimizer, _):
        optimizer.zero_gradients()
        outcome = job.stepper.run(job.training, np.arange(14), LOAD, purpose)
        assert outcome.stats.num_tokens == 14 * 5
        assert outcome.stats.tokens_of_expert.sum(axis=1).tolist() == [14 * 5 * 2] * 2
        assert (outcome.loss is None) == (purpose == "infer")
        if purpose == "train":
            optimizer.sums.finish()  # until then gradients are on their way
        assert any(g.any() for g in gradients(job)) == (purpose == "train")
        assert (job.stepper.tracker.peak_bytes > 0) == (purpose == "train")


@pytest.mark.mpi
def test_training_and_evaluating_give_the_same_loss_on_the_same_batch(comm, shared):
    with open_small_job(comm, shared) as (job, optimizer, _):
        losses = [job.stepper.run(job.training, np.arange(14), LOAD, p).loss for p in ("train", "evaluate", "train")]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.mpi
def test_measuring_activations_changes_no_gradient(comm, shared):
    with open_small_job(comm, shared) as (job, optimizer, _):
        taken = []
        for _ in range(2):  # only the first is measured
            optimizer.zero_gradients()
            job.stepper.run(job.training, np.arange(14), LOAD, "train")
            optimizer.sums.finish()
            taken.append(gradients(job))
        assert all(torch.equal(first, second) for first, second in zip(*taken, strict=True))


@pytest.mark.mpi
def test_a_batch_smaller_than_the_ranks_counts_its_own_tokens(comm, shared):
    with open_small_job(comm, shared, data__batch_sequences=3) as (job, _, _):
        outcome = job.stepper.run(job.training, np.arange(1), LOAD, "evaluate")
    assert outcome.stats.num_tokens == 5 and outcome.loss > 1


@pytest.mark.mpi
def test_every_stage_of_a_step_is_timed(comm, shared):
    with open_small_job(comm, shared) as (job, _, _):
        job.stepper.run(job.training, np.arange(14), LOAD, "train")
        stages = job.stepper.clock.pop_seconds()
    assert set(stages) == {"data", "dense", "route", "dispatch", "compute", "combine", "waiting"}
    assert all(seconds > 0 for seconds in stages.values())


@pytest.mark.mpi
@pytest.mark.parametrize("purpose", ["train", "evaluate", "infer"])
def test_a_step_whose_text_one_rank_cannot_read_ends_on_all_with_its_line(comm, shared, purpose):
    alone = comm.size - 1
    with open_small_job(comm, shared, pipeline__micro_batches=1) as (job, _, _):
        if comm.rank == alone:
            job.training.spans = [dataclasses.replace(span, path=f"{span.path}.gone") for span in job.training.spans]
        with pytest.raises(ConfigError) as caught:
            job.stepper.run(job.training, np.arange(14), LOAD, purpose)
    line = f"[rank {alone} of {comm.size}] [data] files: {shared}/text.bin.gone: is gone since the run began"
    assert caught.value.shared and gather_to_all(comm, str(caught.value)) == [line] * comm.size
