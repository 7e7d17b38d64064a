"""The list of faults does not rot: what each would change stands in the code once, and its tests are there."""

import ast

import pytest
from faults.plants import FAULTS
from launch import ROOT

LEAST = 40


def test_there_are_enough_of_every_kind():
    files = {fault.file.removeprefix("hpcmoe/").split("/")[0] for fault in FAULTS.values()}
    assert len(FAULTS) >= LEAST
    assert {"placement", "dispatch", "comm", "experts", "run", "write", "contradictions.py", "errors.py"} <= files


@pytest.mark.parametrize("what", ["texts", "tests"])
def test_what_each_fault_needs_is_there(what):
    missing = {}
    for name, fault in FAULTS.items():
        text = (ROOT / fault.file).read_text()
        if what == "tests":
            missing[name] = [word for word in fault.tests if word.endswith(".py") and not (ROOT / word).is_file()]
        elif text.count(fault.old) != 1:
            missing[name] = f"{fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
        else:
            ast.parse(text.replace(fault.old, fault.new))
    assert {name: lack for name, lack in missing.items() if lack} == {}
