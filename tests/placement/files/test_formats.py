"""Maps of other engines are read where they can mean one thing alone; what is wrong is said in their own layer_data."""

import json
import pickle
import random
import zipfile

import numpy as np
import pytest
from placement.problems import make_problem

from hpcmoe.errors import ConfigError
from hpcmoe.placement.files.maps import read_map, write_map

# Five ranks on three nodes, so that no number of layers, ranks, slots or experts is like another.
PROBLEM = make_problem([2, 2, 1], 6, 3, num_layers=2, replicate=True)
RANKS = [[[0, 1, 2], [3, 4], [5], [0, 5], [2]], [[5, 4], [3, 2, 1], [0], [1], [4, 0]]]  # [layers][ranks][slots]
PADDED = np.array([[rank + [-1] * (3 - len(rank)) for rank in layer] for layer in RANKS])
FLAT = PADDED.reshape(2, -1)
PLACES = [[[rank.index(e) if e in rank else -1 for e in range(6)] for rank in layer] for layer in RANKS]
FULL = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [5, 4, 3, 2, 1, 0, 5, 4, 3, 2]])  # two slots a rank, none empty
FULL_LAID = np.pad(FULL.reshape(2, 5, 2), ((0, 0), (0, 0), (0, 1)), constant_values=-1).reshape(2, -1)
WHERE = [[np.flatnonzero(row == expert).tolist() for expert in range(6)] for row in FULL]
WHERE_PADDED = [[slots + [-1] * (3 - len(slots)) for slots in of_layer] for of_layer in WHERE]


def write(tmp_path, tree, name="map.json"):
    """Write a file -> its path."""
    path = tmp_path / name
    np.save(path, tree) if name.endswith(".npy") else path.write_text(
        tree if isinstance(tree, str) else json.dumps(tree)
    )
    return path


def devices(layers, **more):
    """Make a layer_list, its devices in another order than their numbers."""
    return {
        "moe_layer_count": len(layers),
        "layer_list": [
            {
                "layer_id": k,
                "device_count": len(ranks),
                "device_list": [{"device_id": d, "device_expert": ranks[d]} for d in reversed(range(len(ranks)))],
            }
            for k, ranks in enumerate(layers)
        ],
    } | more


@pytest.mark.parametrize(
    "tree",
    [
        {"expert_of_slot": PADDED.tolist()},
        {"physical_to_logical": FLAT.tolist(), "logical_count": [[1]]},
        {"physical_to_logical_map": FLAT.tolist(), "logical_to_all_physical_map": [[[0]]], "logical_count": [[2]]},
        {"physical_to_logical_map": PADDED.tolist()},
        {"phy2log": FLAT.tolist()},
        {"num_slots": 15, "initial_global_assignments": {"4": FLAT[1].tolist(), "3": FLAT[0].tolist()}},
        {"initial_global_assignments": {"0": FLAT[0].tolist(), "1": FLAT[1].tolist()}, "layer_updates_per_iter": 0},
        devices(RANKS),
        devices(PADDED.tolist()),
        {"layer_list": [{"device_list": [{"device_expert": rank} for rank in layer]} for layer in RANKS]},
        RANKS,
        PADDED.tolist(),
        np.pad(PADDED, ((0, 0), (0, 0), (0, 3)), constant_values=-1).tolist(),
        np.flip(np.pad(PADDED, ((0, 0), (0, 0), (0, 3)), constant_values=-1), axis=2)[..., ::-1].tolist(),
        FLAT.astype(float).tolist(),
        {"layer_0": RANKS[0], "layer_1": RANKS[1]},
        {"0": {"rank0": RANKS[0][0], "rank1": RANKS[0][1], "rank2": [5], "rank3": [0, 5], "rank4": [2]}, "1": RANKS[1]},
        {"expert_map": PLACES},
        PLACES,
    ],
)
def test_every_format_gives_the_same(tmp_path, tree):
    layouts, notes = read_map(write(tmp_path, tree), PROBLEM)
    assert [[sorted(set(rank) - {-1}) for rank in layer] for layer in layouts.reshape(2, 5, 3).tolist()] == [
        [sorted(rank) for rank in layer] for layer in RANKS
    ]
    assert not any("layers" in note for note in notes)


@pytest.mark.parametrize(
    "tree",
    [{"logical_to_physical_map": WHERE_PADDED}, {"logical_to_physical": WHERE}, {"log2phy": WHERE, "logcnt": [[2]]}],
)
def test_the_slots_of_experts_are_turned_round(tmp_path, tree):
    assert (read_map(write(tmp_path, tree), PROBLEM)[0] == FULL_LAID).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16, ">i4", np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 10), (2, 5, 2)])
def test_arrays_of_any_type_that_holds_whole_numbers(tmp_path, dtype, shape):
    array = np.asfortranarray(FULL.astype(dtype).reshape(shape))
    assert (read_map(write(tmp_path, array, "map.npy"), PROBLEM)[0] == FULL_LAID).all()


@pytest.mark.parametrize(
    "tree",
    [
        FULL[0].tolist(),
        FULL[:1].tolist(),
        FULL[:1].reshape(1, 5, 2).tolist(),
        FULL[0].reshape(5, 2).tolist(),
        {"physical_to_logical_map": FULL[0].tolist()},
        {"initial_global_assignments": {"3": FULL[0].tolist()}},
        {str(rank): FULL[0].reshape(5, 2)[rank].tolist() for rank in range(5)},
        {"logical_to_physical_map": WHERE[:1]},
        {"logical_to_physical_map": WHERE[0]},
        devices([FULL[0].reshape(5, 2).tolist()]),
    ],
)
def test_one_row_is_taken_for_all_layers_and_told(tmp_path, tree):
    layouts, notes = read_map(write(tmp_path, tree), PROBLEM)
    assert (layouts == FULL_LAID[:1]).all() and notes == ["its one row is taken for all 2 layers"]


def test_ranks_with_fewer_experts_in_one_list_for_all_layers(tmp_path):
    layouts, _ = read_map(write(tmp_path, RANKS[0]), PROBLEM)
    assert (layouts == FLAT[:1]).all()


def test_places_are_told_to_be_taken_as_such(tmp_path):
    assert read_map(write(tmp_path, PLACES), PROBLEM)[1] == ["its numbers are read as each expert's place on each rank"]
    layouts, notes = read_map(write(tmp_path, {"expert_map": PLACES[0]}), PROBLEM)
    assert (layouts == FLAT[:1]).all() and len(notes) == 2


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_what_place_writes_is_read_with_its_empty_slots(tmp_path, suffix):
    write_map(tmp_path / f"map{suffix}", FLAT, suffix)
    assert (read_map(tmp_path / f"map{suffix}", PROBLEM)[0] == FLAT).all()


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"logical_count": [[1.0] * 6] * 2}, "logical_count tells how many, not where: an object needs "),
        ({"physical_to_logical_map": None}, "physical_to_logical_map must be [slots], [layers][slots] or "),
        ({"physical_to_logical_map": [FLAT[0].tolist()] * 3}, "physical_to_logical_map has 3 layers, layers = 2"),
        ({"phy2log": [[0, 1, 2, 3, 4, 5, 6, 0, 0, 0]] * 2}, "phy2log[0][6] = 6: must be -1 to 5"),
        ({"phy2log": [[0, "1"]]}, "phy2log holds '1': must be whole numbers"),
        ({"phy2log": [[0, True]]}, "phy2log holds true: must be whole numbers"),
        ({"phy2log": [[0, [1]]]}, "phy2log must be [slots], [layers][slots] or"),
        ({"phy2log": [[[[0]]]]}, "phy2log must be [slots]"),
        ({"phy2log": [[], []]}, "phy2log is empty"),
        ({"phy2log": {"0": [1], "2": [1]}}, "phy2log: its keys must be consecutive numbers, are ['0', '2']"),
        ({"phy2log": {"0": [1], "a": [1]}}, "phy2log: its keys must be consecutive numbers"),
        ({"phy2log": {}}, "phy2log is empty"),
        ({"initial_global_assignments": {"3": FULL[0].tolist(), "5": FULL[1].tolist()}}, "must be consecutive numbers"),
        ({"phy2log": np.swapaxes(PADDED, 0, 1).tolist()}, "phy2log is [ranks][layers][slots]: must be [layers][ranks]"),
        ({"phy2log": [RANKS[0], RANKS[1][:4]]}, "phy2log has layers of 4 or 5 ranks"),
        ({"phy2log": [layer[:4] for layer in RANKS]}, "phy2log[0] has 4 ranks, experts are spread over 5"),
        ({"phy2log": [[[0, 1, 2, 3], [4], [5], [0], [1]]] * 2}, "phy2log has 4 experts on rank 0 of layer 0: must be"),
        (devices(RANKS, moe_layer_count=3), "layer_list has 2 layers, its moe_layer_count is 3"),
        ({"layer_list": 3}, "layer_list must be a list of objects, is 3"),
        ({"layer_list": [{"layer_id": 0}]}, "layer_list[0] device_list must be a list of objects, is null"),
        ({"layer_list": [{"device_list": [{}]}]}, "layer_list: each device needs its device_expert"),
        ({"layer_list": [{"layer_id": 0}, {"layer_id": 0}]}, "layer_list: each needs a layer_id of its own"),
        ({"logical_to_physical_map": [[[0], [0], [1], [2], [3], [4]]] * 2}, "has two experts in one slot"),
        ({"logical_to_physical_map": [[[0], [9], [1], [2], [3], [4]]] * 2}, "leaves slots without an expert: give"),
        ({"logical_to_physical_map": [[[0]]]}, "must be [layers][6 experts][slots of the expert]"),
        ({"expert_map": [PLACES[0][0]] * 3}, "expert_map has 3 layers, layers = 2"),
        ({"expert_map": [[row[:5] for row in layer] for layer in PLACES]}, "must be [layers][ranks][6 experts]"),
        ({"expert_map": [[[3, 3, -1, -1, -1, -1]] * 5] * 2}, "an expert's place on a rank must be -1, or below"),
        ({}, "has []: an object needs"),
        ("3", "the list must be [slots]"),
        ('{"phy2log": [1], "phy2log": [2]}', "phy2log: stands 2 times, must stand once"),
        ("layers:\n- 3\n", "not JSON: "),
    ],
)  # fmt: skip
def test_a_refusal_speaks_of_the_format_given(tmp_path, tree, said):
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError) as refused:
        read_map(path, PROBLEM)
    assert str(refused.value).startswith(f"{path}: {said}") or said in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 600


def test_archives_are_named_with_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "map.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    np.savez(tmp_path / "map.npz", FULL)
    (tmp_path / "zip.npy").write_bytes((tmp_path / "map.npz").read_bytes())
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"physical_to_logical_map": [1]}))
    (tmp_path / "map.yaml").write_text("num_slots: 3")
    np.save(tmp_path / "object.npy", np.array({"physical_to_logical_map": FULL}), allow_pickle=True)
    for name, said in (
        (
            "map.pt",
            "is a zip archive, as torch.save and numpy.savez make, which is not read: save its map as .npy or .json",
        ),
        ("map.npz", "is a zip archive"),
        ("zip.npy", "is a zip archive"),
        ("old.pt", "is a pickle"),
        ("map.yaml", "YAML is not read: save it as JSON"),
        ("object.npy", "it holds Python objects: save the numbers alone"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            read_map(tmp_path / name, PROBLEM)
        assert str(refused.value).isprintable()


def test_no_mutation_escapes(tmp_path):
    """Cut and spiced files of every kind are read or refused in one line."""
    chance = random.Random(0)
    np.save(tmp_path / "map.npy", FULL)
    contents = [json.dumps(tree).encode() for tree in (FLAT.tolist(), devices(RANKS), {"log2phy": WHERE}, PLACES)]
    contents.append((tmp_path / "map.npy").read_bytes())
    spice = [
        b"",
        b"-",
        b"9" * 25,
        b"[",
        b"]",
        b"{",
        b'"',
        b"null",
        b"1e400",
        b"NaN",
        b"\n",
        b"\xff",
        b"true",
        b"(",
        b"," * 3,
    ]
    for _ in range(600):
        content = chance.choice(contents)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(content) + 1)
            content = content[:at] + chance.choice(spice) + content[at + chance.choice((0, 0, 1, 5)) :]
        path = tmp_path / f"map{'.npy' if content[:6] == contents[-1][:6] else '.json'}"
        path.write_bytes(content)
        try:
            layouts, _ = read_map(path, PROBLEM)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 600
        else:
            assert layouts.shape == (2, 15) and (np.sort(np.unique(layouts[0]))[-6:] == np.arange(6)).all()
