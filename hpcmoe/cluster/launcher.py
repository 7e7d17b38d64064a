"""Who started the ranks: a launcher's variables against what MPI sees."""

import time
from collections.abc import Mapping

from mpi4py import MPI

from hpcmoe.environment import is_set, read_environment, read_number, read_setting
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.mpi_library import describe_start
from hpcmoe.output import DRAIN_SECONDS
from hpcmoe.start import LAUNCHERS, Launcher, find_rank

_ANOTHER = "_COMM_WORLD_SIZE"  # how the size of a world ends by the name of an MPI that is not listed
_MAX_PROCESSES = 2**31 - 1  # PMIx numbers what is no rank from there on


def check_launcher(comm: MPI.Comm) -> None:
    """Raise ClusterError where a launcher started more ranks as one job than MPI sees: two MPIs are mixed.

    Collective over comm.
    """
    on_root(comm, lambda: reject_mixed_mpi_once(read_environment(), comm.size))


def reject_mixed_mpi_once(environ: Mapping[str, str], size: int) -> None:
    """Reject mixed MPIs in one line: each rank is the first of a world of its own, and the launcher's first has it."""
    try:
        reject_mixed_mpi(environ, size)
    except ClusterError:
        if find_rank(environ) == "0":
            raise
        time.sleep(DRAIN_SECONDS)  # mpirun ends the others at the first exit
        raise ClusterError from None


def reject_mixed_mpi(environ: Mapping[str, str], size: int = 1) -> None:
    """Raise ClusterError when a launcher's variables tell a process in a world of `size` of more processes."""
    # One of several launchers is MPI's.
    key, launched = find_launched(environ)
    if launched <= size or (size > 1 and size in read_counts_of_launchers(environ).values()):
        return

    # Name the variable, and how to start instead.
    name, version = MPI.get_vendor()
    library = f"{name} {'.'.join(map(str, version))}"
    launcher = next(launcher for launcher in list_launchers(environ) if key in (*launcher.sizes, launcher.rank))
    least = "" if key in launcher.sizes else f", of at least {launched} processes"
    cure = launcher.instead.format(size=launched, start=describe_start())
    raise ClusterError(
        f"two MPIs are mixed: the launcher says {key} = {read_setting(key, environ)} ({launcher.name}){least}, "
        f"but mpi4py's MPI ({library}) sees {size} rank{'s' * (size > 1)}; {cure}"
    )


def find_launched(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return how many processes a launcher has started as one job -> (the variable, or "", their number).

    Raises ClusterError where the variable holds no number.
    """
    return max(read_counts_of_launchers(environ).items(), key=lambda count: count[1], default=("", 1))


def read_counts_of_launchers(environ: Mapping[str, str]) -> dict[str, int]:
    """Return how many processes the launchers have started, MPI's own if there is one, else all others, by variable."""
    counts: dict[str, int] = {}
    for starts_mpi in (True, False):
        for launcher in list_launchers(environ):
            if launcher.starts_mpi is starts_mpi and launcher.has_needs(environ):
                counts |= read_counts_of(launcher, environ)
        if counts:
            break
    return counts


def list_launchers(environ: Mapping[str, str]) -> list[Launcher]:
    """Return the known launchers, and those of other MPIs that name the size of their world as Open MPI does."""
    known = {key for launcher in LAUNCHERS for key in launcher.sizes}
    others = sorted(key for key in environ if key.endswith(_ANOTHER) and key not in known)
    return [*LAUNCHERS, *(Launcher(name="another MPI's launcher", sizes=(key,), starts_mpi=True) for key in others)]


def read_counts_of(launcher: Launcher, environ: Mapping[str, str]) -> dict[str, int]:
    """Return how many processes one launcher has started, or as many as its rank needs at least, by variable."""
    counts = {key: read_number(key, environ=environ) for key in launcher.sizes if read_setting(key, environ)}
    if launcher.counts_by_rank and read_setting(launcher.rank, environ):
        rank = read_number(launcher.rank, environ=environ)
        counts |= {launcher.rank: rank + 1} if 0 < rank < _MAX_PROCESSES else {}
    return counts


def describe_launcher() -> str:
    """Format who started this rank, from what it has left in the environment."""
    environ = read_environment()
    job = read_setting("SLURM_JOB_ID", environ)
    slurm = f"Slurm, job {job}" if job else "no Slurm"
    seen = [launcher.name for launcher in list_launchers(environ) if is_started_by(launcher, environ)]
    return f"{seen[0] if seen else 'none: a process alone'}; {slurm}"


def is_started_by(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    """Return True if a launcher's variables are there."""
    keys = (*launcher.sizes, *([launcher.rank] if launcher.counts_by_rank else []))
    return any(is_set(key, environ) for key in keys) and launcher.has_needs(environ)
