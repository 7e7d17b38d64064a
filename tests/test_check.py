"""`python -m hpcmoe.check` tells what there is and what is missing, tries each way, and ends 0."""

import re
import sys

import pytest
from launch import mpirun, run


def values_of(output):
    """The lines of the two columns -> list of (what, text)."""
    return [(line[:12].strip(), line[13:]) for line in output.splitlines()]


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 3))])
def test_it_tells_what_is_here_and_tries_it(ranks):
    ended = mpirun(ranks, "-m", "hpcmoe.check") if ranks > 1 else run(sys.executable, "-m", "hpcmoe.check")
    assert ended.status == 0, ended
    lines = values_of(ended.output)
    told = dict(lines)
    assert told["ranks"].startswith(f"{ranks} rank") and "Slurm" in told["launcher"]
    software = {"Python", "MPI", "torch", "CuPy", "NCCL"}
    assert software | {"links", "racks", "rows", "try nccl", "try direct", "try staged"} <= set(told)
    assert any("to CUDA pointers" in text for _, text in lines)
    assert re.search(r"works: 1 MB from each rank to each, \S+ GB/s", told["try staged"]), ended
    if "in a GPU's place" in told["try staged"]:
        assert told["CuPy"].startswith("none: pip install") or told["CuPy"].startswith("cupy")
        assert told["rows"] == "moved by torch"
        assert told["try nccl"] == "not tried: rank 0 has no GPU"
        assert any(text.startswith("not used: ") for _, text in lines)


def test_an_argument_is_refused_and_help_is_shown():
    ended = run(sys.executable, "-m", "hpcmoe.check", "--fast")
    assert ended.status == 2 and ended.lines("hpcmoe: command line: --fast: unknown"), ended
    ended = run(sys.executable, "-m", "hpcmoe.check", "--help")
    assert ended.status == 0 and "mpirun" in ended.output, ended
