"""A Hugging Face model trained on many ranks learns as transformers' own on one process does."""

import numpy as np
import pytest
import torch
from spreading import place_unevenly
from tuning import gather_numbers, make_tuning_config, open_tuning, run_tuning, train_job, tune_plainly

from hpcmoe.config import ModelConfig
from hpcmoe.errors import ConfigError
from hpcmoe.run.model_optimizer import round_at_random
from hpcmoe.run.trained_parts import make_adapter_config
from hpcmoe.run.tuning_job import check_sequences

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

CLOSE = {1: 2e-6, 2: 1e-4, 3: 1e-4, 4: 1e-4}  # relative, by step: errors of rounding grow


def compare_losses(comm, changes, family="mixtral", **options):
    """Compare a run's losses and norms with those of transformers alone, which rank 0 has."""
    values = run_tuning(comm, family=family, **changes, **options)
    losses, norms, _ = tune_plainly(family, **changes)
    for step, close in CLOSE.items():
        assert values["train/loss"][step] == pytest.approx(losses[step - 1], rel=close), step
        assert values["train/gradient_norm"][step] == pytest.approx(norms[step - 1], rel=10 * close), step
    return values


@pytest.mark.mpi
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pipeline__schedule": "arrival", "pipeline__deterministic": False, "pipeline__micro_batches": 3},
        {"train__shard_optimizer": True, "model__gradient_checkpointing": True},
    ],
    ids=["overlap", "arrival", "sharded, checkpointed"],
)
def test_losses_are_those_of_one_process(comm, changes):
    values = compare_losses(comm, changes)
    assert np.shape(values["experts/utilisation"][1]) == (2, 8)
    assert values["train/loss"][4] != values["train/loss"][1]


@pytest.mark.mpi
def test_replicated_experts_on_several_nodes_learn_the_same(comm):
    compare_losses(comm, {}, family="gpt_oss", placement=place_unevenly(comm.size), num_nodes=2)


@pytest.mark.mpi
def test_an_auxiliary_loss_is_the_mean_of_the_micro_batches(comm):
    changes = {"model__aux_loss": True}
    values = compare_losses(comm, changes)
    without = run_tuning(comm)
    assert values["train/loss"][1] == without["train/loss"][1]  # it is not in the loss that is shown
    assert values["train/loss"][4] != without["train/loss"][4]


@pytest.mark.mpi
def test_experts_that_move_in_mid_run_change_nothing(comm):
    values = compare_losses(comm, {"rebalance__every": 2})
    moved = values["cluster/moved"]
    assert list(moved) == [3] and (moved[3] > 0) == (comm.size > 1)
    assert list(values["cluster/migrated"]) == [1, 3][: 1 + (comm.size > 1)]


def is_router(name):
    """Say whether a parameter of mixtral is a router's."""
    return ".gate." in name


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("trains", "is_trained"),
    [("experts", lambda name: ".experts." in name), ("router", is_router), ("lora", lambda name: "lora_" in name)],
)
def test_only_what_is_to_be_trained_changes(comm, trains, is_trained):
    changes = {"model__trains": trains, "train__shard_optimizer": True, "train__weight_decay": 0.1}
    with open_tuning(comm, **changes) as job:
        before = gather_values(job)
        values, _ = train_job(job)
        after = gather_values(job)
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert changed == {name for name in after if is_trained(name)} and changed
    if trains != "lora":
        losses, _, _ = tune_plainly(trained=is_trained, **changes)
        assert list(values["train/loss"].values()) == pytest.approx(losses, rel=1e-4)


def gather_values(job):
    """Put together the parameters of a job -> array by logical name."""
    return {name: array for name, array in gather_numbers(job).items() if name.endswith("/value")}


@pytest.mark.mpi
def test_adapters_take_the_matrices_that_are_named(comm):
    with open_tuning(comm) as job:
        every = make_adapter_config(job.model, ModelConfig(trains="lora")).target_modules
        assert len(every) == 8 and {name.split(".")[-1] for name in every} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        one = make_adapter_config(job.model, ModelConfig(trains="lora", lora_targets=("v_proj",))).target_modules
        assert {name.split(".")[-1] for name in one} == {"v_proj"} and len(one) == 2
        with pytest.raises(ConfigError, match="'gate' is no dense matrix of this model: it has k_proj, o_proj, q_proj"):
            make_adapter_config(job.model, ModelConfig(trains="lora", lora_targets=("gate",)))


@pytest.mark.mpi
@pytest.mark.parametrize(
    "changes",
    [
        {"train__shard_optimizer": True, "model__dtype": "bfloat16", "write__asynchronous": True},
        {"model__trains": "lora"},
        pytest.param({}, marks=pytest.mark.full),
    ],
    ids=["bfloat16, sharded", "lora", "float32"],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(comm, shared, changes):
    changes = {"write__checkpoint_every": 2, "family": "qwen2_moe"} | changes
    with open_tuning(comm, **changes) as job:
        values, numbers = train_job(job, shared)
    with open_tuning(comm, **changes) as job:
        again, resumed = train_job(job, resume=shared / "checkpoint-2")
    assert again["train/loss"] == {step: values["train/loss"][step] for step in (3, 4)}
    assert numbers.keys() == resumed.keys()
    assert [name for name, array in numbers.items() if not np.array_equal(array, resumed[name])] == []


@pytest.mark.mpi
def test_a_run_goes_on_at_another_shape(comm, shared):
    with open_tuning(comm, train__shard_optimizer=True) as job:
        values, numbers = train_job(job, shared)
    with open_tuning(comm, placement=place_unevenly(comm.size), parallel__data=1) as job:
        again, resumed = train_job(job, resume=shared / "checkpoint-2")
    shape = {"parallel__data": comm.size, "parallel__expert": 1, "train__shard_optimizer": True}
    with open_tuning(comm, **shape) as job:
        replicated, _ = train_job(job, resume=shared / "checkpoint-2")
    for other in (again, replicated):
        for step in (3, 4):
            assert other["train/loss"][step] == pytest.approx(values["train/loss"][step], rel=1e-5)
    assert all(np.allclose(array, resumed[name], rtol=1e-2, atol=1e-4) for name, array in numbers.items())


@pytest.mark.mpi
def test_bfloat16_weights_learn_with_moments_of_float32(comm):
    changes = {"run__steps": 8, "train__learning_rate": 1e-4, "train__learning_rate_schedule": "constant"}
    with open_tuning(comm, model__dtype="bfloat16", train__shard_optimizer=True, **changes) as job:
        values, _ = train_job(job)
        assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}
        moments = [entry.dtype for state in job.optimizer.adamw.state.values() for entry in state.values()]
        assert set(moments) == {torch.float32}
    whole = run_tuning(comm, **changes)
    for step in (1, 8):
        assert values["train/loss"][step] == pytest.approx(whole["train/loss"][step], rel=5e-3)


def test_rounding_at_random_is_right_in_the_mean():
    weights = torch.full((20000,), 1.0 + 2.0**-9)  # a quarter of the way between two numbers of bfloat16
    rounded = round_at_random(weights.clone(), 7)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert rounded.mean().item() == pytest.approx(1 + 2.0**-9, abs=2e-4)
    assert torch.equal(rounded, round_at_random(weights.clone(), 7)) and torch.equal(
        rounded, rounded.bfloat16().float()
    )
    assert not torch.equal(rounded, round_at_random(weights.clone(), 8))
    assert round_at_random(-weights, 7).mean().item() == pytest.approx(-1 - 2.0**-9, abs=2e-4)


def test_a_rank_without_a_sequence_is_refused():
    with pytest.raises(ConfigError, match=r"batch_sequences = 12: must be at least .* 2 x 7 ranks = 14 for"):
        check_sequences(make_tuning_config(), 7)
    check_sequences(make_tuning_config(), 6)
