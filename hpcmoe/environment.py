"""Variables that users, launchers and schedulers set: the one place where they are read, each as what it should be."""

import os
import re
from collections.abc import Mapping

from hpcmoe.errors import ClusterError

_MOST_DIGITS = 15  # of a number that anybody sets: 10^15 megabytes are more than any machine has
_POWER_OF_UNIT = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40, "P": 50}  # Slurm's: a number alone is megabytes
NCCL_SHARES = "NCCL_MULTI_RANK_GPU_ENABLE"  # 1: NCCL 2.30 and later may run several ranks on one GPU
NCCL_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"  # 1: several communicators may be busy at once, in the order of the calls
SUPERVISOR = "HPCMOE_SUPERVISOR"  # a word of its own, which a supervisor of restarts gives all ranks that it starts
_UCX_CUDA = {"all", "cuda", "cuda_copy"}  # UCX's names for what distinguishes a GPU's memory


def read_environment() -> Mapping[str, str]:
    """Read all variables of this process -> mapping from name to text."""
    return os.environ


def read_setting(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Read what a user, a module or a launcher has set -> text, "" where nothing."""
    return environ.get(name, "").strip()


def is_set(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return True if a variable is there, be it empty."""
    return name in environ


def read_number(
    name: str, default: int = 0, most: int = 10**_MOST_DIGITS - 1, environ: Mapping[str, str] = os.environ
) -> int:
    """Read a whole number of 0 to `most`, `default` where there is none; raise ClusterError that names the variable."""
    text = read_setting(name, environ)
    if not text:
        return default
    if not is_natural(text) or int(text) > most:
        raise wrong(name, text, f"a whole number of 0 to {most}")
    return int(text)


def read_memory(name: str, environ: Mapping[str, str] = os.environ) -> int:
    """Read memory as Slurm writes it, 4096M, 16G, 1T, or megabytes alone -> bytes, 0 where there is none."""
    text = read_setting(name, environ)
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not text:
        return 0
    if not is_natural(digits) or unit not in _POWER_OF_UNIT:
        raise wrong(name, text, "megabytes, or a whole number with K, M, G, T or P behind it")
    return int(digits) << _POWER_OF_UNIT[unit]


def read_counts(name: str, environ: Mapping[str, str] = os.environ) -> list[int]:
    """Read a number for each node, repeated as Slurm does, 72(x2),36 -> [72, 72, 36]; [] where there is none."""
    text, counts = read_setting(name, environ), []
    for entry in text.split(",") if text else []:
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", entry.strip())
        if match is None:
            raise wrong(name, text, "a number for each node, such as 72(x2),36")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def is_natural(text: str) -> bool:
    """Return True if a text is digits alone, few enough for a number that anybody means."""
    return re.fullmatch(f"[0-9]{{1,{_MOST_DIGITS}}}", text) is not None


def wrong(name: str, text: str, allowed: str) -> ClusterError:
    """Make the error of a variable: its name, its value and what is allowed."""
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return ClusterError(f"the environment's {name} = {shown!r}: must be {allowed}; whoever starts the run sets it")


def environment_without(*names: str) -> dict[str, str]:
    """Copy this process's variables but for some, for a command that it starts."""
    return {name: text for name, text in os.environ.items() if name not in names}


def may_share_gpus() -> bool:
    """Return True if the environment lets NCCL run several ranks on one GPU."""
    return read_setting(NCCL_SHARES) == "1"


def keep_nccl_order() -> None:
    """Set NCCL to launch what several communicators do in the order of the calls, where the user has not."""
    os.environ.setdefault(NCCL_ORDER, "1")


def find_ucx_obstacle(mpi_name: str, netmod: str) -> str:
    """Return what keeps UCX from carrying all messages of an MPI, a GPU's too, in a few words; "" where nothing does.

    netmod: the network module that an MPICH takes by itself.
    """
    # UCX must know CUDA.
    for key in ("UCX_TLS", "MPI_UCX_TLS"):
        transports = read_setting(key)
        if transports and not knows_cuda(transports):
            return f"{key}={transports} leaves out cuda_copy"

    # MPI must leave it all messages.
    match mpi_name:
        case "Open MPI":
            key, value = "OMPI_MCA_pml", "ucx"
        case "MPICH":
            netmod = read_setting("MPIR_CVAR_CH4_NETMOD") or netmod
            if netmod != "ucx":
                return f"MPICH goes by {netmod or 'another way'}"
            key, value = "MPIR_CVAR_NOLOCAL", "1"  # else ranks of a node share memory, which is the host's
        case _:
            return f"what {mpi_name} leaves to it is not known"
    return "" if read_setting(key) == value else f"{mpi_name} leaves all messages to it only with {key}={value}"


def knows_cuda(transports: str) -> bool:
    """Return True if a list of UCX's transports, or with ^ of those left out, leaves one that knows a GPU's memory."""
    return transports.startswith("^") == _UCX_CUDA.isdisjoint(transports.removeprefix("^").split(","))


def find_job() -> tuple[str, str]:
    """Find the Slurm job that this process is part of -> (its number, how often it was requeued), empty without one."""
    return read_setting("SLURM_JOB_ID"), read_setting("SLURM_RESTART_COUNT")


def is_dumb_terminal() -> bool:
    """Return True if the terminal cannot move its cursor, as TERM says."""
    return os.environ.get("TERM") == "dumb"
