"""A person sees a bar on a terminal, a line about every ten seconds in a file, and nothing of other ranks than 0."""

import dataclasses
import fcntl
import io
import itertools
import logging
import os
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import HANG_SECONDS, MPIRUN, ROOT

from hpcmoe.report import progress
from hpcmoe.report.meter import STAGES, StepMetrics
from hpcmoe.report.progress import open_progress
from hpcmoe.report.step_lines import fit_pairs, format_details, format_duration, list_pairs

PROGRAM = "from hpcmoe.report.progress import find_terminal_width; print(find_terminal_width())"
LOSS, RATE, NORM = 2.34567, 0.0123456, 0.432109
METRICS = StepMetrics(
    seconds=0.5, seconds_of_stage=dict.fromkeys(STAGES, 0.0) | {"route": 0.012, "optimizer": 0.034},
    utilisation=np.array([[0.5, 1.0], [1.5, 1.0]]), num_dropped=7,
    link_tokens_mean=10.0, link_sigma=0.1234, link_sigma_of_layer=np.array([0.2, 0.31]),
    balancedness=0.754, balancedness_of_layer=np.array([0.7, 0.81]), num_tokens=500,
)  # fmt: skip


def show_steps(num_steps, first_step=0, on_root=True, every_seconds=10.0, sinks=()):
    with open_progress(num_steps, first_step, on_root, every_seconds, sinks) as show:
        for step in range(first_step + 1, num_steps + 1):
            show(step, LOSS, RATE, METRICS, NORM)


@pytest.fixture
def log(caplog):
    """What is logged."""
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


def test_a_steps_line_holds_its_figures_as_key_and_value():
    line = fit_pairs(list_pairs(LOSS, RATE, NORM, METRICS, 421_000_000), 96)
    assert line == "loss=2.3457 tokens/s=1000 norm=0.43211 lr=0.012346 balance=0.75 mem=0.42GB"


def test_the_rest_comes_in_lines_of_its_own():
    assert list(format_details(3, METRICS)) == [
        "step=3 U_e=0.50-1.50 balance_of_layer=0.70-0.81 sigma=0.123 sigma_of_layer=0.20-0.31 dropped=7",
        "step=3 route_ms=12.0 optimizer_ms=34.0",
    ]


def test_inference_has_neither_loss_nor_optimizer():
    quiet = dataclasses.replace(METRICS, seconds_of_stage=dict.fromkeys(STAGES, 0.0))
    assert fit_pairs(list_pairs(None, None, None, quiet, 10**9), 96) == "tokens/s=1000 balance=0.75 mem=1.00GB"
    assert "optimizer" not in " ".join(format_details(1, quiet))


@given(
    steps=st.integers(1, 2**31 - 1), loss=st.floats(0, 1e12), rate=st.floats(1e-30, 1e3), norm=st.floats(0, 1e30),
    seconds=st.floats(1e-6, 1e6), eta=st.floats(0, 1e8), memory=st.integers(0, 10**13),
)  # fmt: skip
def test_no_line_is_longer_than_120_characters(steps, loss, rate, norm, seconds, eta, memory):
    metrics = dataclasses.replace(METRICS, seconds=seconds)
    where = [("step", f"{steps}/{steps}"), ("eta", format_duration(eta))]
    line = fit_pairs([*where, *list_pairs(loss, rate, norm, metrics, memory)], 96)
    assert len(f"2026-12-01 05:02:57 {line}") <= 120 and dict(pair.split("=") for pair in line.split()).keys() == {
        "step", "eta", "loss", "tokens/s", "norm", "lr", "balance", "mem",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(6.6, "7s"), (59.6, "1m00s"), (3725, "1h02m"), (90_000, "1d01h"), (-1, "0s")]
)
def test_a_duration_is_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("num_steps", "every", "shown"),
    [(3, 10, [1, 3]), (100, 30, [1, 31, 61, 91, 100]), (3, 0, [1, 2, 3]), (1, 10, [1])],
)
def test_without_a_terminal_lines_come_by_time_first_and_last_among_them(
    log, monkeypatch, clock, num_steps, every, shown
):
    monkeypatch.setattr(progress, "find_terminal_width", lambda: None)
    show_steps(num_steps, every_seconds=every)
    assert [line.split()[0] for line in log.messages] == [f"step={step}/{num_steps}" for step in shown]
    assert f"eta={format_duration(num_steps - 1)}" in log.messages[0]


@pytest.mark.parametrize("width", [40, 80, 110, 200])
def test_on_a_terminal_there_is_a_bar_that_starts_where_the_run_does(log, monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "find_terminal_width", lambda: width)
    show_steps(10, first_step=4)
    shown = re.split(r"[\r\n]|\x1b\[A", screen.getvalue())
    assert max(map(len, shown)) < width
    assert any("4/10" in part for part in shown) and any("loss=2.3457" in part for part in shown)
    assert "10/10" in screen.getvalue() and log.messages == []


def test_a_dumb_terminal_gets_lines(monkeypatch, terminal):
    monkeypatch.setenv("TERM", "dumb")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    assert ended.stdout.split() == ["None"]


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
