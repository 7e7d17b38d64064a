"""What a person sees while the run goes on: a bar where there is a terminal, plain lines elsewhere."""

import contextlib
import logging
import os

import psutil
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)
TTY_LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")


@contextlib.contextmanager
def open_progress(num_steps, first_step, on_root):
    """Show steps first_step + 1 to num_steps, on rank 0 alone -> something with show(step, outcome, metrics)."""
    width = find_terminal_width() if on_root else None
    if not on_root:
        yield NoProgress()
    elif width is not None:
        with tqdm(total=num_steps, initial=first_step, unit="step", ncols=width) as bar, logging_redirect_tqdm():
            yield ProgressBar(bar)
    else:
        yield ProgressLines(num_steps)


def find_terminal_width():
    """Find the terminal where standard error ends, be it through a launcher that collects it -> columns, or None."""
    launchers = [process.pid for process in psutil.Process().parents() if process.name() in TTY_LAUNCHERS]
    for pid in [os.getpid(), *launchers[:1]]:
        with contextlib.suppress(OSError):
            file = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NOCTTY)  # to look: it may be somebody's log
            try:
                return os.get_terminal_size(file).columns
            finally:
                os.close(file)
    return None


class NoProgress:
    """What the other ranks show."""

    def show(self, step, outcome, metrics):
        """Show nothing."""


class ProgressBar:
    """A progress bar with the newest figures behind it."""

    def __init__(self, bar):
        self.bar = bar

    def show(self, step, outcome, metrics):
        """Move the bar one step on."""
        self.bar.set_postfix_str(format_step_briefly(outcome, metrics))
        self.bar.update()


class ProgressLines:
    """A line every few steps: about forty in a run."""

    def __init__(self, num_steps):
        self.num_steps, self.every = num_steps, max(num_steps // 40, 1)

    def show(self, step, outcome, metrics):
        """Log the step if its turn has come."""
        if step % self.every == 0 or step == self.num_steps:
            log.info("step %d/%d: %s", step, self.num_steps, format_step(outcome, metrics))


def format_step(outcome, metrics):
    """Put a step's figures in a line."""
    seconds = metrics.seconds_of_stage
    stages = [stage for stage in ("route", "dispatch", "compute", "combine", "optimizer") if seconds[stage]]
    layers = (
        f"balancedness {format_range(metrics.balancedness_of_layer)}, sigma {format_range(metrics.link_sigma_of_layer)}"
    )
    return (
        f"{format_step_briefly(outcome, metrics)}; by layer {layers}; dropped {outcome.stats.num_dropped}, ms: "
        + " ".join(f"{stage} {1000 * seconds[stage]:.0f}" for stage in stages)
    )


def format_step_briefly(outcome, metrics):
    """Put what a person watches in a few words."""
    utilisation = outcome.stats.utilisation
    loss = f"loss {outcome.loss:.4f}, " if outcome.loss is not None else ""
    return (
        f"{loss}{metrics.tokens_per_second:.0f} tokens/s, U_e {format_range(utilisation)}, "
        f"balancedness {metrics.balancedness:.2f}, sigma {metrics.links.sigma:.3f}"
    )


def format_range(values):
    """Write the least and the most of some values."""
    return f"{values.min():.2f}-{values.max():.2f}"
