"""The public names of hpcmoe: imported at their first use, whatever is imported before; place without ranks."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT, run
from placement.problems import make_problem

import hpcmoe
from hpcmoe.errors import ConfigError, HpcmoeError, PlacementError
from hpcmoe.placement.files.case import read_case

CASE = ROOT / "inputs" / "case.json"
LISTED = json.loads(CASE.read_text())
QUICK = {"iterations": 50, "seconds": 60.0}


def run_code(*lines):
    """Run lines of Python in a process of their own -> what they print."""
    ended = run(sys.executable, "-c", "\n".join(lines))
    assert ended.status == 0, ended.output
    return ended.output


def test_import_hpcmoe_imports_nothing_that_takes_long():
    heavy = "'torch', 'mpi4py', 'numba', 'numpy', 'scipy', 'pydantic', 'h5py'"
    shown = run_code("import sys, hpcmoe", f"print([m for m in ({heavy}) if m in sys.modules])")
    assert shown.strip() == "[]"


@pytest.mark.parametrize("name", ["place", "rebalance"])
def test_functions_without_ranks_import_neither_mpi_nor_torch(name):
    shown = run_code(
        "import sys, hpcmoe",
        f"hpcmoe.{name}",
        "print([m for m in ('torch', 'mpi4py.MPI', 'numba') if m in sys.modules])",
    )
    assert shown.strip() == "[]"


@pytest.mark.parametrize(
    "before",
    [
        "import hpcmoe",
        "import hpcmoe.place",
        "import hpcmoe.placement.place",
        "import hpcmoe; hpcmoe.place; import hpcmoe.place",
        "from hpcmoe.place import main; import hpcmoe",
        "import importlib, hpcmoe; importlib.import_module('hpcmoe.place')",
        "import hpcmoe, hpcmoe.cluster.measure.cluster, hpcmoe.run.rebalance",
    ],
)
def test_no_order_of_imports_hides_a_function_behind_a_module(before):
    names = "[f'{f.__module__}.{f.__name__}' for f in (hpcmoe.place, hpcmoe.rebalance, hpcmoe.measure)]"
    shown = run_code(before, f"print({names})", "from hpcmoe import place", "assert place is hpcmoe.place")
    assert shown.strip() == str(
        ["hpcmoe.placement.place.place", "hpcmoe.placement.eplb.rebalance", "hpcmoe.cluster.discover.measure"]
    )


def test_the_program_is_still_a_module():
    shown = run_code("import sys, hpcmoe.place", "from hpcmoe.place import main", "print(main(['--help']))")
    assert "usage: " in shown
    assert importlib.import_module("hpcmoe.place").main is not None


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((ROOT / "hpcmoe" / "__init__.py").read_text())
    typed = {
        alias.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: typed.get(name) for name in hpcmoe._MODULE_OF_NAME} == hpcmoe._MODULE_OF_NAME
    assert {name: f"{typed.get(name)}.{name}" for name in hpcmoe._PUBLIC_MODULES} == hpcmoe._PUBLIC_MODULES
    assert set(hpcmoe.__all__) <= set(dir(hpcmoe))
    for name in hpcmoe._MODULE_OF_NAME:
        assert getattr(hpcmoe, name).__module__ == hpcmoe._MODULE_OF_NAME[name]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hpcmoe' has no attribute 'nothing'"):
        _ = hpcmoe.nothing
    assert not hasattr(hpcmoe, "__path_of_nothing__")


def test_mypy_knows_the_types(tmp_path):
    script = tmp_path / "uses.py"
    script.write_text(
        "import hpcmoe\nimport hpcmoe.errors\nimport numpy as np\n"
        "placed: hpcmoe.Placement = hpcmoe.place({})\n"
        "maps: tuple[np.ndarray, np.ndarray, np.ndarray] = hpcmoe.rebalance(np.ones((1, 2)), 2)\n"
        "topology: hpcmoe.Topology = hpcmoe.measure(None, seconds=1.0)\n"
        "wrong: int = hpcmoe.place({})\n"
    )
    words = [sys.executable, "-m", "mypy", "--config-file", ROOT / "setup.cfg", script]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert [line.split(": ")[0].split(":")[-1] for line in ended.stdout.splitlines() if "error" in line][:-1] == ["7"]


def test_a_dict_a_problem_and_the_file_are_placed_alike():
    problem, _ = read_case(CASE)
    arrays = {
        key: np.array(value) if isinstance(value, list) and key != "rack" else value for key, value in LISTED.items()
    }
    placed = [hpcmoe.place(given, **QUICK) for given in (problem, LISTED, arrays)]
    for other in placed[1:]:
        assert (other.expert_of_replica == placed[0].expert_of_replica).all()
    assert isinstance(placed[0], hpcmoe.Placement) and isinstance(problem, hpcmoe.PlacementProblem)
    assert placed[0].objective_seconds <= hpcmoe.place(problem, "contiguous").objective_seconds


def test_the_answer_is_no_worse_than_its_start():
    start = hpcmoe.place(LISTED, **QUICK)
    again = hpcmoe.place(LISTED, start=start.expert_of_replica, iterations=1, seconds=60.0)
    assert again.objective_seconds <= start.objective_seconds * (1 + 1e-9)
    assert start.objective_seconds < hpcmoe.place(LISTED, "contiguous").objective_seconds


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank_to_node": [0, 9]}, "rank_to_node has 2 entries"),
        ({"E": None}, "E = null"),
        ({"E": 10**6}, "entries, E = 1000000"),
    ],
)
def test_a_wrong_dict_is_refused_by_key(changes, text):
    with pytest.raises(HpcmoeError) as error:
        hpcmoe.place(LISTED | changes)
    assert text in str(error.value) and CASE.name not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"memory_bytes": np.array([1])}, "memory_bytes has shape [1]: must be [nodes] = [2]"),
        ({"node_of_rank": np.array([0, 0, 2])}, "node_of_rank[2] = 2: must be from 0 to 1"),
        ({"tokens_of_rank": np.array([1.0, -1.0, 0.0])}, "tokens_of_rank[1] = -1: must be >= 0"),
        ({"bytes_per_second": np.zeros((2, 2))}, "bytes_per_second[0][1] = 0: must be > 0"),
        ({"probability": np.full((1, 2, 3), 0.5)}, "probability[0][0]: must sum to 1 over the experts"),
        ({"memory_bytes": np.array([0, 0])}, "3 experts x 1 layers x "),
        ({"bytes_per_token": 1e300}, "bytes_per_second: at worst "),
    ],
)
def test_a_wrong_problem_is_refused_in_one_line(changes, text):
    problem = make_problem([2, 1], 3, 1)
    with pytest.raises((ConfigError, PlacementError)) as error:
        hpcmoe.place(dataclasses.replace(problem, **changes))
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "best"}, "method = 'best': must be one of packed, contiguous, eplb"),
        ({"seconds": 0.0}, "seconds = 0.0: must be finite and > 0"),
        ({"iterations": -1}, "iterations = -1: must be from 0 to 2^63 - 1"),
        ({"objective": "peace"}, "objective = 'peace': must be one of links, ports, step"),
        ({"start": [[0, 1]]}, "start: expert_of_slot"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, text):
    with pytest.raises(ConfigError) as error:
        hpcmoe.place(LISTED, **options)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.mpi
def test_links_are_measured_on_any_communicator(comm):
    topology = hpcmoe.measure(comm, seconds=0.2)
    assert isinstance(topology, hpcmoe.Topology) and topology.source["links"] == "measured"
    assert len(topology.node_of_rank) == comm.size and (topology.bytes_per_second > 0).all()
    rates = comm.allgather(topology.bytes_per_second.tolist())
    assert all(rate == rates[0] for rate in rates)

    # A part of the ranks, in another order, and each rank alone.
    part = comm.Split(comm.rank % 2, -comm.rank)
    assert len(hpcmoe.measure(part, seconds=0.1).node_of_rank) == part.size
    part.Free()
    alone = comm.Split(comm.rank, 0)
    assert hpcmoe.measure(alone, seconds=0.1).node_of_rank.tolist() == [0]
    alone.Free()
    assert len(hpcmoe.measure(seconds=0.1).node_of_rank) == comm.size


@pytest.mark.mpi
def test_a_wrong_time_is_refused_on_all_ranks(comm):
    with pytest.raises(hpcmoe.ClusterError, match=r"seconds = -1.0: must be finite and > 0"):
        hpcmoe.measure(comm, seconds=-1.0 if comm.rank == 0 else 1.0)
