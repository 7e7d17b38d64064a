"""Where the figures of the steps that are shown go besides the log: lines of JSON, and TensorBoard."""

import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmoe.errors import ConfigError
from hpcmoe.messages import to_json
from hpcmoe.report.step_lines import Figures

if TYPE_CHECKING:
    from hpcmoe.report.progress import Sink

log = logging.getLogger(__name__)
LINES, EVENTS = "log.jsonl", "tensorboard"  # in the run's folder


def check_tensorboard(wanted: bool) -> None:
    """Raise ConfigError where TensorBoard is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("[run] tensorboard = true: needs TensorBoard: pip install 'hpcmoe[tensorboard]'")


@contextlib.contextmanager
def open_sinks(folder: Path, log_json: bool, tensorboard: bool) -> Iterator[list["Sink"]]:
    """Open the sinks that are wanted, in the run's folder -> Sinks. On rank 0 alone; not collective."""
    with contextlib.ExitStack() as opened:
        sinks: list[Sink] = [JsonLines(folder / LINES)] * log_json
        if tensorboard:
            sinks.append(opened.enter_context(open_event_files(folder / EVENTS)))
        yield sinks


class JsonLines:
    """A file of JSON objects, a line for each step that is shown."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_broken = path, False

    def add(self, figures: Figures) -> None:
        """Append a step's figures with the date; after an error of the system, which is logged once, nothing."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **{name: to_json(figures[name]) for name in figures}}
        if self.is_broken:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        except OSError as error:
            self.is_broken = True
            log.warning("%s: gets no more lines: %s", self.path, error.strerror)


class EventFiles:
    """TensorBoard's event files, a scalar for each figure."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def add(self, figures: Figures) -> None:
        """Write each figure of a step that there is."""
        for name, value in figures.items():
            if value is not None and name not in ("step", "steps"):
                self.writer.add_scalar(name, float(value), figures["step"])


@contextlib.contextmanager
def open_event_files(folder: Path) -> Iterator[EventFiles]:
    """Open TensorBoard's event files in a folder, and close them at the end."""
    from torch.utils.tensorboard import SummaryWriter  # seconds of import

    writer = SummaryWriter(str(folder))
    try:
        yield EventFiles(writer)
    finally:
        writer.close()
