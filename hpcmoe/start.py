"""What must stand before a program's first slow import: three open standard files, an end of one line by a signal."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from hpcmoe.interrupts import TERMINATION_SIGNALS, Interrupted, ignore_signals, list_not_ignored
from hpcmoe.output import DRAIN_SECONDS, print_to_stderr
from hpcmoe.watch import find_watch

HYDRA_KEY = "MPI_LOCALNRANKS"  # of MPICH's launcher and its kin alone
_WAIT_FOR_ROOT_SECONDS = 1.0  # for rank 0, which may have had the signal too, to speak for all


class Launcher(NamedTuple):
    """A launcher by the variables that it gives each process it starts."""

    name: str
    rank: str = ""  # this process's number
    sizes: tuple[str, ...] = ()  # how many processes there are
    counts_by_rank: bool = False  # the number tells how many there are at least, where sizes may not
    needs: tuple[str, ...] = ()  # what must be there too: others set some of its variables for other ends
    starts_mpi: bool = False  # what it starts is MPI's world, and what another launcher said before it is of no account
    instead: str = "{start}; under Slurm by its srun --mpi type"  # how to start

    def has_needs(self, environ: Mapping[str, str]) -> bool:
        """Return True if all that it needs is there."""
        return all(key in environ for key in self.needs)


LAUNCHERS = (  # those within others first
    Launcher("mpirun or srun by PMI", "PMI_RANK", ("PMI_SIZE",), starts_mpi=True),
    Launcher("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), starts_mpi=True),
    Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), starts_mpi=True),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",), counts_by_rank=True, starts_mpi=True),
    Launcher(
        "torchrun",
        "RANK",
        ("WORLD_SIZE",),
        needs=("RANK", "LOCAL_RANK"),
        instead="torchrun starts processes, not MPI ranks: start with mpirun -n {size} python -m hpcmoe.main, or srun",
    ),
    Launcher(
        "Flux",
        "FLUX_TASK_RANK",
        ("FLUX_JOB_SIZE",),
        needs=("FLUX_TASK_RANK",),
        instead="{start}; or with flux run -o pmi=simple",
    ),
    Launcher("PALS", "PALS_RANKID", ("PALS_SIZE", "PALS_LOCAL_SIZE"), counts_by_rank=True),
    Launcher("PMIx", "PMIX_RANK", counts_by_rank=True),
    Launcher("ALPS", "ALPS_APP_PE", counts_by_rank=True),
    Launcher("Horovod", "HOROVOD_RANK", ("HOROVOD_SIZE",)),
    Launcher("Platform MPI", "MPI_RANKID", ("MPI_NRANKS",), counts_by_rank=True),
    # SLURM_NTASKS is the whole job's, in a batch script too; only srun's own tasks have a step, and its count.
    Launcher("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS",), needs=("SLURM_PROCID", "SLURM_STEP_ID")),
)


def prepare_process() -> None:
    """Prepare the process for the imports of a program. Call once, as the first thing."""
    open_standard_files()
    for number in {signal.SIGINT, *list_not_ignored(*TERMINATION_SIGNALS)}:
        signal.signal(number, exit_on_signal)


def open_standard_files() -> None:
    """Open those of the files 0, 1 and 2 that are closed: else the next file to be opened gets what others print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def find_host(environ: Mapping[str, str]) -> str:
    """Return what the launcher calls this rank's node, else Slurm, "" where neither says anything."""
    # mpirun's proxy sets its own for each node, so that it is right where Slurm's was only handed on.
    return environ.get("PMI_HOSTNAME", "").strip() or environ.get("SLURMD_NODENAME", "").strip()


def find_rank(environ: Mapping[str, str]) -> str:
    """Return the number that a launcher gives this process, 0 where none says anything; MPI has not begun."""
    keys = (launcher.rank for launcher in LAUNCHERS if launcher.has_needs(environ))
    return next((environ[key].strip() for key in keys if key in environ), "0")


def find_launcher_process(environ: Mapping[str, str], processes: Path = Path("/proc")) -> int | None:
    """Find the process that has started this rank: the first above it that is no rank's, such as mpirun's proxy.

    Between them may be others, such as a shell's script. None without a launcher, or where its process is out of sight.
    """
    keys = [launcher.rank for launcher in LAUNCHERS if launcher.has_needs(environ) and launcher.rank in environ]
    pid = os.getppid()
    while keys and pid > 1 and is_given(processes / str(pid), keys):
        pid = int((processes / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return pid if keys and pid > 1 else None


def is_given(process: Path, keys: Sequence[str]) -> bool:
    """Return True if a process was started with one of some variables; another user's, as of Slurm, was not."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.partition(b"=")[0].decode(errors="replace") in keys for variable in variables)


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """End this process and its job at once: they have begun nothing yet."""
    ignore_signals()
    find_watch().stop()
    ending = Interrupted(number)
    rank = find_rank(os.environ)
    if rank == "0":
        print_to_stderr([f"hpcmoe: {ending}"])
    else:
        time.sleep(_WAIT_FOR_ROOT_SECONDS)
        print_to_stderr([f"[rank {rank}, {os.uname().nodename}] {ending}"])
    time.sleep(DRAIN_SECONDS)
    abort_job(ending.status)
    os._exit(ending.status)


def abort_job(status: int) -> None:
    """Abort all ranks of a Hydra job: in MPI's start they would wait for one that has ended before its own."""
    if HYDRA_KEY in os.environ and "PMI_FD" in os.environ:
        with contextlib.suppress(OSError, ValueError):
            os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=%d\n" % status)  # PMI-1
            time.sleep(DRAIN_SECONDS)
