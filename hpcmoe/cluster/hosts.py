"""The launcher that starts ranks, on hosts of which some may have gone: srun in a Slurm job, else mpirun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hpcmoe.environment import read_counts, read_number, read_setting
from hpcmoe.errors import ConfigError

_ANSWER_SECONDS = 20.0  # for a host to start a process, or Slurm to tell the state of nodes
_PROBES = 64  # hosts asked at once
_GONE = ("down", "drain", "fail", "maint", "power", "reboot", "no_respond", "unknown", "not_responding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host, and how many ranks it is to have."""

    name: str
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the ranks are started."""

    program: str  # the path of srun or mpirun
    ranks: int
    hosts: tuple[Host, ...] = ()  # mpirun without any: this machine, or what it finds by itself
    words: tuple[str, ...] = ()  # more for the launcher, as the user gave them
    names_hosts: bool = False  # or the launcher finds them by itself, as in a Slurm job

    @property
    def is_srun(self) -> bool:
        """Return True if Slurm starts the ranks."""
        return Path(self.program).name == "srun"

    def format_command(self, command: Sequence[str]) -> list[str]:
        """Format the command line that starts a command on all ranks."""
        start = ["--kill-on-bad-exit=1", f"--ntasks={self.ranks}"] if self.is_srun else ["-n", str(self.ranks)]
        return [self.program, *start, *(self.format_hosts() if self.names_hosts else []), *self.words, *command]

    def format_hosts(self) -> list[str]:
        """Format the hosts as the launcher has them."""
        if self.is_srun:
            return [f"--nodes={len(self.hosts)}", f"--nodelist={','.join(host.name for host in self.hosts)}"]
        names = ",".join(f"{host.name}:{host.ranks}" for host in self.hosts)
        return ["--host" if is_open_mpi(self.program) else "-hosts", names]

    def without_lost_hosts(self) -> "Launch":
        """Return the launch on the hosts that answer, 0 ranks without any; itself where all do, or none is named."""
        left = tuple(host for host, is_there in zip(self.hosts, self.find_present(), strict=True) if is_there)
        if len(left) == len(self.hosts):
            return self
        ranks = min(self.ranks, sum(host.ranks for host in left))
        return replace(self, hosts=left, ranks=ranks, names_hosts=True)

    def find_present(self) -> list[bool]:
        """Find which hosts are there: by their states in Slurm, or by starting a process on each."""
        if self.is_srun:
            states = read_node_states([host.name for host in self.hosts])
            return [not any(word in states.get(host.name, "") for word in _GONE) for host in self.hosts]
        if not self.hosts:
            return []
        with ThreadPoolExecutor(_PROBES) as threads:
            return list(threads.map(self.answers, self.hosts))

    def answers(self, host: Host) -> bool:
        """Return True if the launcher can start a process on a host."""
        alone = replace(self, hosts=(replace(host, ranks=1),), ranks=1, names_hosts=True)
        return call(alone.format_command(["true"]))[0] == 0


def find_launch(chosen: str | None, ranks: int | None, hosts: str, words: Sequence[str]) -> Launch:
    """Find how to start the ranks: as chosen, by srun in a Slurm job, else by mpirun.

    chosen: srun or mpirun; hosts: "a:4,b:4". Raises ConfigError where the number of ranks is not known, or there is no
    such launcher.
    """
    in_job = bool(read_setting("SLURM_JOB_ID"))
    name = chosen or ("srun" if in_job and shutil.which("srun") else "mpirun")
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        raise ConfigError(f"command line: {name} is not on the PATH, so no ranks can be started")
    named = parse_hosts(hosts)
    of_job = list_job_hosts() if in_job and not named else ()
    number = ranks or sum(host.ranks for host in named or of_job) or (read_number("SLURM_NTASKS") if in_job else 0)
    if not number:
        raise ConfigError("command line: --ranks N: how many ranks? (or --hosts a:4,b:4, or in a Slurm job)")
    return Launch(program=program, ranks=number, hosts=named or of_job, words=tuple(words), names_hosts=bool(named))


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Parse "a:4,b:4" -> hosts; a name alone has one rank. Raises ConfigError."""
    hosts = []
    for entry in filter(None, text.split(",")):
        name, _, ranks = entry.partition(":")
        if not name or (ranks and not (ranks.isascii() and ranks.isdecimal() and 0 < int(ranks) < 10**6)):
            raise ConfigError(f"command line: --hosts {entry}: must be NAME or NAME:RANKS, as in a:4,b:4")
        hosts.append(Host(name=name, ranks=int(ranks or 1)))
    return tuple(hosts)


def list_job_hosts() -> tuple[Host, ...]:
    """List the nodes of the Slurm job that this process is in, with their ranks; () where Slurm does not tell."""
    status, names = call(["scontrol", "show", "hostnames", read_setting("SLURM_JOB_NODELIST")])
    counts = read_counts("SLURM_TASKS_PER_NODE")
    if status or len(names.split()) != len(counts):
        return ()
    return tuple(Host(name=name, ranks=ranks) for name, ranks in zip(names.split(), counts, strict=True))


def read_node_states(names: Sequence[str]) -> dict[str, str]:
    """Read the states of nodes from Slurm -> {name: state}, in small letters; one that stands for no answer has a *."""
    _, text = call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T"])
    states = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) > 1)
    return {name: "not_responding" if state.endswith("*") else state.lower() for name, state in states.items()}


def is_open_mpi(program: str) -> bool:
    """Return True if an mpirun is Open MPI's."""
    return "open mpi" in call([program, "--version"])[1].lower().replace("-", " ")


def call(command: Sequence[str]) -> tuple[int, str]:
    """Call a program that answers soon -> (status, its output); not 0 where it cannot be called, or is late."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return os.EX_SOFTWARE, ""
    return ended.returncode, ended.stdout
