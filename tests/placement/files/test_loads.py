"""Loads of experts from every source, the counts of other engines among them; a hostile file is one line."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from hpcmoe.errors import ConfigError
from hpcmoe.place import main
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.files.loads import ExpertGrid, choose_loads, find_loads, read_load_file

GRID = ExpertGrid(num_layers=2, num_experts=3)
COUNTS = np.array([[[1, 2, 3], [4, 0, 0]], [[0, 1, 0], [1, 1, 1]]])  # [steps, L, E]


def save(path, value):
    """Save a value in the format of a file's ending."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(value, default=lambda array: array.tolist()))
        case ".npy":
            np.save(path, value)
        case ".pt":
            tensors = value.items() if isinstance(value, dict) else [("", value)]
            made = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in tensors}
            torch.save(made if isinstance(value, dict) else made[""], path)
    return str(path)


def rejected(path, grid=GRID):
    """Read a file that must be rejected -> the one line."""
    with pytest.raises(ConfigError) as found:
        read_load_file(str(path), grid, None)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 800
    return str(found.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("ending", ["json", "pt"])
@pytest.mark.parametrize("name", ["logical_count", "window_expert_load", "expert_load_window"])
def test_counts_of_other_engines_are_summed_over_steps(tmp_path, ending, name):
    path = save(tmp_path / f"dump.{ending}", {"rank": 0, name: COUNTS, "average_utilization_rate_over_window": None})
    loads = read_load_file(path, GRID, None)
    assert (loads.tokens == COUNTS.sum(axis=0)[:, None]).all() and loads.node_names == ()


@pytest.mark.parametrize("ending", ["npy", "pt"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_an_array_alone_is_counts(tmp_path, ending, dtype):
    path = save(tmp_path / f"counts.{ending}", COUNTS.astype(dtype))
    assert (read_load_file(path, GRID, None).tokens == COUNTS.sum(axis=0)[:, None]).all()
    one = save(tmp_path / f"one.{ending}", COUNTS[0, 0].astype(dtype))
    assert (read_load_file(one, GRID, None).tokens == [[[1, 2, 3]]] * 2).all()


@pytest.mark.parametrize("ending", ["json", "pt"])
def test_counts_of_replicas_are_summed_over_each_experts(tmp_path, ending):
    tokens, replicas = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    dump = {"window_expert_load": tokens[None], "physical_to_logical_map": replicas}
    loads = read_load_file(save(tmp_path / f"dump.{ending}", dump), GRID, None)
    assert loads.tokens[:, 0].tolist() == [[5, 2, 3], [8, 7, 11]]


def test_layers_without_experts_are_left_out(tmp_path):
    counts = np.concatenate([np.zeros((1, 3)), COUNTS[0]])
    loads = read_load_file(save(tmp_path / "dump.json", {"logical_count": counts}), GRID, None)
    assert (loads.tokens[:, 0] == COUNTS[0]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8", "int16", "int8"])
def test_tensors_of_any_precision_and_stride_are_read_without_torch(tmp_path, dtype):
    tensor = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=getattr(torch, dtype)).t()
    torch.save({"logical_count": tensor, "note": [1, 2.5, True, "a"], "on": torch.device("cpu")}, tmp_path / "a.pt")
    assert read_load_file(str(tmp_path / "a.pt"), GRID, None).tokens[:, 0].tolist() == [[1, 3, 5], [2, 4, 6]]


class Bomb:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize("value", [Bomb(), {"logical_count": Bomb()}, np.ones(3), OrderedDict(a=Bomb())])
def test_what_is_pickled_is_never_run(tmp_path, value):
    torch.save(value, tmp_path / "bomb.pt")
    assert "only tensors, numbers, texts, lists and dicts are read" in rejected(tmp_path / "bomb.pt")


def write_archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    """Write an archive as torch.save does, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, content in enumerate(storages):
            archive.writestr(f"a/data/{key}", content)
    return path


def pickle_tensor(shape, strides, count, offset=0):
    """Pickle a tensor by hand, of any shape and strides."""

    def number(value):
        raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def several(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nLongStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number(count) + b"tQ"
    made = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset)
    return made + several(shape) + several(strides) + b"\x89Nt" + b"R."


@pytest.mark.parametrize(
    ("shape", "strides", "count", "said"),
    [
        ((2, 3), (3, 1), 6, None),
        ((2, 3), (3, 1), 10**9, "storage 0 has 6 numbers, not 1000000000"),
        ((2, 4), (3, 1), 6, "a tensor of shape (2, 4) ends at number 6 of a storage of 6"),
        ((2, 3), (10**30, 1), 6, "ends at number 1000000000000000000000000000002 of a storage of 6"),
        ((10**6, 10**6), (0, 0), 6, "a tensor of 1000000000000 numbers: must be at most"),
        ((2, -3), (3, 1), 6, "a tensor of shape (2, -3)"),
        ((2, 3), (1,), 6, "a tensor of shape (2, 3) and strides (1,)"),
    ],
)
def test_sizes_beyond_the_file_are_rejected(tmp_path, shape, strides, count, said):
    path = write_archive(tmp_path / "a.pt", pickle_tensor(shape, strides, count), [np.arange(1, 7).tobytes()])
    if said is None:
        assert read_load_file(str(path), GRID, None).tokens.ravel().tolist() == [1, 2, 3, 4, 5, 6]
    else:
        assert said in rejected(path)


def test_archives_that_torch_does_not_write_are_rejected(tmp_path):
    path = write_archive(tmp_path / "a.pt", bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    assert "compressed or larger" in rejected(path)
    np.savez(tmp_path / "b.pt", a=np.ones(3))
    (tmp_path / "b.pt.npz").rename(tmp_path / "b.pt")
    assert "without the data.pkl of torch.save" in rejected(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Bomb()))
    assert "no zip archive" in rejected(tmp_path / "c.pt")
    memo = b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."  # an index that C's unpickler makes a table for
    assert "needs logical_count" in rejected(write_archive(tmp_path / "d.pt", memo))


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"}(" + b"X\1\0\0\0a" + b")u.", "needs logical_count"),
        (b")q\0" + b"h\0h\0\x86q\0" * 40 + b"}h\0K\1s.", "a dict has a key that is no text"),
        (b"]q\0" + b"](h\0h\0eq\0" * 40 + b"}X\x0d\0\0\0logical_counth\0s.", "needs logical_count"),
        (b"]q\0" + b"](h\0h\0eq\0" * 40 + b".", "must hold a tensor, or a dict of some"),
        (b"\x8f.", "holds objects or sets"),
        (b"ctorch\nSize\n}b.", "holds objects or sets"),
    ],
)
def test_a_pickle_that_would_take_for_ever_is_rejected(tmp_path, pickled, said):
    found = rejected(write_archive(tmp_path / "a.pt", b"\x80\x04" + pickled))
    assert said in found


def test_any_damage_of_an_archive_is_one_line(tmp_path):
    torch.save({"logical_count": torch.from_numpy(COUNTS)}, tmp_path / "whole.pt")
    whole, drawn, path = (tmp_path / "whole.pt").read_bytes(), np.random.default_rng(0), tmp_path / "broken.pt"
    for number in range(150):
        broken = bytearray(whole)
        if number % 2:
            del broken[drawn.integers(len(whole)) :]
        else:
            for place_ in drawn.integers(len(whole), size=3):
                broken[place_] = drawn.integers(256)
        path.write_bytes(broken)
        try:
            read_load_file(str(path), GRID, None)
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", {"logical_count": [[1, 2, 3], [1, float("nan"), 3]]}, "logical_count[1][1] = nan: must be finite"),
        ("a.json", {"logical_count": [[1, 2, 3], [1, -2, 3]]}, "logical_count[1][1] = -2: must be finite and 0 or"),
        ("a.json", {"logical_count": [[1, 2, 3], [1, 2]]}, "must be numbers [layers][experts]"),
        ("a.json", {"logical_count": [[[[1]]]]}, "must be numbers [layers][experts]"),
        ("a.json", {"logical_count": "many"}, "must be numbers [layers][experts]"),
        ("a.json", {"logical_count": [[1, None, 3]]}, "must be numbers [layers][experts]"),
        ("a.json", {"logical_count": [[10**400, 1, 1]]}, "must be numbers [layers][experts]"),
        ("a.json", {"logical_count": [[1e308, 1e308, 1]]}, "beyond what numbers of 64 bits hold"),
        ("a.json", {"logical_count": []}, "is empty"),
        ("a.json", {"logical_count": [[1, 2, 3]] * 3}, "has 3 layers, layers = 2"),
        ("a.json", {"logical_count": [[1, 2]] * 2}, "has 2 experts, experts = 3; counts of replicas need"),
        ("a.json", {"logical_count": [[1, 2, 3], [0, 0, 0]]}, "layer 1 is without tokens"),
        ("a.json", {"expert_load": [[1, 2, 3]], "phy2log": [0, 1]}, "is [1, 3], the map of its replicas [2]"),
        ("a.json", {"expert_load": [[1, 2, 3]], "phy2log": [0, 1, 3]}, "must hold numbers below 3"),
        ("a.npy", np.ones((2, 3, 4, 5)), "must be numbers [layers][experts]"),
        ("a.npy", np.ones((2, 3), complex), "must be of numbers, is of complex128"),
        ("a.pt", {"counts": np.ones(3)}, "has ['counts']: needs logical_count"),
    ],
)
def test_counts_that_do_not_fit_are_rejected(tmp_path, name, content, said):
    path = tmp_path / name
    save(path, content)
    assert said in rejected(path)


def test_a_numpy_header_may_not_claim_more_than_its_file(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**5)})
    (tmp_path / "a.npy").write_bytes(stream.getvalue() + bytes(100))
    assert "cannot be read" in rejected(tmp_path / "a.npy")


def test_a_run_takes_counts_and_names_its_keys(tmp_path):
    class Model:
        num_layers, num_experts = 2, 3

    path = save(tmp_path / "dump.pt", {"logical_count": COUNTS})
    assert (find_loads(path, Model, None).tokens[:, 0] == COUNTS.sum(axis=0)).all()
    path = save(tmp_path / "dump.npy", np.ones((2, 4)))
    with pytest.raises(ConfigError, match=r"^\[placement\] loads = .*has 4 experts, \[model\] num_experts = 3"):
        find_loads(path, Model, None)


@given(st.floats(0, 3), st.integers(1, 8), st.integers(0, 8))
def test_a_power_law_never_gives_an_expert_more_than_all_tokens(exponent, top_k, more):
    grid = ExpertGrid(num_layers=3, num_experts=top_k + more)
    loads, origin = choose_loads(f"{exponent}", grid, top_k, None)
    assert loads.tokens.shape == (3, 1, top_k + more) and "power law" in origin
    assert np.allclose(loads.tokens.sum(axis=2), 1) and loads.tokens.max() <= 1 / top_k + 1e-9
    shares = np.sort(loads.tokens[0, 0])[::-1]
    below = shares < 1 / top_k - 1e-9
    ranks = np.arange(1, len(shares) + 1)[below]
    assert np.allclose(shares[below] * ranks**exponent, (shares[below] * ranks**exponent)[:1], rtol=1e-6)


def test_words_and_files_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    even, origin = choose_loads("even", GRID, 1, None)
    assert (even.tokens == 1).all() and origin == "even"
    recorded = Loads(tokens=np.ones((2, 1, 3)), node_names=())
    assert choose_loads("./1.2", GRID, 1, lambda path: recorded)[0] is recorded
    for word in ("-1", "11", "nan", "inf"):
        with pytest.raises(ConfigError, match="an exponent must be 0 to 10"):
            choose_loads(word, GRID, 1, None)


def test_the_command_places_by_counts(tmp_path, capsys):
    counts = np.ones((2, 8))
    counts[:, 3] = 50
    path, case = save(tmp_path / "dump.pt", {"logical_count": counts}), str(ROOT / "inputs" / "case.json")
    assert main([case, "--loads", path, "--iterations", "50", "-o", str(tmp_path / "out.json")]) == 0
    assert f"loads are those of {path}" in capsys.readouterr().err
    slots = json.loads((tmp_path / "out.json").read_text())["expert_of_slot"]
    assert all(sum(3 in rank for rank in layer) > 1 for layer in slots)  # the hot one has replicas
    assert main([case, "--loads", "missing.pt"]) == 2
    assert capsys.readouterr().err == "hpcmoe: --loads: missing.pt: cannot be read: No such file or directory\n"
