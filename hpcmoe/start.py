"""What must stand before a program's first slow import: three open standard files, an end of one line by a signal."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType

from hpcmoe.interrupts import TERMINATION_SIGNALS, Interrupted, ignore_signals, list_not_ignored
from hpcmoe.output import DRAIN_SECONDS, print_to_stderr

HYDRA_KEY = "MPI_LOCALNRANKS"  # of MPICH's launcher and its kin alone
_WAIT_FOR_ROOT_SECONDS = 1.0  # for rank 0, which may have had the signal too, to speak for all
RANK_KEYS = (  # of launchers, those within others first; MPI has not begun
    *("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"),
    *("FLUX_TASK_RANK", "PALS_RANKID", "SLURM_PROCID"),
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


def find_rank(environ: Mapping[str, str]) -> str:
    """Find the number that a launcher gives this process, 0 where there is none."""
    keys = (*RANK_KEYS, "RANK") if "LOCAL_RANK" in environ else RANK_KEYS  # torchrun's
    return next((environ[key].strip() for key in keys if key in environ), "0")


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """End this process and its job at once: they have begun nothing yet."""
    ignore_signals()
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
