"""The checkpoints of a run's folder by their steps, found by name alone: no MPI is needed."""

import contextlib
import os
import re
from pathlib import Path

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.resolve().name.removeprefix("checkpoint-"))


def is_in_folder(checkpoint: Path, folder: Path) -> bool:
    """Return True if a checkpoint is one of this folder's, whatever the links on the way."""
    with contextlib.suppress(ValueError):  # a name that no file can have
        return os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(folder)
    return False


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the finished checkpoint of the highest step -> its path, or None."""
    found = list_checkpoints(folder)
    return found[max(found)] if found else None


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """List the finished checkpoints of a run's folder -> {step: path}."""
    paths = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in paths if match}


def find_newest_step(folder: Path) -> int:
    """Find the step of a folder's newest checkpoint -> it, 0 without one."""
    return max(list_checkpoints(folder), default=0) if folder.is_dir() else 0
