"""The rate of a step follows from its number alone: it rises, stays or falls as [train] says, as transformers does."""

import math

import numpy as np
import pytest
import torch
from small import Notes, open_small_job

from hpcmoe.config import TrainConfig
from hpcmoe.run.schedules import learning_rate_at
from hpcmoe.run.train import train

RISE = {"learning_rate": 0.4, "learning_rate_warmup_steps": 4}


def rates(num_steps, **keys):
    train = TrainConfig(**RISE | keys)
    return [learning_rate_at(step, train, num_steps) for step in range(1, num_steps + 1)]


def test_the_learning_rate_rises_linearly_and_then_stays():
    assert rates(6) == [0.4 * 0.25, 0.4 * 0.5, 0.4 * 0.75, 0.4, 0.4, 0.4]  # bit for bit
    assert rates(2, learning_rate_warmup_steps=0) == [0.4, 0.4]
    assert rates(2, learning_rate_warmup_steps=4) == [0.1, 0.2]


def test_each_schedule_ends_at_its_final_rate():
    assert rates(8, learning_rate_schedule="linear", learning_rate_final=0.5)[3:] == pytest.approx(
        [0.4, 0.35, 0.3, 0.25, 0.2]
    )
    cosine = [0.2 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(5)]
    assert rates(8, learning_rate_schedule="cosine", learning_rate_final=0.0)[3:] == pytest.approx(cosine)
    late = {"learning_rate_schedule": "warmup-stable-decay", "learning_rate_final": 0.0}
    assert rates(8, **late, learning_rate_decay_steps=2)[3:] == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.0])
    assert rates(30, **late)[3:] == pytest.approx([0.4] * 24 + [0.8 / 3, 0.4 / 3, 0.0])
    assert rates(6, **late, learning_rate_decay_steps=6)[3:] == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup-stable-decay"])
def test_where_the_rise_takes_all_steps_nothing_falls(schedule):
    assert rates(3, learning_rate_schedule=schedule) == rates(3)
    assert rates(4, learning_rate_schedule=schedule) == rates(4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup-stable-decay"])
def test_schedules_are_those_of_transformers(schedule):
    optimization = pytest.importorskip("transformers.optimization")
    adamw = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = {
        "linear": lambda: optimization.get_linear_schedule_with_warmup(adamw, 4, 30),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(adamw, 4, 30),
        "warmup-stable-decay": lambda: optimization.get_wsd_schedule(adamw, 4, 3, 30, decay_type="linear"),
    }[schedule]()
    ours = rates(30, learning_rate_schedule=schedule, learning_rate_final=0.0)
    assert ours == pytest.approx([0.4 * theirs.lr_lambdas[0](step) for step in range(1, 31)])


@pytest.mark.mpi
@pytest.mark.parametrize("shards", [False, True])
def test_each_step_takes_and_records_its_rate_wherever_the_run_begins(comm, shared, shards):
    keys = {
        "run__steps": 6, "train__learning_rate_warmup_steps": 2, "train__learning_rate_schedule": "cosine",
        "train__shard_optimizer": shards,
    }  # fmt: skip
    expected = rates(6, learning_rate=0.01, learning_rate_warmup_steps=2, learning_rate_schedule="cosine")
    for first_step in (0, 3):
        notes, taken = Notes(), []
        with open_small_job(comm, shared, **keys) as (job, optimizer, _):
            optimizer.adamw.register_step_post_hook(
                lambda adamw, *_, taken=taken: taken.append(adamw.param_groups[1]["lr"])
            )
            train(job, notes, optimizer, (first_step, np.ones((2, 4))), lambda *state: None)
        assert taken == expected[first_step:]
        assert notes.values["train/learning_rate"] == dict(enumerate(expected[first_step:], first_step + 1))
    assert len(set(expected)) == 6 and expected[-1] == pytest.approx(0.001)
