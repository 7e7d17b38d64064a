"""One case: a run of the whole program, a fault at a random moment, a resume, and all that must hold of them."""

import os
import random
import re
import sys
import time
from dataclasses import dataclass, field

import h5py
import numpy as np
import psutil
from chaos.faults import KINDS
from launch import MPIRUN, Running
from mpi4py import MPI

from hpcmoe.errors import CheckpointError
from hpcmoe.write.checkpoint import find_checkpoint, list_checkpoints

END_SECONDS = 120.0  # from a fault to the end of the last process
START_SECONDS = 300.0  # to the first checkpoint, on a busy machine
STEPS = 24
SETTINGS = {
    "run.steps": STEPS,
    "model.hidden": 16,
    "model.feed_forward": 16,
    "model.num_layers": 1,
    "model.sequence_length": 16,
    "data.batch_sequences": 16,
    "data.validation_sequences": 16,
    "train.validate_every": 0,
    "train.check_every": 1,
    "write.checkpoint_every": 2,
    "write.checkpoints_kept": 3,
    "placement.method": "contiguous",
    "placement.seconds_per_token": 1e-6,
    "cluster.measure_seconds": 0.1,
}
LEFTOVERS = ("*.partial", "*.part", "*.tmp", "run.lock*", "*.old", "*.previous", "stop")


@dataclass(slots=True, kw_only=True)
class Case:
    """A case, all of whose choices come from its random numbers."""

    number: int
    ranks: int
    kind: str
    folder: object  # pathlib.Path, of this case alone
    chosen: random.Random
    faulted: Running | None = None
    mapped: set = field(default_factory=set)  # segments of shared memory that the processes had
    before: int = 0  # the newest finished checkpoint as the fault came
    redone: int = 0  # steps
    seconds: float = 0.0  # from the fault to the end of all processes
    what: str = ""  # was done, to whom
    named: str = ""  # how the line begins that names the rank
    second: object = None  # how a second run of the name ended

    @property
    def run_folder(self):
        """Return the run's folder."""
        return self.folder / "run"

    def spell(self, ranks):
        """Spell the command of this case's run on some ranks: go on if there is something."""
        kept = {"run.output": self.folder, "write.asynchronous": str(self.number % 2 == 0).lower()}
        settings = {**SETTINGS, **KINDS[self.kind].settings, **kept}
        words = ["inputs/run.toml", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
        if KINDS[self.kind].supervised:
            return [sys.executable, "-m", "hpcmoe", "run", *words, "--restart", "3", "-n", str(ranks)]
        return [MPIRUN, "-n", str(ranks), sys.executable, "-m", "hpcmoe.main", *words, "--resume", "auto"]

    def start(self, ranks):
        """Start this case's run in a session of its own -> Running."""
        return Running(*self.spell(ranks), own_session=True)


def run_case(case, losses):
    """Run a case beside the losses of an undisturbed run -> what is wrong, a list of lines; none where all holds."""
    wrong = []
    try:
        ended = disturb(case)
        wrong += KINDS[case.kind].check(case, ended)
        wrong += [f"a traceback:\n{ended.errors}"] if "Traceback" in ended.errors else []
        wrong += check_checkpoints(case)
        KINDS[case.kind].restore(case)
        wrong += go_on(case, losses, ended)
    except AssertionError as error:  # of Running: late, or processes left behind
        wrong.append(str(error))
    finally:
        if case.faulted is not None:
            case.faulted.kill()
    return [f"{case.what}: {line}" for line in wrong]


def disturb(case):
    """Start the run, wait for a random moment, do what the kind does -> how the run ended."""
    case.faulted = case.start(case.ranks)
    wait_for_moment(case)
    case.mapped |= list_mapped(case.faulted)
    case.before = max(list_checkpoints(case.run_folder), default=0)
    begun = time.monotonic()
    KINDS[case.kind].act(case)
    ended = case.faulted.wait(END_SECONDS)
    case.seconds = time.monotonic() - begun
    return ended


def wait_for_moment(case):
    """Wait for a moment: a third of them before the first step, the others from a random checkpoint on."""
    if KINDS[case.kind].any_time and case.chosen.random() < 1 / 3:
        time.sleep(case.chosen.uniform(0.05, 6.0))
        return
    step, deadline = case.chosen.randrange(2, STEPS - 5, 2), time.monotonic() + START_SECONDS
    while max(list_checkpoints(case.run_folder), default=0) < step:
        assert case.faulted.process.poll() is None, f"ended before the fault: {case.faulted.wait()}"
        assert time.monotonic() < deadline, "has not begun to train"
        time.sleep(0.005)
    time.sleep(case.chosen.uniform(0, 0.1))


def list_mapped(running):
    """List the segments of shared memory that a run's processes have mapped."""
    found = set()
    for process in running.processes():
        try:
            found |= {each.path for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
        except psutil.Error:
            continue
    return found


def check_checkpoints(case):
    """Check that no finished checkpoint is lost or torn."""
    found = list_checkpoints(case.run_folder)
    wrong = [] if KINDS[case.kind].removes or max(found, default=0) >= case.before else [f"{case.before} is lost"]
    for path in found.values():
        try:
            find_checkpoint(MPI.COMM_SELF, path)
        except CheckpointError as error:
            if case.kind != "damage":
                wrong.append(f"torn: {error}")
    return wrong


def go_on(case, losses, ended):
    """Resume, now and then on other ranks, and compare the last loss -> what is wrong."""
    reached = read_steps(case)
    ranks = case.ranks if case.chosen.random() < 0.7 else case.chosen.choice([n for n in (2, 3, 4) if n != case.ranks])
    resumed = case.start(ranks).wait(START_SECONDS)
    if resumed.status != 0:
        return [f"does not go on on {ranks} ranks: {resumed}\nafter {ended}"]
    if match := re.search(r"checkpoint-\d+, step (\d+)", resumed.errors):
        case.redone = max(reached - int(match[1]), 0)

    # Compare the losses: bit for bit at the same shape.
    with h5py.File(case.run_folder / "run.h5") as file:
        steps, own = file["train/loss/step"][:], file["train/loss/value"][:]
    if list(steps) != list(range(1, STEPS + 1)):
        return [f"has the steps {list(steps)}"]
    same = (own == losses).all() if ranks == case.ranks else np.allclose(own, losses, rtol=2e-5)
    wrong = [] if same else [f"other losses on {ranks} ranks: {own} and not {losses}"]
    left = [str(path) for pattern in LEFTOVERS for path in case.folder.rglob(pattern)]
    left += [path for path in case.mapped if os.path.exists(path)]
    return wrong + check_checkpoints(case) + ([f"left behind: {left}"] if left else [])


def read_steps(case):
    """Read how many steps the run's records have, 0 where there are none that can be read."""
    try:
        with h5py.File(case.run_folder / "run.h5") as file:
            return int(file["train/loss/step"][-1])
    except (OSError, KeyError, ValueError, IndexError):
        return 0
