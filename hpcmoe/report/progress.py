"""Progress of a run on rank 0: a bar where there is a terminal, lines in the log elsewhere, about every ten seconds."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import psutil
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hpcmoe.environment import is_dumb_terminal
from hpcmoe.report.meter import StepMetrics
from hpcmoe.report.step_lines import Figures, fit_pairs, format_details, format_duration, list_figures, list_pairs

log = logging.getLogger(__name__)
_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")
_MOST_OF_MESSAGE = 96  # characters: with the date before it, and srun's label, a line of 120 at most
_MOST_OF_BAR = 100
_UNKNOWN_WIDTH = 80  # of a terminal that does not tell its own
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
Show = Callable[..., None]


class Sink(Protocol):
    """What gets the figures of the steps that are shown."""

    def add(self, figures: Figures) -> None:
        """Keep a step's figures."""


@contextlib.contextmanager
def open_progress(
    num_steps: int, first_step: int, on_root: bool, every_seconds: float = 10.0, sinks: Sequence[Sink] = ()
) -> Iterator[Show]:
    """Yield the function show(step, loss, learning rate, metrics, norm) of steps first_step + 1 to num_steps.

    Loss, rate and norm of the gradients are None where there is none. It is silent on other ranks than 0. Without a
    terminal it logs the first step, one about every so many seconds, and the last; sinks get the same steps.
    """
    if not on_root:
        yield lambda *_, **__: None
        return
    width = find_terminal_width()
    with contextlib.nullcontext() if width is None else open_bar(num_steps, first_step, width) as show_bar:
        yield Shower(num_steps, first_step, every_seconds, sinks, show_bar).show


class Shower:
    """Shows each step by a bar if there is one, and logs those that are due."""

    def __init__(
        self,
        num_steps: int,
        first_step: int,
        every_seconds: float,
        sinks: Sequence[Sink],
        show_bar: Callable[[int, str], None] | None,
    ) -> None:
        self.num_steps, self.first_step, self.every_seconds = num_steps, first_step, every_seconds
        self.sinks, self.show_bar = sinks, show_bar
        self.started, self.due = time.monotonic(), -math.inf
        self.process = psutil.Process()

    def show(
        self, step: int, loss: float | None, rate: float | None, metrics: StepMetrics, norm: float | None = None
    ) -> None:
        """Show a step's figures where it is due; on a bar, every step's."""
        now = time.monotonic()
        is_due = now >= self.due or step == self.num_steps
        if not is_due and self.show_bar is None:
            return
        eta = (now - self.started) / (step - self.first_step) * (self.num_steps - step)
        memory = self.process.memory_info().rss
        if self.show_bar is not None:
            self.show_bar(step, fit_pairs(list_pairs(loss, rate, norm, metrics, memory), _MOST_OF_MESSAGE))
        if not is_due:
            return

        # Log the line, for which a bar stands, and at --verbose all the rest.
        self.due = now + self.every_seconds
        if self.show_bar is None:
            where = [("step", f"{step}/{self.num_steps}"), ("eta", format_duration(eta))]
            pairs = [*where, *list_pairs(loss, rate, norm, metrics, memory)]
            log.info("%s", fit_pairs(pairs, _MOST_OF_MESSAGE))
        for line in format_details(step, metrics):
            log.debug("%s", line)
        figures = list_figures(loss, rate, norm, metrics)
        for sink in self.sinks:
            sink.add({"step": step, "steps": self.num_steps, "eta_seconds": eta, **figures, "memory_bytes": memory})


@contextlib.contextmanager
def open_bar(num_steps: int, first_step: int, width: int) -> Iterator[Callable[[int, str], None]]:
    """Open a bar with a line of figures below, on a terminal of so many columns -> what shows a step and its figures.

    Whatever is logged meanwhile stands above it.
    """
    columns = min(width, _MOST_OF_BAR + 1) - 1  # a full line would break on some terminals
    with (
        tqdm(total=num_steps, initial=first_step, unit="step", ncols=columns, bar_format=_BAR) as bar,
        tqdm(bar_format="{desc}", ncols=columns, position=1, leave=False) as below,
        logging_redirect_tqdm(),
    ):

        def show(step: int, figures: str) -> None:
            """Advance both lines, as often as tqdm redraws them."""
            below.set_description_str(figures[:columns], refresh=False)
            bar.update(step - bar.n)
            below.update()
            if step in (first_step + 1, num_steps):  # however fast they are
                below.refresh()

        yield show


def find_terminal_width() -> int | None:
    """Return the columns of the terminal of standard error, its own or its launcher's, or None.

    None also where the terminal cannot move its cursor, TERM = dumb.
    """
    if is_dumb_terminal():
        return None
    launchers = [process.pid for process in psutil.Process().parents() if process.name() in _LAUNCHERS]
    for pid in [os.getpid(), *launchers[:1]]:
        with contextlib.suppress(OSError):
            file = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NOCTTY)  # read only: it may be somebody's log
            try:
                return os.get_terminal_size(file).columns or _UNKNOWN_WIDTH
            finally:
                os.close(file)
    return None
