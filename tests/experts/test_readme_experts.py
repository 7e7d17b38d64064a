"""The library's page is true where a machine can tell: its examples run, its names and defaults are the code's."""

import inspect
import re

import pytest
from launch import ROOT, run
from mpi4py import MPI

import hpcmoe

README = (ROOT / "hpcmoe" / "experts" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
IMPORTS = BLOCKS[0][: BLOCKS[0].index("with ")]
CALLABLES = {"open": hpcmoe.open, "MoE": hpcmoe.MoE, "Experts": hpcmoe.Experts, "Dispatcher": hpcmoe.Dispatcher}


@pytest.mark.mpi
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_examples_run_on_any_number_of_ranks(number):
    assert MPI.COMM_WORLD.size > 0
    exec(compile(IMPORTS + BLOCKS[number], f"block {number}", "exec"), {})


def test_the_first_example_runs_without_mpirun(tmp_path):
    (tmp_path / "this.py").write_text(BLOCKS[0])
    ended = run("python3", tmp_path / "this.py", PYTHONPATH=str(ROOT))
    assert ended.status == 0 and ended.errors == "", ended


def test_public_names_are_shown():
    named = set(re.findall(r"hpcmoe\.(\w+)", README)) | set(re.findall(r"`(\w+Error)`", README))
    assert set(CALLABLES) <= named and all(hasattr(hpcmoe, name) for name in named - {"HpcmoeErrors"}), named


def test_the_groups_methods_are_all_shown_with_their_arguments():
    public = {name for name in vars(hpcmoe.Group) if not name.startswith("_")}
    inner = {"finish", "add_layer", "add_router", "open_sums", "count_step", "meet"}
    for name in public - inner:
        arguments = [str(p).split(":")[0] for p in inspect.signature(getattr(hpcmoe.Group, name)).parameters.values()][
            1:
        ]
        shown = re.search(rf"`{name}\(([^)]*)\)`", README)
        assert shown, name
        assert [word.split("=")[0] for word in shown[1].split(", ") if word] == arguments, name


@pytest.mark.parametrize("name", CALLABLES)
def test_defaults_are_the_codes(name):
    for parameter in inspect.signature(CALLABLES[name]).parameters.values():
        if parameter.default not in (inspect.Parameter.empty, None):
            shown = f'"{parameter.default}"' if isinstance(parameter.default, str) else str(parameter.default)
            assert re.search(rf"{parameter.name}={re.escape(shown)}\b|{parameter.name}={re.escape(shown)}", README), (
                parameter
            )


def test_every_module_is_listed():
    listed = set(re.findall(r"`(\w+\.py)`", README))
    assert listed == {path.name for path in (ROOT / "hpcmoe" / "experts").glob("*.py")} - {"__init__.py"}
