"""Training lowers the loss, records what it does step by step, and repeats itself bit for bit."""

import math

import numpy as np
import pytest
from small import Notes, open_small_job

from hpcmoe.model.balance import read_biases
from hpcmoe.model.text import even_starts
from hpcmoe.run.train import is_due, measure_validation_loss, train, train_step
from hpcmoe.wait import gather_to_all

REPETITIVE = b"the quick brown fox. " * 200
QUICK = {
    "text": REPETITIVE, "run__steps": 12, "train__learning_rate": 0.03, "train__learning_rate_warmup_steps": 2,
    "train__validate_every": 4,
}  # fmt: skip


def run_training(comm, folder, first_step=0, **changes):
    """Train on a text that repeats itself -> (losses, Notes, calls of save as (step, load, activations))."""
    notes, saved = Notes(), []
    with open_small_job(comm, folder, **(QUICK | changes)) as (job, optimizer, _):
        losses = train(job, notes, optimizer, (first_step, np.ones((2, 4))), lambda *state: saved.append(state))
    return losses, notes.values, saved


@pytest.mark.mpi
def test_the_loss_falls_on_a_text_that_repeats_itself(comm, shared):
    losses, values, _ = run_training(comm, shared)
    assert losses["validation loss, first"] == pytest.approx(math.log(256), abs=0.3)
    assert losses["validation loss, last"] < losses["validation loss, first"] - 1
    assert values["train/loss"][12] < values["train/loss"][1] - 1


@pytest.mark.mpi
def test_every_step_is_recorded_once_and_saved(comm, shared):
    losses, values, saved = run_training(comm, shared, write__activations_of_layers=(1,), write__activations_every=5)
    per_step = {name for name, series in values.items() if list(series) == list(range(1, 13))}
    assert values.keys() - per_step == {"train/validation_loss", "cluster/migrated"}
    assert list(values["cluster/migrated"]) == [1]
    assert per_step >= {
        "train/loss", "train/gradient_norm", "run/tokens_per_second", "run/seconds", "run/seconds_optimizer",
        "dispatch/link_sigma", "dispatch/dropped", "dispatch/aux_loss", "experts/utilisation",
        "dispatch/link_sigma_of_layer", "experts/balancedness", "experts/balancedness_of_layer",
    }  # fmt: skip
    assert np.shape(values["experts/utilisation"][1]) == (2, 4)  # U_e of every expert
    assert np.shape(values["dispatch/link_sigma_of_layer"][1]) == (2,)
    assert list(values["train/validation_loss"]) == [0, 4, 8, 12]
    assert [values["train/validation_loss"][step] for step in (0, 12)] == list(losses.values())
    assert [step for step, _, _ in saved] == list(range(1, 13))
    assert [step for step, _, activations in saved if activations] == [5, 10, 12]


@pytest.mark.mpi
def test_what_was_measured_acts_on_the_next_step(comm, shared):
    _, values, saved = run_training(comm, shared, run__steps=3, dispatch__load_window_steps=2)
    load = np.ones((2, 4))
    for step, saved_load, _ in saved:
        load = (load + values["experts/utilisation"][step]) / 2
        assert np.allclose(saved_load, load)
    assert not np.allclose(load, 1)


@pytest.mark.mpi
def test_biases_move_against_each_steps_load_on_all_ranks_alike(comm, shared):
    notes, speed = Notes(), 0.125
    changes = QUICK | {"run__steps": 5, "dispatch__bias_update_speed": speed}
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        train(job, notes, optimizer, (0, np.ones((2, 4))), lambda *state: None)
        biases = gather_to_all(comm, read_biases(job.stepper.network.layers))
    busy = np.array(list(notes.values["experts/utilisation"].values()))  # [steps, L, E]
    assert np.array_equal(biases[0], -speed * np.sign(busy - 1).sum(axis=0)) and biases[0].any()
    assert all(np.array_equal(bias, biases[0]) for bias in biases)


@pytest.mark.mpi
def test_two_runs_are_alike_bit_for_bit_and_another_seed_is_not(comm, shared):
    first, second, other = (run_training(comm, shared, run__seed=seed, run__steps=4)[1] for seed in (0, 0, 1))
    for name in ("train/loss", "train/gradient_norm", "train/validation_loss", "dispatch/aux_loss"):
        assert first[name] == second[name], name
        assert first[name] != other[name], name


@pytest.mark.mpi
def test_training_goes_on_after_the_step_it_is_given(comm, shared):
    _, values, saved = run_training(comm, shared, first_step=10)
    assert list(values["train/loss"]) == [11, 12] == [step for step, _, _ in saved]
    assert list(values["train/validation_loss"]) == [12]  # that of step 10 was recorded before
    losses, values, saved = run_training(comm, shared, first_step=12)
    assert saved == [] and list(losses) == ["validation loss, first"]  # nothing was trained, so nothing is last


@pytest.mark.mpi
def test_validation_is_the_mean_over_all_its_sequences(comm, shared):
    """Nine sequences in batches of fourteen, of five and of two are the same nine."""
    losses = []
    for batch in (14, 5, 2):
        with open_small_job(comm, shared, data__batch_sequences=batch, pipeline__micro_batches=1) as (job, _, _):
            losses.append(measure_validation_loss(job, np.ones((2, 4)), 0))
            if batch > 9:
                starts = even_starts(len(job.validation), 9, job.config.model.sequence_length)
                whole = job.stepper.run(job.validation, starts, np.ones((2, 4)), "evaluate").loss
    assert losses[0] == pytest.approx(whole, rel=1e-6)
    assert losses[1:] == pytest.approx(losses[:2], rel=1e-6)


@pytest.mark.mpi
def test_a_steps_gradients_do_not_linger(comm, shared):
    """The same batch with a learning rate of next to nothing has the same gradient norm again."""
    with open_small_job(comm, shared, train__learning_rate=1e-12) as (job, optimizer, _):
        norms = [train_step(job, optimizer, np.ones((2, 4)), 1)[1] for _ in range(3)]
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-5)


def test_what_is_due_every_so_often_is_due_at_the_last_step_too():
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert not any(is_due(step, 0, 10) for step in range(1, 11))
