"""The chapter's README explains the figures of the table and of run.h5, all of them and no others."""

import inspect
import re

import numpy as np
import pytest
from launch import ROOT
from small import Notes, open_small_job

from hpcmoe.report import batches, tables, totals
from hpcmoe.report.meter import STAGES
from hpcmoe.run.train import train

README = (ROOT / "hpcmoe/report/README.md").read_text()


def list_explained(heading):
    """List the names in the first column of the table under a heading row."""
    block = README[README.index(f"| {heading} |") :].split("\n\n")[0]
    return [name for row in block.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")]


def test_the_table_has_the_figures_that_are_explained():
    source = "".join(inspect.getsource(module) for module in (tables, batches)) + '"validation loss, last"'
    names = [*list_explained("figure"), *list_explained("memory")]
    assert [name for name in names if name not in source and name not in ("BW_min", "counted")] == []


def test_every_stage_is_explained():
    assert list_explained("stage") == [f"in {stage}" for stage in STAGES]


def test_run_h5_has_the_fields_that_are_explained(comm, tmp_path):
    if comm.size > 1:
        pytest.skip("on one rank alone")
    notes = Notes()
    with open_small_job(comm, tmp_path, run__steps=1, train__validate_every=1) as (job, optimizer, _):
        train(job, notes, optimizer, (0, np.ones((2, 4))), lambda *state: None)
    explained = {name.strip("`") for cell in list_explained("field") for name in cell.split(" ... ")}
    recorded = {name for name in notes.values if not name.startswith("run/seconds_")}
    assert recorded == {name for name in explained if not name.startswith("run/seconds_")}
    of_the_run = re.findall(r'describe\("(\w+)", "(\w+)"', inspect.getsource(totals) + inspect.getsource(batches))
    assert [f"{chapter}/{name}" for chapter, name in of_the_run if f"`{chapter}/{name}`" not in README] == []
