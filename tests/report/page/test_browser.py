"""A real run's report in a real browser: every figure, no request, no error, and it fits 1280 and 400 pixels."""

import sys

import pytest
from browser import look_at, need_browser, photograph
from launch import MPIRUN, ROOT, run
from made_records import make_record

from hpcmoe.report.__main__ import main

SMALL = {
    "run.steps": 6, "model.hidden": 16, "model.feed_forward": 16, "model.sequence_length": 16, "rebalance.every": 2,
    "rebalance.margin": 0, "data.batch_sequences": 8, "data.validation_sequences": 8, "train.validate_every": 3,
    "write.checkpoint_every": 0,
}  # fmt: skip
FIGURES = (
    "Loss", "Throughput", "Where a step's seconds go", "Load of all experts, percentiles", "Link balance, sigma",
    "Hottest expert of each layer", "Layer 1: its experts", "Balancedness of the ranks", "Bytes from rank to rank",
    "Used of what a link can give", "What binds, as placed at the start", "Arrays of a rank",
)  # fmt: skip
OF_EVERY_RUN = ["learning", "speed", "experts", "balance", "links", "placement", "memory", "inputs"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of a run on two virtual nodes."""
    folder = tmp_path_factory.mktemp("real")
    keys = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    start = [MPIRUN, "-launcher", "fork", "-hosts", "n0,n1", "-ppn", 1, "-n", 2, sys.executable, "-m", "hpcmoe.main"]
    ended = run(*start, "inputs/run.toml", *keys, "--set", f"run.output={folder}", PYTHONPATH=str(ROOT))
    assert ended.status == 0, ended
    return folder / "run"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_of_a_real_run_is_whole_and_fits(real, width, tmp_path, capsys):
    need_browser()
    assert main([str(real), "-o", str(tmp_path / "report.html")]) == 0
    page = tmp_path / "report.html"
    found, console = look_at(page, width, tmp_path)
    assert found["sections"] == OF_EVERY_RUN
    assert set(FIGURES) <= set(found["titles"])
    assert found["drawings"] == len(found["titles"]) and found["empty"] == 0
    assert found["asked"] == [] and console == [] and "<script" not in page.read_text()
    assert found["width"] == width and found["needed"] <= width
    assert found["clipped"] == [] and found["smallest"] >= 9


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("sizes", [{"layers": 20, "experts": 128, "nodes": 24, "ranks_per_node": 4}, {"points": 1}])
def test_large_and_little_fit_as_well(sizes, width, tmp_path, capsys):
    need_browser()
    (tmp_path / ("long-name-" * 12)).mkdir()
    path = make_record(tmp_path / ("long-name-" * 12) / "run.h5", **sizes)
    assert main([str(path.parent), str(path.parent)] if "points" in sizes else [str(path.parent)]) == 0
    found, console = look_at(path.parent / "report.html", width, tmp_path)
    assert found["needed"] <= width and found["clipped"] == [] and console == [] and found["empty"] == 0


def test_a_picture_is_not_blank(tmp_path, capsys):
    need_browser()
    make_record(tmp_path / "run.h5")
    assert main([str(tmp_path)]) == 0
    photograph(tmp_path / "report.html", 1280, 1000, tmp_path / "page.png", tmp_path)
    assert (tmp_path / "page.png").stat().st_size > 20_000
