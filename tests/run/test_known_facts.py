"""A checkpoint of another model, or of another step than its name's, is refused by the fact that differs."""

import pathlib

import pytest
from small import make_config

from hpcmoe.errors import CheckpointError
from hpcmoe.run.facts import check_facts, describe_model

PATH = pathlib.Path("run/checkpoint-3")


def test_every_fact_of_the_model_must_agree():
    config = make_config()
    facts = {"step": 3, "num_ranks": 2} | describe_model(config)
    check_facts(facts, config, PATH, 3)
    for key in describe_model(config):
        with pytest.raises(CheckpointError) as refused:
            check_facts(facts | {key: "other"}, config, PATH, 3)
        assert key in str(refused.value) and "other" in str(refused.value)


@pytest.mark.parametrize("changes", [{"step": 2}, {"step": None}])
def test_the_step_is_that_of_the_name(changes):
    config = make_config()
    with pytest.raises(CheckpointError, match="step"):
        check_facts({"step": 3, "num_ranks": 2} | describe_model(config) | changes, config, PATH, 3)
