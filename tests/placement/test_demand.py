"""Probabilities are alike, the config's, or those of recorded loads; what does not fit is told with its arithmetic."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpcmoe.errors import ConfigError
from hpcmoe.placement.demand import Loads, make_probability
from hpcmoe.placement.files.loads import find_loads

MODEL = SimpleNamespace(num_layers=2, num_experts=3)


def refusal(path, loads=None):
    with pytest.raises(ConfigError) as refused:
        find_loads(str(path), MODEL, lambda path: loads)
    return str(refused.value)


def write(folder, rows):
    """Write rows of probabilities -> the file."""
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_by_default_all_experts_are_alike():
    probability = make_probability(find_loads("uniform", MODEL, None), ("a", "b"))
    assert probability.shape == (2, 2, 3) and np.allclose(probability, 1 / 3)


def test_a_file_gives_a_row_for_all_layers_or_one_each(tmp_path):
    for rows in (((0.5, 0.25, 0.25),), ((0.5, 0.25, 0.25), (0, 0, 1.0))):
        loads = find_loads(str(write(tmp_path, rows)), MODEL, None)
        probability = make_probability(loads, ("a", "b", "c"))
        assert probability.shape == (2, 3, 3)
        assert all(np.allclose(probability[layer], rows[layer % len(rows)]) for layer in range(2))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (((1.0, 0, 0),) * 3, "has 3 rows, must have 1 or [model] num_layers = 2"),
        (((0.5, 0.5),), "row [0] has 2 entries, [model] num_experts = 3"),
        (((0.5, 0.25, 0.25), (0.5, 0.3, 0.25)), "row [1] sums to 1.05, must sum to 1"),
        ((("a", 0, 0),), "entry [0][0] = 'a', must be a number"),
        (((True, 0, 0),), "entry [0][0] = true, must be a number"),
        (((10**400, 0.5, 0),), "entry [0][0] = a whole number of 1329 bits, must be a number"),
        (((10**308, 10**308, 0),), "row [0] sums to inf, must sum to 1"),
        (((float("nan"), 0, 0),), "row [0] sums to nan, must sum to 1"),
        ({"rows": 1}, "must be a list of rows of numbers"),
        ((1.0, 0.0, 0.0), "must be a list of rows of numbers"),
        (((1.5, -0.25, -0.25),), "entry [0][1] = -0.25, must be 0 or above"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, said):
    file = write(tmp_path, rows)
    assert refusal(file) == f"[placement] loads = {file}: {said}"


def test_a_file_that_cannot_be_read_is_refused_by_its_key(tmp_path):
    assert (
        refusal(tmp_path / "a.json")
        == f"[placement] loads = {tmp_path}/a.json: cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.ones((3, 1, 3)), "its run had num_layers = 3, [model] num_layers = 2"),
        (np.ones((2, 1, 4)), "its run had num_experts = 4, [model] num_experts = 3"),
        (np.arange(2)[:, None, None] * np.ones((2, 1, 3)), "holds a layer without tokens"),
        (np.full((2, 1, 3), np.nan), "holds a layer without tokens"),
    ],
)
def test_loads_of_another_model_are_refused(tokens, said):
    told = refusal("old/run.h5", Loads(tokens=tokens, node_names=()))
    assert told == f"[placement] loads = old/run.h5: {said}"


def test_recorded_loads_are_found_by_the_nodes_names():
    tokens = np.array([[[1, 1, 2], [6, 0, 0], [0, 0, 0]]])  # of nodes a, b, c
    loads = Loads(tokens=tokens, node_names=("a", "b", "c"))
    probability = make_probability(loads, ("b", "new", "c", "a"))
    everywhere = [0.7, 0.1, 0.2]
    assert np.allclose(probability[0], [[1, 0, 0], everywhere, everywhere, [0.25, 0.25, 0.5]])
    assert np.allclose(make_probability(loads, ("x", "y"))[0], [everywhere] * 2)  # other nodes altogether
    one = Loads(tokens=tokens.sum(axis=1, keepdims=True), node_names=())
    assert np.allclose(make_probability(one, ("a", "b"))[0], [everywhere] * 2)


def test_recorded_loads_are_found_with_a_domain_or_without_but_not_where_that_is_unclear(caplog):
    tokens = np.array([[[1, 0], [0, 1], [1, 3]]])
    loads = Loads(tokens=tokens, node_names=("a.x", "b", "c.x"))
    assert np.allclose(make_probability(loads, ("b.y", "a", "c.z"))[0], [[0, 1], [1, 0], [1 / 3, 2 / 3]])
    assert not caplog.records
    unclear = Loads(tokens=tokens, node_names=("a.x", "a.y", "b"))
    assert np.allclose(make_probability(unclear, ("a", "b"))[0], [[1 / 3, 2 / 3], [0.25, 0.75]])
    assert "loads of nodes by name: a may be a.x or a.y: the loads of all are taken for it" in caplog.text


@given(arrays(np.int64, (2, 3, 4), elements=st.integers(0, 9)), st.permutations("abcd"))
def test_every_row_sums_to_one(tokens, names):
    tokens[:, 0, 0] += 1
    probability = make_probability(Loads(tokens=tokens, node_names=("a", "b", "c")), tuple(names))
    assert probability.shape == (2, 4, 4) and (probability >= 0).all()
    assert np.allclose(probability.sum(axis=2), 1)
