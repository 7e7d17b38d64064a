"""What must stand before a program's first slow import: three open standard files, an end of one line by a signal."""

import os
import signal
import sys
import time

from hpcmoe.interrupts import CAUGHT, Interrupted, ignore_signals
from hpcmoe.output import HAND_ON_SECONDS, say

HEED_SECONDS = 1.0  # for rank 0, which may have had the signal too, to speak for all
RANK_KEYS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # of launchers; MPI has not begun


def prepare() -> None:
    """Prepare the process for the imports of a program. Call once, as the first thing."""
    open_standard_files()
    for number in CAUGHT:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave)


def open_standard_files() -> None:
    """Open those of the files 0, 1 and 2 that are closed: else a file that is opened next takes what others print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def leave(number: int, _) -> None:
    """End this process at once: it has begun nothing yet."""
    ignore_signals()
    ending = Interrupted(number)
    rank = next((os.environ[key] for key in RANK_KEYS if key in os.environ), "0")
    if rank == "0":
        say([f"hpcmoe: {ending}"])
    elif number != signal.SIGINT:  # Ctrl-C reaches all; another signal may reach this one alone
        time.sleep(HEED_SECONDS)
        say([f"[rank {rank}, {os.uname().nodename}] {ending}"])
    time.sleep(HAND_ON_SECONDS)
    os._exit(ending.status)
