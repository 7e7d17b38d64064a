"""Lines of JSON and TensorBoard get the figures of the steps that are shown; what fails there ends no run."""

import json
import logging
import sys
from types import ModuleType

import pytest
from report.test_progress import METRICS, NORM, show_steps

from hpcmoe.errors import ConfigError
from hpcmoe.report import progress, sinks
from hpcmoe.report.sinks import LINES, check_tensorboard, open_sinks


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Let steps be shown by lines."""
    monkeypatch.setattr(progress, "find_terminal_width", lambda: None)


def test_each_line_of_json_is_a_step_that_was_shown(tmp_path):
    for first_step in (0, 2):  # a resumed run appends
        with open_sinks(tmp_path, log_json=True, tensorboard=False) as opened:
            show_steps(2 + first_step, first_step, every_seconds=0.0, sinks=opened)
    rows = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[0]["steps"] == 2
    assert rows[0]["gradient_norm"] == NORM and rows[0]["tokens_per_second"] == METRICS.tokens_per_second
    assert rows[0]["utilisation_most"] == 1.5 and rows[0]["seconds_route"] == 0.012 and rows[0]["time"].startswith("20")


def test_what_is_not_finite_is_null_and_a_full_disk_is_told_once(tmp_path, caplog):
    lines = sinks.JsonLines(tmp_path / LINES)
    lines.add({"step": 1, "loss": float("nan"), "norm": None})
    assert '"loss": null, "norm": null' in (tmp_path / LINES).read_text()
    broken = sinks.JsonLines(tmp_path / "missing" / LINES)
    with caplog.at_level(logging.WARNING):
        broken.add({"step": 1})
        broken.add({"step": 2})
    assert [message.endswith("gets no more lines: No such file or directory") for message in caplog.messages] == [True]


def test_without_tensorboard_one_line_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    check_tensorboard(wanted=False)
    with pytest.raises(ConfigError, match=r"^\[run\] tensorboard = true: needs TensorBoard: pip install '"):
        check_tensorboard(wanted=True)


def test_tensorboard_gets_each_figure_as_a_scalar(tmp_path, monkeypatch):
    added, closed, board = [], [], ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        """What torch's writer does with a folder of its own."""

        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, step):
            """Keep a figure."""
            added.append((name, value, step))

        def close(self):
            """Note the end."""
            closed.append(True)

    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with open_sinks(tmp_path, log_json=False, tensorboard=True) as opened:
        show_steps(2, every_seconds=0.0, sinks=opened)
    assert ("gradient_norm", NORM, 2) in added and {step for _, _, step in added} == {1, 2} and closed == [True]
    assert all(type(value) is float for _, value, _ in added) and "step" not in {name for name, _, _ in added}
