"""What a run shows of its steps while it goes on, as [run] has it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hpcmoe.config import Config
from hpcmoe.report.progress import Show, open_progress
from hpcmoe.report.sinks import open_sinks


@contextlib.contextmanager
def open_display(config: Config, first_step: int, rank: int) -> Iterator[Show]:
    """Yield the function that shows a step's figures, after first_step; of other ranks than 0 nothing is shown."""
    run = config.run
    with contextlib.ExitStack() as opened:
        folder, sinks = Path(run.output, run.name), []
        if rank == 0:
            sinks = opened.enter_context(open_sinks(folder, run.log_json, run.tensorboard))
        yield opened.enter_context(open_progress(run.steps, first_step, rank == 0, run.log_seconds, sinks))
