"""The chapter's README is true where a machine can tell: what the command prints, a case's keys, the files it names."""

import json
import re

import pytest
from launch import ROOT

from hpcmoe.place import main
from hpcmoe.placement.files.case import Case
from hpcmoe.placement.problem import OBJECTIVES
from hpcmoe.placement.resources import list_resources

README = (ROOT / "hpcmoe" / "placement" / "README.md").read_text()


def test_it_shows_what_the_command_prints(capsys):
    shown = README[README.index("prints\n\n```\n") :].split("```\n")[1].splitlines()
    assert main([str(ROOT / "inputs" / "case.json"), "--iterations", "200", "--budget", "1"]) == 0
    printed = [re.split("  ", line[:11])[0] for line in capsys.readouterr().out.splitlines()]
    for line in shown:
        if line != "..." and not line.startswith(("uplink", "port", "written")):
            assert re.split("  ", line[:11])[0] in printed, line


def test_it_explains_every_key_of_a_case():
    files = README[README.index("## The files") :]
    keys = set(re.findall(r"`(\w+)`", files))
    assert set(json.loads((ROOT / "inputs" / "case.json").read_text())) | set(Case.model_fields) <= keys


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_table_has_the_resources_that_an_objective_counts(objective):
    head, _, *rows = README[README.index("| resource |") :].split("\n\n")[0].splitlines()
    column = [cell.strip() for cell in head.split("|")].index(f"`{objective}`")
    crossed = [row for row in rows if row.split("|")[column].strip() == "x"]
    num_kinds = {"link": 1, "egress,": 2, "uplink": 2, "rank": 1}
    assert sum(num_kinds[row.split()[1]] for row in crossed) == len(list_resources(objective))


def test_files_that_it_names_exist():
    for path in re.findall(r"\b((?:inputs|jobs|tests)/[\w.]+\.\w+)", README):
        assert (ROOT / path).is_file(), path
