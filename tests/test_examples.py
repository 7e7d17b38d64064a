"""The examples run as users run them, at several numbers of ranks, and compute what plain torch does in one process."""

import ast
import contextlib
import functools
import io
import json
import re
import runpy
import sys

import plain_torch
import pytest
from launch import ROOT, mpirun, run

import hpcmoe

FOLDER = ROOT / "inputs/examples"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_THREAD_LIMIT": "1",
}  # threads would wait for each other where other tests run
STEPS, HALF = 8, 5  # of the loop that is taken up again
RUN_ALL = f"""
import json, runpy, sys
for name, *words in json.loads(sys.argv[1]):
    sys.argv = [name, *words]
    runpy.run_path(f"{FOLDER}/{{name}}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def twins():
    """What the examples print in one process and plain torch, all but the one that compares itself."""
    return {name: run_twin(name) for name in NAMES if name != "own_experts"}


def run_twin(name):
    """Run an example with plain torch in hpcmoe's place -> its lines."""
    words = ["unused", str(STEPS)] if name == "own_loop" else []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [name, *words])
        patch.setattr(hpcmoe, "open", plain_torch.open_group)
        patch.setattr(hpcmoe, "MoE", plain_torch.MoE)
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return printed.getvalue().splitlines()


def compare(found, wanted):
    """Assert that lines are the same but for rounding in their numbers."""
    assert [NUMBER.sub("_", line) for line in found] == [NUMBER.sub("_", line) for line in wanted]
    assert read_numbers(found) == pytest.approx(read_numbers(wanted), rel=1e-5, abs=1e-5)


def read_numbers(lines):
    return [float(number) for line in lines for number in NUMBER.findall(line)]


def read_lines(ended):
    assert ended.status == 0 and ended.errors == "", ended
    return ended.output.splitlines()


def test_each_is_short_and_says_what_it_shows_and_how_it_is_run():
    assert NAMES == ["classifier", "gpt", "own_experts", "own_loop", "replace_mlp"]
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        shown = ast.get_docstring(ast.parse(text))
        assert len(text.splitlines()) < 60, name
        assert f"python inputs/examples/{name}.py" in shown and f"mpirun -n 2 python inputs/examples/{name}.py" in shown


def test_their_losses_fall(twins):
    for name, lines in twins.items():
        losses = [float(found[1]) for line in lines if (found := re.search(r"loss ([\d.]+)", line))]
        assert losses[-1] < 0.9 * losses[0], name
    assert twins["classifier"][-1] == "the frozen router has moved: False"


def check_own_experts(lines):
    """Assert that an example which compares itself with its dense twin has found next to no difference."""
    assert len(lines) == 3 and max(read_numbers(lines)) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "own_loop"])
def test_two_ranks_compute_what_plain_torch_does(name, twins):
    lines = read_lines(mpirun(2, f"inputs/examples/{name}.py", **ENVIRONMENT))
    if name == "own_experts":
        check_own_experts(lines)
    else:
        compare(lines, twins[name])


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_process_and_three_ranks_compute_what_plain_torch_does(ranks, twins, tmp_path):
    runs = [["own_experts"], *([name, str(tmp_path / "loop"), str(STEPS)] for name in twins)]
    words = "-c", RUN_ALL, json.dumps(runs)
    start = functools.partial(run, sys.executable) if ranks == 1 else functools.partial(mpirun, ranks)
    lines = read_lines(start(*words, **ENVIRONMENT))
    check_own_experts(lines[:3])
    compare(lines[3:], [line for name in twins for line in twins[name]])


def test_a_loop_goes_on_at_another_number_of_ranks(twins, tmp_path):
    for ranks, steps, begin in ((3, HALF, 0), (2, STEPS, HALF)):
        words = "inputs/examples/own_loop.py", tmp_path / "loop", steps
        compare(read_lines(mpirun(ranks, *words, **ENVIRONMENT)), twins["own_loop"][begin:steps])
