"""A small part of `make chaos`: runs that are disturbed at random moments end in time, whole, and go on."""

import argparse

import pytest
from chaos.__main__ import run_cases
from chaos.faults import KINDS

USUAL = ["damage"]  # the others have tests of their own; all: test-all


@pytest.mark.parametrize("kinds", [USUAL, pytest.param(list(KINDS), marks=pytest.mark.full)], ids=["usual", "all"])
def test_disturbed_runs_go_on_as_if_nothing_had_been(tmp_path, capfd, kinds):
    asked = argparse.Namespace(ranks=2, cases=len(kinds), seconds=600.0, seed=4, kinds=kinds)
    assert run_cases(asked, range(asked.cases), tmp_path) == [], capfd.readouterr().out
