"""A person sees a bar on a terminal, about forty lines in a file, and nothing of ranks other than 0."""

import dataclasses
import fcntl
import io
import logging
import os
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from launch import HANG_SECONDS, MPIRUN, ROOT

from hpcmoe.report import progress
from hpcmoe.report.meter import STAGES, StepMetrics
from hpcmoe.report.progress import format_step, open_progress

PROGRAM = "from hpcmoe.report.progress import find_terminal_width; print(find_terminal_width())"
LOSS, RATE = 2.34567, 0.0123456
METRICS = StepMetrics(
    seconds=0.5, seconds_of_stage=dict.fromkeys(STAGES, 0.0) | {"route": 0.012, "optimizer": 0.034},
    utilisation=np.array([[0.5, 1.0], [1.5, 1.0]]), num_dropped=7,
    link_tokens_mean=10.0, link_sigma=0.1234, link_sigma_of_layer=np.array([0.2, 0.31]),
    balancedness=0.754, balancedness_of_layer=np.array([0.7, 0.81]), num_tokens=500,
)  # fmt: skip


def show_steps(num_steps, first_step=0, on_root=True):
    with open_progress(num_steps, first_step, on_root) as show:
        for step in range(first_step + 1, num_steps + 1):
            show(step, LOSS, RATE, METRICS)


@pytest.fixture
def log(caplog):
    """What is logged."""
    caplog.set_level(logging.INFO)
    return caplog


def test_a_steps_line_holds_its_figures():
    assert format_step(LOSS, RATE, METRICS) == (
        "loss 2.3457, rate 0.0123, 1000 tokens/s, U_e 0.50-1.50, balancedness 0.75, sigma 0.123; "
        "by layer balancedness 0.70-0.81, sigma 0.20-0.31; dropped 7, ms: route 12 optimizer 34"
    )


def test_inference_has_neither_loss_nor_optimizer():
    line = format_step(None, None, dataclasses.replace(METRICS, seconds_of_stage=dict.fromkeys(STAGES, 0.0)))
    assert line.startswith("1000 tokens/s") and "optimizer" not in line


@pytest.mark.parametrize(
    ("num_steps", "shown"), [(3, [1, 2, 3]), (100, [*range(2, 101, 2)]), (81, [*range(2, 81, 2), 81])]
)
def test_without_a_terminal_there_are_about_forty_lines_the_last_step_among_them(log, monkeypatch, num_steps, shown):
    monkeypatch.setattr(progress, "find_terminal_width", lambda: None)
    show_steps(num_steps)
    assert [line.split(": ")[0] for line in log.messages] == [f"step {step}/{num_steps}" for step in shown]


def test_on_a_terminal_there_is_a_bar_that_starts_where_the_run_does(log, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "find_terminal_width", lambda: 120)
    show_steps(10, first_step=4)
    shown = screen.getvalue().split("\r")
    assert "10/10" in shown[-1] and "loss 2.3457" in shown[-1] and "4/10" in shown[1]
    assert max(map(len, shown)) <= 121 and log.messages == []  # the last ends its line


@pytest.mark.parametrize("width", [None, 120])
def test_other_ranks_show_nothing(log, monkeypatch, width):
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    monkeypatch.setattr(progress, "find_terminal_width", lambda: width)
    show_steps(10, on_root=False)
    assert log.messages == [] and quiet.getvalue() == ""


@pytest.fixture
def terminal():
    """Open a terminal of 77 columns -> the end that a program takes for its standard error."""
    keyboard, screen = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 77, 0, 0))
    yield screen
    os.close(keyboard)
    os.close(screen)


@pytest.mark.parametrize("launcher", [[], [MPIRUN, "-n", "1"]], ids=["alone", "under mpirun"])
def test_a_terminal_is_found_through_the_launcher_and_a_file_is_none(terminal, launcher):
    command = [*launcher, sys.executable, "-c", PROGRAM]
    for stderr, width in ((terminal, "77"), (subprocess.DEVNULL, "None")):
        ended = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=HANG_SECONDS
        )
        assert ended.stdout.split() == [width]


def test_looking_for_a_terminal_leaves_a_log_as_it_is(tmp_path):
    log = tmp_path / "log"
    program = "import sys; print('first', file=sys.stderr, flush=True); " + PROGRAM
    with log.open("w") as stderr:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=stderr, stdout=subprocess.DEVNULL, check=True)
    assert log.read_text() == "first\n"
