"""Who started the ranks: what a launcher says of them, against what MPI sees."""

import time
from dataclasses import dataclass

from mpi4py import MPI

from hpcmoe.environment import is_set, read_environment, read_number, read_setting
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.mpi_library import describe_start
from hpcmoe.output import DRAIN_SECONDS
from hpcmoe.start import find_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """A launcher by the variables that it gives each process it starts."""

    name: str
    sizes: tuple[str, ...] = ()  # how many processes there are
    rank: str = ""  # this one's number, which tells how many there are at least
    needs: tuple[str, ...] = ()  # what must be there too: others set some of its variables for other ends
    speaks_mpi: bool = False  # what it starts is MPI's world, and what another launcher said before it is of no account
    instead: str = "{start}; under Slurm by its srun --mpi type"  # how to start


LAUNCHERS = (
    Launcher(name="mpirun or srun by PMI", sizes=("PMI_SIZE",), speaks_mpi=True),
    Launcher(name="mpirun of Open MPI", sizes=("OMPI_COMM_WORLD_SIZE",), speaks_mpi=True),
    Launcher(name="MVAPICH", sizes=("MV2_COMM_WORLD_SIZE",), speaks_mpi=True),
    Launcher(name="jsrun", sizes=("JSM_NAMESPACE_SIZE",), rank="JSM_NAMESPACE_RANK", speaks_mpi=True),
    Launcher(
        name="torchrun",
        sizes=("WORLD_SIZE",),
        needs=("RANK", "LOCAL_RANK"),
        instead="torchrun starts processes, not MPI ranks: start with mpirun -n {size} python -m hpcmoe.main, or srun",
    ),
    Launcher(
        name="Flux",
        sizes=("FLUX_JOB_SIZE",),
        needs=("FLUX_TASK_RANK",),
        instead="{start}; or with flux run -o pmi=simple",
    ),
    Launcher(name="PALS", sizes=("PALS_SIZE", "PALS_LOCAL_SIZE"), rank="PALS_RANKID"),
    Launcher(name="PMIx", rank="PMIX_RANK"),
    Launcher(name="ALPS", rank="ALPS_APP_PE"),
    Launcher(name="Horovod", sizes=("HOROVOD_SIZE",)),
    Launcher(name="Platform MPI", sizes=("MPI_NRANKS",), rank="MPI_RANKID"),
    # SLURM_NTASKS is the whole job's, in a batch script too; only srun's own tasks have a step, and its count.
    Launcher(name="srun", sizes=("SLURM_STEP_NUM_TASKS",), needs=("SLURM_PROCID", "SLURM_STEP_ID")),
)
ANOTHER = "_COMM_WORLD_SIZE"  # how the size of a world ends by the name of an MPI that is not listed
MOST_PROCESSES = 2**31 - 1  # PMIx numbers what is no rank from there on


def check_launcher(comm):
    """Refuse ranks that a launcher started as one job but whose MPI sees fewer of them: two MPIs are mixed."""
    on_root(comm, lambda: speak_for_all(read_environment(), comm.size))


def speak_for_all(environ, size):
    """Refuse mixed MPIs in one line: each rank is the first of a world of its own, and the launcher's first has it."""
    try:
        refuse_mixed_mpi(environ, size)
    except ClusterError:
        if find_rank(environ) == "0":
            raise
        time.sleep(DRAIN_SECONDS)  # mpirun ends the others at the first exit
        raise ClusterError from None


def refuse_mixed_mpi(environ, size=1):
    """Raise ClusterError when a launcher's variables tell a process in a world of `size` of more processes."""
    key, launched = find_launched(environ)
    if launched <= size or (size > 1 and size in read_told(environ).values()):  # one of several launchers is MPI's
        return
    name, version = MPI.get_vendor()
    library = f"{name} {'.'.join(map(str, version))}"
    launcher = next(launcher for launcher in list_launchers(environ) if key in (*launcher.sizes, launcher.rank))
    least = "" if key in launcher.sizes else f", of at least {launched} processes"
    cure = launcher.instead.format(size=launched, start=describe_start())
    raise ClusterError(
        f"two MPIs are mixed: the launcher says {key} = {read_setting(key, environ)} ({launcher.name}){least}, "
        f"but mpi4py's MPI ({library}) sees {size} rank{'s' * (size > 1)}; {cure}"
    )


def find_launched(environ):
    """Find how many processes a launcher has started as one job -> (the variable that tells, or "", their number).

    Raises ClusterError where the variable holds no number.
    """
    return max(read_told(environ).items(), key=lambda told: told[1], default=("", 1))


def read_told(environ):
    """Read what the launchers say: MPI's own if there is one, else all others -> dict variable: processes."""
    told = {}
    for speaks_mpi in (True, False):
        for launcher in list_launchers(environ):
            if launcher.speaks_mpi is speaks_mpi and all(is_set(key, environ) for key in launcher.needs):
                told |= read_launcher(launcher, environ)
        if told:
            break
    return told


def list_launchers(environ):
    """List the known launchers, and those of other MPIs that name the size of their world as Open MPI does."""
    known = {key for launcher in LAUNCHERS for key in launcher.sizes}
    others = sorted(key for key in environ if key.endswith(ANOTHER) and key not in known)
    return [*LAUNCHERS, *(Launcher(name="another MPI's launcher", sizes=(key,), speaks_mpi=True) for key in others)]


def read_launcher(launcher, environ):
    """Read what one launcher says -> dict variable: processes, or as many as its rank needs at least."""
    told = {}
    for key in launcher.sizes:
        if read_setting(key, environ):
            told[key] = read_number(key, environ=environ)
    if launcher.rank and read_setting(launcher.rank, environ):
        rank = read_number(launcher.rank, environ=environ)
        told |= {launcher.rank: rank + 1} if 0 < rank < MOST_PROCESSES else {}
    return told


def find_launcher():
    """Say who started this rank, from what it has left in the environment -> text."""
    environ = read_environment()
    job = read_setting("SLURM_JOB_ID", environ)
    slurm = f"Slurm, job {job}" if job else "no Slurm"
    seen = [launcher.name for launcher in list_launchers(environ) if is_started_by(launcher, environ)]
    return f"{seen[0] if seen else 'none: a process alone'}; {slurm}"


def is_started_by(launcher, environ):
    """Return True if a launcher's variables are there."""
    keys = (*launcher.sizes, *([launcher.rank] if launcher.rank else []))
    return any(is_set(key, environ) for key in keys) and all(is_set(key, environ) for key in launcher.needs)
