"""Loads are read back by node where a run kept them so, else from its last steps; other files are refused in a line."""

import h5py
import numpy as np
import pytest

from hpcmoe.errors import CheckpointError
from hpcmoe.write.problem import read_loads
from hpcmoe.write.records import Records


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "run.h5")


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


@pytest.mark.parametrize("content", ["nothing", "facts", "group", "flat", "text"])
def test_other_files_are_refused_in_a_line(tmp_path, content):
    path = tmp_path / "run.h5"
    match content:
        case "facts":
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
    assert ("holds no tokens" in said) == (content in ("facts", "group", "flat"))
