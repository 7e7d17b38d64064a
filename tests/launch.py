"""Commands run as a user runs them: each ends in time and leaves no process behind."""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass

import psutil

ROOT = pathlib.Path(__file__).parents[1]
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
MPIRUN = shutil.which("mpirun", path=PATH)
HANG_SECONDS = 900.0  # after which a command hangs, however busy the machine is; no command's pace is held to it
SWEEP_SECONDS = 60.0  # how long after a command its last processes may need to go


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Ended:
    """How a command ended."""

    status: int
    output: str  # standard output
    errors: str  # standard error
    seconds: float  # of the clock, which other work makes longer
    cpu_seconds: float  # of processors

    def lines(self, start):
        """Find the lines on standard error that begin with start."""
        return [line for line in self.errors.splitlines() if line.startswith(start)]

    def __repr__(self):
        return f"exit status {self.status} after {self.seconds:.1f} s\n{self.output}\n{self.errors}"


class Running:
    """A command on its way: every process that it starts inherits a mark in its environment."""

    def __init__(self, *command, cwd=ROOT, own_session=False, **environment):
        self.mark = uuid.uuid4().hex
        self.started, self.used = time.monotonic(), count_cpu_seconds()
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # the tests' own
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={**inherited, "PATH": PATH, **environment, "HPCMOE_TEST": self.mark},
            start_new_session=own_session,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self):
        """List the processes that bear the mark and still run."""
        found = psutil.process_iter(["environ", "status"])
        alive = [p for p in found if p.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
        return [p for p in alive if (p.info["environ"] or {}).get("HPCMOE_TEST") == self.mark]

    def wait(self, timeout_seconds=HANG_SECONDS):
        """Wait for the end -> Ended; AssertionError if it is late or leaves a process behind."""
        try:
            output, errors = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            output, errors = self.process.communicate()
            raise AssertionError(f"still running after {timeout_seconds} s:\n{output}\n{errors}") from None
        ended = Ended(
            status=self.process.returncode,
            output=output,
            errors=errors,
            seconds=time.monotonic() - self.started,
            cpu_seconds=count_cpu_seconds() - self.used,
        )
        self.sweep()
        return ended

    def sweep(self):
        """See that nothing is left; what is left is killed, and named in the AssertionError."""
        deadline = time.monotonic() + SWEEP_SECONDS
        while left := self.processes():
            if time.monotonic() > deadline:
                names = [f"{p.pid} {p.name()}" for p in left]
                self.kill()
                raise AssertionError(f"processes left behind: {names}")
            time.sleep(0.1)

    def kill(self):
        """End every process of the command."""
        for process in self.processes():
            process.kill()


def count_cpu_seconds():
    """Count what the commands that have ended took of processors -> seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*command, timeout_seconds=HANG_SECONDS, **environment):
    """Run a command in the repository's root -> Ended; AssertionError if it is late or leaves a process behind."""
    return Running(*command, **environment).wait(timeout_seconds)


def mpirun(ranks, *arguments, timeout_seconds=HANG_SECONDS, **environment):
    """Run Python with the arguments on MPI ranks of this machine -> Ended."""
    return run(MPIRUN, "-n", ranks, sys.executable, *arguments, timeout_seconds=timeout_seconds, **environment)


def mpirun_several(ranks, *commands):
    """Run the program with each of some arguments, in one start of the ranks -> Ended, and what each printed.

    A command is what mpirun would be given, its words from -m hpcmoe.main on.
    """
    runs = [[str(word) for word in command[2:]] for command in commands]
    ended = mpirun(ranks, ROOT / "tests" / "several.py", json.dumps(runs), PYTHONPATH=str(ROOT))
    assert ended.status == 0, ended
    return ended, re.split(r"^run \d+\n", ended.output, flags=re.MULTILINE)[1:]
