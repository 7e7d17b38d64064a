"""Progress of a run on rank 0: a bar where there is a terminal, lines in the log elsewhere."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import numpy as np
import psutil
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hpcmoe.clock import Timer
from hpcmoe.report.meter import StepMetrics

log = logging.getLogger(__name__)
_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")
Show = Callable[[int, float | None, float | None, StepMetrics], None]


@contextlib.contextmanager
def open_progress(num_steps: int, first_step: int, on_root: bool) -> Iterator[Show]:
    """Yield the function show(step, loss, learning rate, metrics) of steps first_step + 1 to num_steps.

    Loss and rate are None where there is none. It is silent on other ranks than 0. Without a terminal it logs about
    forty steps, the last one among them.
    """
    width = find_terminal_width() if on_root else None

    def show_line(step: int, loss: float | None, rate: float | None, metrics: StepMetrics) -> None:
        """Log a step where it is due."""
        if step % max(num_steps // 40, 1) == 0 or step == num_steps:
            log.info("step %d/%d: %s", step, num_steps, format_step(loss, rate, metrics))

    def show_bar(step: int, loss: float | None, rate: float | None, metrics: StepMetrics) -> None:
        """Advance the bar by one step."""
        bar.set_postfix_str(format_step_briefly(loss, rate, metrics))
        bar.update()

    # Show steps by a bar, by lines, or not at all.
    if width is None:
        yield show_line if on_root else lambda step, loss, rate, metrics: None
    else:
        with tqdm(total=num_steps, initial=first_step, unit="step", ncols=width) as bar, logging_redirect_tqdm():
            yield show_bar


def find_terminal_width() -> int | None:
    """Return the columns of the terminal of standard error, its own or its launcher's, or None."""
    launchers = [process.pid for process in psutil.Process().parents() if process.name() in _LAUNCHERS]
    for pid in [os.getpid(), *launchers[:1]]:
        with contextlib.suppress(OSError):
            file = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NOCTTY)  # read only: it may be somebody's log
            try:
                return os.get_terminal_size(file).columns
            finally:
                os.close(file)
    return None


def format_step(loss: float | None, rate: float | None, metrics: StepMetrics) -> str:
    """Format a step's figures as one line."""
    shown = (Timer.ROUTE, Timer.DISPATCH, Timer.COMPUTE, Timer.COMBINE, Timer.OPTIMIZER)
    milliseconds = [(timer, 1000 * metrics.seconds_of_stage[timer]) for timer in shown]
    balancedness, sigma = (
        format_range(values) for values in (metrics.balancedness_of_layer, metrics.link_sigma_of_layer)
    )
    return (
        f"{format_step_briefly(loss, rate, metrics)}; by layer balancedness {balancedness}, sigma {sigma}; "
        f"dropped {metrics.num_dropped}, ms: " + " ".join(f"{timer} {ms:.0f}" for timer, ms in milliseconds if ms)
    )


def format_step_briefly(loss: float | None, rate: float | None, metrics: StepMetrics) -> str:
    """Format a step's main figures."""
    return (
        f"{f'loss {loss:.4f}, ' if loss is not None else ''}"
        f"{f'rate {rate:.3g}, ' if rate is not None else ''}{metrics.tokens_per_second:.0f} tokens/s, "
        f"U_e {format_range(metrics.utilisation)}, "
        f"balancedness {metrics.balancedness:.2f}, sigma {metrics.link_sigma:.3f}"
    )


def format_range(values: np.ndarray) -> str:
    """Format the least and the largest of some values."""
    return f"{values.min():.2f}-{values.max():.2f}"
