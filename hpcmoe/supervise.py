"""`hpcmoe run CONFIG --restart [TRIES]`: starts the ranks, and after a fault starts them anew on the hosts left.

This process is no rank: it outlives them. Each start goes on from the newest state that is whole. It stops where a new
start would not help: input that the user is to correct, an end in order, the same error again, no step further.
"""

import argparse
import collections
import contextlib
import ctypes
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.hosts import Launch, find_launch
from hpcmoe.config import Config, read_config
from hpcmoe.environment import SUPERVISOR, environment_without, read_environment
from hpcmoe.errors import ClusterError, ConfigError
from hpcmoe.interrupts import TERMINATION_SIGNALS, list_not_ignored, name_signal
from hpcmoe.output import EXIT_AGAIN, EXIT_USER, print_to_stderr
from hpcmoe.start import LAUNCHERS
from hpcmoe.write.steps import find_newest_step

_INTERRUPTED = 128 + signal.SIGINT
_FINAL = (0, EXIT_USER, EXIT_AGAIN, _INTERRUPTED)  # statuses after which another start would be no better
_TAIL_LINES = 400  # of the ranks' standard error, in which the fault is looked for
_LONGEST_BACKOFF_SECONDS = 60.0
_LEAVE_SECONDS = 3.0  # for the last processes of a start to go by themselves
_SET_PDEATHSIG = 1  # of prctl
_OF_RANK = re.compile(r"\[rank \d+ of \d+[^\]]*\] ")
_LOGGED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # a line of the log
_FIRST_DEATH, _HANGS = "ended before its time", " hangs: "  # in the watcher's lines
_VARYING = re.compile(r"\d+")  # what differs between two lines of the same error


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one start of the ranks ended."""

    status: int
    cause: str  # the line that names it; empty where no rank has said anything
    step: int  # of the newest checkpoint afterwards, 0 without one


def main() -> int:
    """Run the program -> exit status."""
    try:
        arguments, words = read_arguments(sys.argv[1:])
        config, _ = read_config(arguments.config, arguments.set)
        launch = find_launch(arguments.launch, arguments.ranks, arguments.hosts, words)
        tries = config.restart.tries if arguments.restart is None else arguments.restart
    except (ConfigError, ClusterError) as error:
        print_to_stderr(f"hpcmoe: {line}" for line in str(error).splitlines())
        return EXIT_USER
    return Supervisor(arguments, config, launch, tries).run()


class Supervisor:
    """Starts the ranks, anew after faults."""

    def __init__(self, arguments: argparse.Namespace, config: Config, launch: Launch, tries: int) -> None:
        """tries: how often the ranks are started after a fault, at most."""
        self.arguments, self.restart, self.launch, self.tries = arguments, config.restart, launch, tries
        self.folder = Path(config.run.output, config.run.name)
        self.begun, self.token = time.monotonic(), uuid.uuid4().hex
        self.asked: list[int] = []  # the signals that ask for an end
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start the ranks until they end for good -> exit status."""
        attempts: list[Attempt] = []
        with self.forwarded_signals():
            while True:
                attempts.append(self.start_ranks(is_restart=bool(attempts)))
                if reason := self.find_end(attempts):
                    if attempts[-1].status not in _FINAL and not self.asked:
                        print_to_stderr([f"hpcmoe: not started again: {reason}"])
                    return self.find_status(attempts[-1].status)
                self.prepare_next(attempts)
                if self.asked or not self.launch.ranks:
                    return self.find_status(attempts[-1].status)

    def start_ranks(self, is_restart: bool) -> Attempt:
        """Start the ranks and wait for their end; nothing that they have started is left on this machine."""
        command = self.launch.format_command(self.format_program(is_restart))
        with start_process(command, environment_without() | {SUPERVISOR: self.token}) as self.process:
            for number in self.asked:  # which came before there was a process
                self.process.send_signal(number)
            assert self.process.stderr is not None
            tail, copying = copy_lines(self.process.stderr)
            status = self.process.wait()
            end_processes(self.token)  # some of which may hold the stream open
            copying.join(_LEAVE_SECONDS)
            self.process = None
        step = find_newest_step(self.folder)
        status = status if status >= 0 else 128 - status
        return Attempt(status=status, cause=find_cause(tail), step=step)

    def format_program(self, is_restart: bool) -> list[str]:
        """Format the program that each rank runs."""
        sets = [word for override in self.arguments.set for word in ("--set", override)]
        if self.restart.wall_seconds > 0:  # which count from this process's start
            left = max(self.restart.wall_seconds - (time.monotonic() - self.begun), 1.0)
            sets += ["--set", f"restart.wall_seconds={left:.0f}.0"]
        resume = ["--restarted"] if is_restart else ["--resume", self.arguments.resume]
        return [sys.executable, "-m", "hpcmoe.main", self.arguments.config, *sets, *resume]

    def find_end(self, attempts: Sequence[Attempt]) -> str:
        """Find why the ranks are not started again -> the reason, empty where they are."""
        last = attempts[-1]
        hangs = last.status == EXIT_USER and _HANGS in last.cause
        if self.asked or (last.status in _FINAL and not hangs):
            return "they have ended for good"
        if len(attempts) > self.tries:
            return f"{self.tries} tries are used up"
        return find_lasting_error(attempts)

    def find_status(self, status: int) -> int:
        """Find this program's exit status from the last start's: the signal that has asked for the end, if one did."""
        if not self.asked or status in _FINAL:
            return status
        return 128 + self.asked[0]

    def prepare_next(self, attempts: Sequence[Attempt]) -> None:
        """Find the hosts left, say what has happened, and wait longer the less the ranks have got on."""
        last, before = attempts[-1], self.launch
        self.launch = before.without_lost_hosts()
        if not self.launch.ranks:
            print_to_stderr(["hpcmoe: not started again: none of the hosts answers"])
            return
        delay_seconds = 0.0
        if is_no_further(attempts) and len(attempts) > 1:
            delay_seconds = min(2.0 ** (len(attempts) - 2), _LONGEST_BACKOFF_SECONDS)
        lost = sorted({host.name for host in before.hosts} - {host.name for host in self.launch.hosts})
        print_to_stderr([
            f"hpcmoe: start {len(attempts)} ended with status {last.status}: {last.cause or 'no rank has said why'}",
            f"hpcmoe: started again, {self.tries - len(attempts)} tries left: {self.launch.ranks} ranks"
            + f" without {', '.join(lost)}" * bool(lost)
            + f", in {delay_seconds:.0f} s" * (delay_seconds > 0),
        ])  # fmt: skip
        deadline = time.monotonic() + delay_seconds
        while time.monotonic() < deadline and not self.asked:
            time.sleep(0.1)

    @contextlib.contextmanager
    def forwarded_signals(self) -> Iterator[None]:
        """Forward the signals that ask for an end to the launcher."""

        def forward(number: int, _: FrameType | None) -> None:
            self.asked.append(number)
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(number)
            elif self.process is None:
                print_to_stderr([f"hpcmoe: {name_signal(number)}: the ranks are not started again"])

        numbers = {signal.SIGINT, *list_not_ignored(*TERMINATION_SIGNALS)}
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def find_lasting_error(attempts: Sequence[Attempt]) -> str:
    """Find why another start would end as the last did -> the reason, empty where it may not."""
    if not is_no_further(attempts) or len(attempts) < 2:
        return ""
    last, earlier = (_VARYING.sub("", attempt.cause) for attempt in attempts[-2:])
    if last and last == earlier and _FIRST_DEATH not in last and _HANGS not in last:
        return f"the same error as before, and no step further: {attempts[-1].cause}"
    if len(attempts) > 2 and is_no_further(attempts[:-1]):
        return f"three starts in a row have come no further than step {attempts[-1].step}"
    return ""


def is_no_further(attempts: Sequence[Attempt]) -> bool:
    """Return True if the last start has written no checkpoint of a later step than there was before."""
    return attempts[-1].step <= (attempts[-2].step if len(attempts) > 1 else 0)


def find_cause(lines: Sequence[str]) -> str:
    """Find the line that names the fault: the first death or hang, else a rank's last, else any's but the log's."""
    others = [line.strip() for line in lines if line.strip() and not _LOGGED.match(line)]
    of_ranks = [line for line in others if _OF_RANK.match(line)]
    deaths = [line for line in of_ranks if _FIRST_DEATH in line or _HANGS in line]
    return next(iter([*deaths[:1], *of_ranks[-1:], *others[-1:]]), "")


@contextlib.contextmanager
def start_process(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the launcher in a session of its own, to which signals come from here alone, and end with this process."""
    prctl = ctypes.CDLL(None).prctl
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
        preexec_fn=lambda: prctl(_SET_PDEATHSIG, signal.SIGTERM),
    ) as process:
        yield process


def copy_lines(stream: IO[bytes]) -> tuple[Sequence[str], threading.Thread]:
    """Copy lines to standard error as they come -> (the last of them, the thread that copies until the end)."""
    tail = collections.deque[str](maxlen=_TAIL_LINES)

    def copy() -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip("\n")
            tail.append(text)
            print_to_stderr([text])

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return tail, thread


def end_processes(token: str) -> None:
    """End what is left on this machine of the processes that bear a token in their environment.

    One that even SIGKILL does not end, as in a call of a dead file system, is named and left.
    """
    deadline = time.monotonic() + _LEAVE_SECONDS
    while left := list_processes(token):
        if time.monotonic() > deadline + _LEAVE_SECONDS:
            pids = ", ".join(str(process.pid) for process in left)
            print_to_stderr([f"hpcmoe: not ended by SIGKILL, and left: process {pids}"])
            return
        if time.monotonic() > deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.05)


def list_processes(token: str) -> list[psutil.Process]:
    """List the processes of this machine, but zombies, that bear a token in their environment."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        is_alive = process.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        if is_alive and (process.info["environ"] or {}).get(SUPERVISOR) == token:
            found.append(process)
    return found


def read_arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line -> (arguments, the words for the launcher). Raises ConfigError."""
    about = "Start a run on MPI ranks, and start it anew after a fault. What follows -- goes to mpirun or srun."
    parser = Parser(prog=name_program("hpcmoe.supervise"), description=about)
    parser.add_argument("config", help="TOML file, such as inputs/run.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--resume", default="auto", metavar="FOLDER", help="where the first start begins: auto")
    parser.add_argument(
        "--restart",
        nargs="?",
        type=int,
        metavar="TRIES",
        help="starts after a fault at most; without a number [restart] tries",
    )
    parser.add_argument("-n", "--ranks", type=int, metavar="N", help="ranks; in a Slurm job as many as it has tasks")
    parser.add_argument("--hosts", default="", metavar="A:4,B:4", help="hosts of mpirun, each with its ranks")
    parser.add_argument("--launch", choices=["mpirun", "srun"], help="srun in a Slurm job, else mpirun")
    own, launcher = split_at_dashes(words)
    arguments = parser.parse_args(own)
    for name in ("restart", "ranks"):
        value = getattr(arguments, name)
        if value is not None and value < (name == "ranks"):
            raise ConfigError(f"command line: --{name} {value}: must be {'1' if name == 'ranks' else '0'} or more")
    inside = [launcher.name for launcher in LAUNCHERS if launcher.starts_mpi and launcher.rank in read_environment()]
    if inside:
        raise ConfigError(f"command line: --restart: starts the ranks itself: call it without {inside[0]}")
    return arguments, launcher


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words at the first "--" -> (those before it, those after it)."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


if __name__ == "__main__":
    sys.exit(main())
