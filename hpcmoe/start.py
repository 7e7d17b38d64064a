"""What must stand before a program's first slow import: three open standard files, and an end of one line at Ctrl-C."""

import os
import signal
import sys
import time

from hpcmoe.interrupts import ignore_signals
from hpcmoe.output import HAND_ON_SECONDS, say

RANK_KEYS = (  # of launchers, those within others first; MPI has not begun
    *("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"),
    *("FLUX_TASK_RANK", "PALS_RANKID", "SLURM_PROCID"),
)


def prepare() -> None:
    """Prepare the process for the imports of a program. Call once, as the first thing."""
    open_standard_files()
    signal.signal(signal.SIGINT, leave)


def open_standard_files() -> None:
    """Open those of the files 0, 1 and 2 that are closed: else a file that is opened next takes what others print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def is_first_rank(environ) -> bool:
    """Return True on the rank that its launcher calls 0, and where no launcher says anything."""
    keys = (*RANK_KEYS, "RANK") if "LOCAL_RANK" in environ else RANK_KEYS  # torchrun's
    return next((environ[key].strip() for key in keys if key in environ), "0") == "0"


def leave(*_) -> None:
    """End this process at once: it has begun nothing yet."""
    ignore_signals()
    if is_first_rank(os.environ):
        say(["hpcmoe: interrupted"])
    time.sleep(HAND_ON_SECONDS)
    os._exit(128 + signal.SIGINT)
