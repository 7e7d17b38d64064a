"""Placements as files: what is written comes back, EPLB's maps are read, and each error is one line."""

import dataclasses
import json

import numpy as np
import pytest
from placement.problems import EXPERT_BYTES, make_problem

from hpcmoe.errors import ConfigError
from hpcmoe.placement.files.maps import read_map, write_map

PROBLEM = make_problem([2, 1], 4, 2, num_layers=2, replicate=True)
LAYOUTS = np.array([[0, 1, 2, -1, 3, 0], [3, 2, 1, 0, 2, -1]])


def write(tmp_path, tree, name="map.json"):
    """Write a file -> its path."""
    path = tmp_path / name
    np.save(path, tree) if name.endswith(".npy") else path.write_text(
        tree if isinstance(tree, str) else json.dumps(tree)
    )
    return path


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_map_comes_back_as_it_was(tmp_path, suffix):
    path = tmp_path / f"map{suffix}"
    write_map(path, LAYOUTS, suffix)
    layouts, notes = read_map(path, PROBLEM)
    assert (layouts == LAYOUTS).all() and layouts.dtype == np.int64 and notes == []


def test_json_has_what_eplb_returns(tmp_path):
    write_map(tmp_path / "map.json", LAYOUTS, ".json")
    tree = json.loads((tmp_path / "map.json").read_text())
    assert tree["physical_to_logical"] == LAYOUTS.tolist()
    assert tree["logical_to_physical"] == [[[0, 5], [1], [2], [4]], [[3], [2], [1, 4], [0]]]
    assert tree["logical_count"] == [[2, 1, 1, 1], [1, 1, 2, 1]]


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"expert_of_slot": LAYOUTS.reshape(2, 3, 2).tolist(), "seed": 3}, "OUT.json"),
        (LAYOUTS.tolist(), "map.json"),
        (LAYOUTS.reshape(2, 3, 2).tolist(), "map.json"),
        (LAYOUTS.astype(np.int32), "map.npy"),
    ],
)
def test_every_form_is_read(tmp_path, tree, name):
    assert (read_map(write(tmp_path, tree, name), PROBLEM)[0] == LAYOUTS).all()


def test_fewer_slots_leave_the_others_empty_and_second_replicas_on_a_rank_are_left_out(tmp_path):
    wide = dataclasses.replace(PROBLEM, slots_per_rank=3, memory_bytes=np.array([12, 6]) * EXPERT_BYTES)
    layouts, notes = read_map(write(tmp_path, [[0, 1, 2, 2, 3, 0]] * 2), wide)
    assert layouts.tolist() == [[0, 1, -1, 2, -1, -1, 3, 0, -1]] * 2
    assert notes == ["2 replicas are left out, second ones on their rank"]


@pytest.mark.parametrize(
    ("tree", "changes", "said"),
    [
        ([[0, 1, 2, 3, 0, 1]] * 4, {}, "the list has 4 layers, layers = 2"),
        ([[0, 1, 2, 3, 0]] * 2, {}, "the list[0] has 5 slots: must be a multiple of the 3 ranks"),
        ([[0, 1, 2, 3, 0, 1, 2, 3, 0]] * 2, {}, "the list has 3 experts on rank 0 of layer 0: must be at most 2"),
        ([[[0, 1, 2], [3, 0, 1]]] * 2, {}, "the list[0] has 2 ranks, experts are spread over 3"),
        ([[0, 1, 2, 3, 0, 4]] * 2, {}, "the list[0][5] = 4: must be -1 to 3"),
        ([[0, 1, 2, 3, 0, -2]] * 2, {}, "the list[0][5] = -2: must be"),
        ([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]], {}, "the list[1] has no expert 3"),
        (LAYOUTS.tolist(), {"replicate": False}, "the list[0] has expert 0 2 times, but replicate = false"),
        (LAYOUTS.tolist(), {"memory_bytes": np.array([6, 9]) * EXPERT_BYTES},
         "the list: 7 replicas on node 0 x 1 kB are more than its 6 kB hold"),
        ({"physical_to_logical": [[0, 1], [0]]}, {}, "physical_to_logical has layers of 1 to 2 slots: must be"),
        ({"expert_of_slot": [[0, 1]]}, {}, "expert_of_slot[0] has 2 slots: must be a multiple of the 3 ranks"),
        ([[0.5, 1, 2, 3, 0, 1]] * 2, {}, "the list holds 0.5: must be whole numbers"),
        ({"something": 3}, {}, "has ['something']: an object needs expert_of_slot, physical_to_logical, "),
        ("[[0, 1", {}, "not JSON: "),
    ],
)  # fmt: skip
def test_an_error_is_one_line(tmp_path, tree, changes, said):
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError) as refused:
        read_map(path, dataclasses.replace(PROBLEM, **changes))
    assert str(refused.value).startswith(f"{path}: {said}") or said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name in ("none.json", "none.npy"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read: No such file"):
            read_map(tmp_path / name, PROBLEM)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match=r"bad\.npy: cannot be read: "):
        read_map(tmp_path / "bad.npy", PROBLEM)
