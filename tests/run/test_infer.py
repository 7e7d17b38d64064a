"""Inference measures the steps after its warm-up, and those alone."""

import numpy as np
import pytest
from small import Notes, open_small_job

from hpcmoe.model.balance import read_biases, write_biases
from hpcmoe.run.infer import infer


@pytest.mark.mpi
def test_only_the_steps_after_the_warm_up_are_measured(comm, shared):
    notes, saved, purposes = Notes(), [], []
    with open_small_job(comm, shared, run__mode="infer", run__steps=3, run__warmup_steps=2) as (job, _, _):
        run = job.stepper.run
        job.stepper.run = lambda *arguments: purposes.append(arguments[3]) or run(*arguments)
        assert infer(job, notes, np.ones((2, 4)), lambda step, load, seen: saved.append(step)) == {}
    assert purposes == ["infer"] * 5
    assert job.meter.num_steps == 3 and job.meter.sums["num_tokens"] == 3 * 14 * 5
    assert saved == [1, 2, 3] == list(notes.values["run/tokens_per_second"])
    assert notes.values["dispatch/dropped"] == {1: 0, 2: 0, 3: 0}
    seconds = notes.values["run/seconds"].values()
    assert job.meter.sums["seconds"] == pytest.approx(sum(seconds)) and all(second > 0 for second in seconds)


@pytest.mark.mpi
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_the_meter_counts_the_rows_of_the_window_alone(comm, shared, warmup_steps):
    changes = {"run__mode": "infer", "run__steps": 3, "run__warmup_steps": warmup_steps}
    with open_small_job(comm, shared, **changes) as (job, _, _):
        infer(job, Notes(), np.ones((2, 4)), lambda *state: None)
        sent = comm.allreduce(int(job.meter.rows_to_peer.sum()))
    assert sent == 3 * 2 * 2 * 14 * 5 * 2  # steps x there and back x layers x tokens x K


@pytest.mark.mpi
def test_biases_choose_as_trained_and_stay(comm, shared):
    notes, biases = Notes(), np.zeros((2, 4), np.float32)
    biases[:, 1] = 1e3
    changes = {"run__mode": "infer", "run__steps": 2, "dispatch__bias_update_speed": 0.1, "model__top_k": 1}
    with open_small_job(comm, shared, **changes) as (job, _, _):
        write_biases(job.stepper.network.layers, biases)
        infer(job, notes, np.ones((2, 4)), lambda *state: None)
        assert np.array_equal(read_biases(job.stepper.network.layers), biases)
    assert notes.values["experts/utilisation"][2].tolist() == [[0, 4, 0, 0]] * 2


@pytest.mark.mpi
def test_activations_are_kept_when_due(comm, shared):
    seen = {}
    changes = {"run__steps": 5, "run__warmup_steps": 1, "write__activations_of_layers": (0,)}
    with open_small_job(comm, shared, run__mode="infer", write__activations_every=2, **changes) as (job, _, _):
        infer(job, Notes(), np.ones((2, 4)), lambda step, load, activations: seen.update({step: activations}))
    assert [step for step, activations in seen.items() if activations] == [2, 4, 5]
