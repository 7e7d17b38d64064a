"""Runs of the whole program in which a test plants faults: short, with a checkpoint after each step."""

import time

import h5py
from launch import HANG_SECONDS

from hpcmoe.write.steps import list_checkpoints

SETTINGS = {
    "model.sequence_length": 32,
    "data.batch_sequences": 16,
    "data.validation_sequences": 16,
    "train.check_every": 1,
    "write.checkpoint_every": 1,
    "placement.search_seconds": 0.05,
    "placement.seconds_per_token": 1e-6,
}


def spell_run(output, **settings):
    """Spell the config and the settings of a run; a key's section is joined to it by two underscores."""
    chosen = {**SETTINGS, "run.output": output, **{name.replace("__", "."): value for name, value in settings.items()}}
    return ["inputs/run.toml", *(word for key, value in chosen.items() for word in ("--set", f"{key}={value}"))]


def wait_for_step(running, folder, step):
    """Wait until a run has written the checkpoint of a step, or of a later one."""
    deadline = time.monotonic() + HANG_SECONDS
    while not folder.is_dir() or max(list_checkpoints(folder), default=0) < step:
        assert time.monotonic() < deadline and running.process.poll() is None
        time.sleep(0.02)


def read_losses(folder):
    """Read a run's loss of each step."""
    with h5py.File(folder / "run.h5") as file:
        return file["train/loss/value"][:]
