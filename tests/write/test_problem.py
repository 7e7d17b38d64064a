"""A run's placement problem comes back from its record, with the loads that the run saw."""

import dataclasses

import h5py
import numpy as np
import pytest
from cases import make_case, make_domains, write_case

from hpcmoe.errors import CheckpointError
from hpcmoe.placement.files.case import read_case
from hpcmoe.write.hdf5 import write_entry
from hpcmoe.write.problem import read_run_problem, record_problem


class Facts:
    """Records that write each fact to a file at once."""

    def __init__(self, path):
        self.path = path

    def describe(self, chapter, name, value, unit=""):
        """Write a fact."""
        with h5py.File(self.path, "a") as file:
            write_entry(file.require_group(chapter), name, value, unit)


def keep(tmp_path, case):
    """Keep a case's problem in a file -> (the problem, the file)."""
    problem, _ = read_case(write_case(tmp_path / "case.json", case), "ports")
    record_problem(Facts(tmp_path / "run.h5"), problem)
    return problem, tmp_path / "run.h5"


@pytest.mark.parametrize("case", [make_case(replicate=True), make_domains(make_case())], ids=["alike", "by node"])
def test_a_problem_comes_back_as_it_was(tmp_path, case):
    problem, path = keep(tmp_path, case)
    again, notes = read_run_problem(path)
    for field in dataclasses.fields(problem):
        was, comes = getattr(problem, field.name), getattr(again, field.name)
        assert type(was) is type(comes) and np.array_equal(was, comes), field.name
    assert notes == ["the run took no step: probabilities are those that it began with"]
    assert read_run_problem(path, objective="links")[0].objective == "links"


def test_equal_rows_are_kept_once(tmp_path):
    _, path = keep(tmp_path, make_case())
    with h5py.File(path) as file:
        assert file["problem/probability"].shape == (3, 1, 8)


def test_recorded_tokens_are_the_probabilities(tmp_path):
    problem, path = keep(tmp_path, make_case())
    tokens = np.random.default_rng(1).integers(1, 100, (3, 4, 8))
    facts = Facts(path)
    facts.describe("experts", "tokens_of_node", tokens)
    facts.describe("cluster", "node_names", list(problem.node_names))
    again, notes = read_run_problem(path)
    np.testing.assert_allclose(again.probability, tokens / tokens.sum(axis=2, keepdims=True))
    assert notes == ["probabilities are those of the tokens that the run routed"]


def test_what_holds_no_problem_is_one_line(tmp_path):
    path = tmp_path / "run.h5"
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_run_problem(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_run_problem(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    Facts(path).describe("run", "config", "")
    with pytest.raises(CheckpointError, match="holds no problem/num_layers; must be the run.h5"):
        read_run_problem(path)
