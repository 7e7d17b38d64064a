"""A run's placement problem comes back from its record, with the loads that it saw: by node, else of its last steps."""

import dataclasses

import h5py
import numpy as np
import pytest
from cases import make_case, make_domains, write_case

from hpcmoe.errors import CheckpointError
from hpcmoe.placement.files.case import read_case
from hpcmoe.write.problem import read_loads, read_run_problem, record_problem
from hpcmoe.write.records import Records


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "run.h5")


def record(records, case):
    """Record a case's problem -> (the problem, the file)."""
    problem, _ = read_case(write_case(records.path.with_name("case.json"), case), "ports")
    record_problem(records, problem)
    records.flush()
    return problem, records.path


@pytest.mark.parametrize("case", [make_case(replicate=True), make_domains(make_case())], ids=["alike", "by node"])
def test_a_problem_comes_back_as_it_was(records, case):
    problem, path = record(records, case)
    again, notes = read_run_problem(path)
    for field in dataclasses.fields(problem):
        was, comes = getattr(problem, field.name), getattr(again, field.name)
        assert type(was) is type(comes) and np.array_equal(was, comes), field.name
    assert notes == ["the run took no step: probabilities are those that it began with"]
    assert read_run_problem(path, objective="links")[0].objective == "links"


def test_equal_rows_are_kept_once(records):
    _, path = record(records, make_case())
    with h5py.File(path) as file:
        assert file["problem/probability"].shape == (3, 1, 8)


def test_recorded_tokens_are_the_probabilities(records):
    problem, path = record(records, make_case())
    tokens = np.random.default_rng(1).integers(1, 100, (3, 4, 8))
    records.describe("experts", "tokens_of_node", tokens)
    records.describe("cluster", "node_names", list(problem.node_names))
    records.flush()
    again, notes = read_run_problem(path)
    np.testing.assert_allclose(again.probability, tokens / tokens.sum(axis=2, keepdims=True))
    assert notes == ["probabilities are those of the tokens that the run routed"]


def test_what_holds_no_problem_is_one_line(records):
    path = records.path
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_run_problem(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_run_problem(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    records.describe("run", "config", "")
    records.flush()
    with pytest.raises(CheckpointError, match="holds no problem/num_layers; must be the run.h5"):
        read_run_problem(path)


def test_tokens_by_node_come_first(records):
    tokens = np.arange(12).reshape(2, 3, 2)
    records.append(1, "experts", "utilisation", np.ones((2, 2)))
    records.describe("experts", "tokens_of_node", tokens)
    records.describe("cluster", "node_names", ["a", "b", "c"])
    records.flush()
    loads = read_loads(records.path)
    assert loads.node_names == ("a", "b", "c") and np.array_equal(loads.tokens, tokens)


def test_one_node_has_a_name_too(records):
    records.describe("experts", "tokens_of_node", np.ones((2, 1, 2)))
    records.describe("cluster", "node_names", ["alone"])
    records.flush()
    assert read_loads(records.path).node_names == ("alone",)


def test_else_the_last_steps_count(records):
    for step in range(1, 31):
        records.append(step, "experts", "utilisation", np.full((2, 3), float(step)))
    records.flush()
    loads = read_loads(records.path)
    assert loads.node_names == () and loads.tokens.shape == (2, 1, 3)
    assert (loads.tokens == np.mean(range(21, 31))).all()


@pytest.mark.parametrize("content", ["nothing", "value", "group", "flat", "text"])
def test_other_files_are_refused_in_a_line(tmp_path, content):
    path = tmp_path / "run.h5"
    match content:
        case "value":
            h5py.File(path, "w")["run/config"] = 3
        case "group":
            h5py.File(path, "w").create_group("experts/tokens_of_node")
        case "flat":
            h5py.File(path, "w")["experts/tokens_of_node"] = np.ones(3)
        case "text":
            path.write_text("no HDF5")
    with pytest.raises(CheckpointError) as refused:
        read_loads(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    assert ("holds no tokens" in said) == (content in ("value", "group", "flat"))
