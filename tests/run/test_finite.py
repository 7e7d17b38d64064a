"""What is not finite ends training on all ranks, with the keys to blame, and never gets into a checkpoint."""

import numpy as np
import pytest
import torch
from small import make_config, open_small_job

from hpcmoe.errors import TrainingError
from hpcmoe.run.finite import check_arrays, check_finite, check_state, find_causes
from hpcmoe.run.state import LOAD

NAN, INF = float("nan"), float("inf")
FIRST_STEP_HAS_NO = ("epsilon", "learning_rate", "clip_norm", "beta2")


def catch_error(check, *arguments, **figures):
    """Check what is not finite -> the line."""
    with pytest.raises(TrainingError) as caught:
        check(*arguments, **figures)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (2.0, INF), (INF, NAN), (-INF, 1.0)])
def test_a_figure_that_is_not_finite_ends_training_on_all_ranks_alike(loss, norm):
    config = make_config(train__learning_rate=3.0)
    error = catch_error(check_finite, 7, config, loss=loss, norm_of_the_gradients=norm)
    assert error.shared and str(error).startswith(
        f"step 7: loss {loss:g}, norm of the gradients {norm:g}: likely causes"
    )
    assert "try less than [train] learning_rate = 3.0" in str(error)
    check_finite(7, config, loss=2.0, norm_of_the_gradients=1.0)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "the steps are too large: try less than [train] learning_rate = 0.01"),
        ({"train__learning_rate": 9.0, "train__epsilon": 1e-30}, "the steps are too large"),
        ({"train__epsilon": 1e-30}, "[train] epsilon = 1e-30, too small for gradients near 0: try 1e-8"),
        ({"train__weight_decay": 500.0}, "[train] learning_rate x weight_decay = 5: must be far below 1"),
        ({"dispatch__z_loss_weight": 1e6}, "[dispatch] z_loss_weight = 1000000.0: its loss outweighs the text's"),
    ],
)
def test_the_likeliest_cause_comes_first(changes, first):
    assert next(iter(find_causes(5, make_config(**changes)))).startswith(first)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__clip_norm": 0.0}, "[train] clip_norm = 0: try 1"),
        ({"train__learning_rate_warmup_steps": 0}, "learning_rate_warmup_steps = 0: try 20"),
        ({"train__beta2": 0.5}, "[train] beta2 = 0.5: must be well above beta1 squared = 0.81"),
        ({"model__dtype": "bfloat16"}, '[model] dtype = "bfloat16": try "float32"'),
    ],
)
def test_a_cause_is_named_where_the_config_has_it_and_not_where_it_has_not(changes, said):
    assert any(said in cause for cause in find_causes(5, make_config(**changes)))
    assert not any(said in cause for cause in find_causes(5, make_config()))


def test_in_the_first_step_no_key_of_the_optimizer_is_to_blame():
    config = make_config(train__epsilon=1e-30, train__clip_norm=0.0, train__beta2=0.5, model__dtype="bfloat16")
    causes = list(find_causes(1, config))
    assert causes[0].startswith("activations overflow") and "bfloat16" in causes[1]
    assert not any(key in cause for cause in causes for key in FIRST_STEP_HAS_NO)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_array_with_one_number_that_is_not_finite_is_named(value):
    whole, broken = torch.zeros(3, 1000), torch.zeros(3, 1000)
    broken[2, 999] = value
    line = str(catch_error(check_arrays, [("a", whole), ("b", broken)], 9, make_config()))
    assert line.startswith("step 9: b is not finite, so no checkpoint is made; those before stay; likely causes")
    assert "b is not" in str(catch_error(check_arrays, [("b", broken.numpy())], 9, make_config()))
    check_arrays([("a", whole), ("empty", torch.zeros(0)), ("large", torch.full((2,), 3e38))], 9, make_config())


def spoil(state, name, value):
    """Set a number of an array of which only this rank saves a part -> whether there was one."""
    for part, tensor in state.arrays():
        if part.owned and part.name == name:
            tensor.view(-1)[-1] = value
            return True
    return False


@pytest.mark.mpi
@pytest.mark.parametrize("shard_optimizer", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts/layer1/down/value", NAN),
        ("experts/layer0/up/second_moment", INF),
        ("dense/head_weight/value", -INF),
        ("dense/head_weight/first_moment", NAN),
    ],
)
def test_no_state_that_is_not_finite_is_saved_whichever_rank_holds_it(comm, shared, name, value, shard_optimizer):
    with open_small_job(comm, shared, train__shard_optimizer=shard_optimizer) as (job, _, state):
        load = {LOAD: np.ones((2, 4))}
        check_state(comm, state, 3, load)
        where = [
            rank
            for rank, has in enumerate(
                comm.allgather(any(part.name == name and part.owned for part, _ in state.arrays()))
            )
            if has
        ]
        if comm.rank == where[-1]:
            assert spoil(state, name, value)
        error = catch_error(check_state, comm, state, 3, load)
    assert error.shared and f"[rank {where[-1]} of {comm.size}] step 3: {name}" in str(error)
    assert ("of expert" in str(error)) == name.startswith("experts/")


@pytest.mark.mpi
def test_a_load_or_a_bias_that_is_not_finite_is_not_saved(comm, shared):
    with open_small_job(comm, shared) as (job, _, state):
        catch_error(check_state, comm, state, 3, {LOAD: np.full((2, 4), NAN)})
        job.stepper.network.layers[1].router.bias[2] = INF
        assert "balance/bias is not finite" in str(catch_error(check_state, comm, state, 3, {LOAD: np.ones((2, 4))}))
