"""What hpcmoe.place writes replaces nothing it reads or writes; without numba's compiler its answer is the same."""

import contextlib
import io
import json
import os
import shutil
import sys

import pytest
from launch import ROOT, run

from hpcmoe.place import main

QUICK = ("--iterations", "300", "--budget", "60")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with case.json, where the command runs."""
    shutil.copy(ROOT / "inputs" / "case.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(*words):
    """Run the command in this process on case.json -> (status, lines of standard error)."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = main(["case.json", *QUICK, *words])
    return status, errors.getvalue().splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-o case.json", "case.json: cannot be written: is the case itself"),
        ("-o ./case.json", "case.json: cannot be written: is the case itself"),
        ("-o link.json", "link.json: cannot be written: is the case itself"),
        ("-o hard.json", "hard.json: cannot be written: is the case itself"),
        ("--eplb-out sub/../case.json", "sub/../case.json: cannot be written: is the case itself"),
        ("-o x.json --eplb-out x.json", "x.json: cannot be written: is what -o writes"),
        ("-o x.json --eplb-out sub/../x.json", "sub/../x.json: cannot be written: is what -o writes"),
        ("-o old.json --eplb-out same.json", "same.json: cannot be written: is what -o writes"),
        ("-o new.json --eplb-out to-new.json", "to-new.json: cannot be written: is what -o writes"),
        ("-o x.png --plot x.png", "x.png: cannot be written: is what -o writes"),
        ("-o x.npy.part --eplb-out x.npy", "x.npy: cannot be written: is what -o writes"),
        ("-o start.json --start start.json", "start.json: cannot be written: is what --start reads"),
        ("--eplb-out start.npy --start start.npy", "start.npy: cannot be written: is what --start reads"),
        ("-o loop.json", "loop.json: cannot be written: "),
        ("-o start.json --nonsense \x1b[31m" + "x" * 5000, "command line: unrecognized arguments: "),
    ],
)
def test_one_file_is_one_thing(folder, words, said):
    (folder / "sub").mkdir()
    (folder / "link.json").symlink_to("case.json")
    os.link("case.json", "hard.json")
    (folder / "old.json").write_text("old")
    os.link("old.json", "same.json")
    (folder / "to-new.json").symlink_to(folder / "new.json")
    (folder / "start.json").write_text("[]")
    (folder / "loop.json").symlink_to("loop.json")
    status, errors = place(*words.split(" "))
    assert status == 2 and len(errors) == 1 and errors[0].startswith(f"hpcmoe: {said}") and errors[0].isprintable()
    assert (folder / "case.json").read_bytes() == (ROOT / "inputs" / "case.json").read_bytes()
    assert (folder / "old.json").read_text() == "old"


def test_a_device_may_take_several(folder):
    assert place("-o", "/dev/null", "--eplb-out", "x.json")[0] == 0
    assert place("-o", "/dev/null", "--start", "x.json", "--moves", "0")[0] == 0


def test_without_numbas_compiler_the_answer_is_the_same(folder):
    assert place("-o", "fast.json") == (0, [])
    words = ("-m", "hpcmoe.place", folder / "case.json", *QUICK, "-o", folder / "slow.json")
    ended = run(sys.executable, *words, NUMBA_DISABLE_JIT="1")
    assert (ended.status, ended.errors) == (0, ""), ended
    fast, slow = (json.loads((folder / name).read_text()) for name in ("fast.json", "slow.json"))
    assert fast | {"seconds": None} == slow | {"seconds": None}
