"""The MPI library under mpi4py: one line where it cannot be loaded, a build where the wheel does not fit.

PyPI's wheel of mpi4py loads a libmpi.so.12 (MPICH's ABI) or libmpi.so.40 (Open MPI). `python -m hpcmoe.mpi_library`,
which `make MPI=system` runs, starts two ranks by the mpirun on the PATH; unless they meet, it has pip build mpi4py from
source for that MPI. Its arguments go to pip.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from hpcmoe.output import EXIT_USER, exit_with_line, print_to_stderr
from hpcmoe.segments import clear_segments
from hpcmoe.start import find_host, find_launcher_process, find_rank
from hpcmoe.watch import start_watch

_NUMBERS = ("PMI_RANK", "PMI_SIZE", "PMI_FD")  # that MPICH reads as it starts, and aborts where they are none
_START_SECONDS = 60.0  # for two ranks to start
_PROGRAM = "import os; from mpi4py import MPI; os.write(1, b'size %d\\n' % MPI.COMM_WORLD.size)"
BUILD = ("--no-binary", "mpi4py", "--no-cache-dir", "--force-reinstall", "--no-deps", "mpi4py")
_CFLAGS = "-O1 -g0"  # thin wrappers, which take minutes to optimise; the user's own flags come after it


def import_mpi() -> ModuleType:
    """Import mpi4py's MPI, which starts it, and the watch over the ranks -> that module.

    Exits with one line where it cannot be imported. Collective over MPI's world.
    """
    clear_segments()
    if line := find_bad_variable(os.environ):
        exit_with_line(line, is_first=True)

    # Start MPI, which mpi4py else does at its import; check_launcher reports what mpi4py would warn of.
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI

        with hide_pmix(MPI.Get_library_version(), os.environ), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
            if not MPI.Is_initialized():  # python -m mpi4py has
                MPI.Init_thread()
            start_watch(
                MPI.COMM_WORLD, find_host(os.environ) or MPI.Get_processor_name(), find_launcher_process(os.environ)
            )
    except (ImportError, RuntimeError, OSError) as error:
        exit_with_line(describe_error(error), find_rank(os.environ) == "0")
    sys.excepthook = abort_after(sys.excepthook, MPI.COMM_WORLD)
    return MPI


def abort_after(report: Callable, comm: Any) -> Callable:
    """Return a hook for errors outside the program, such as an import's on one rank: it reports, and ends all ranks.

    Python would finalize MPI, which waits for the others, as they wait for this rank.
    """

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        if issubclass(kind, Exception):
            sys.stderr.flush()
            comm.Abort(1)

    return end


def find_bad_variable(environ: Mapping[str, str]) -> str | None:
    """Find a variable of a launcher that is no number where an MPI wants one -> what is wrong, as one line, or None."""
    for name in _NUMBERS:
        text = environ.get(name, "").strip()
        if text and not (text.isascii() and text.isdecimal()):
            return f"the environment's {name} = {text[:40]!r}: must be a whole number; whoever starts the run sets it"
    return None


@contextlib.contextmanager
def hide_pmix(library: str, environ: MutableMapping[str, str]) -> Iterator[None]:
    """Hide a PMIx launcher in the block from an MPICH without PMIx, which would abort: it starts alone instead.

    Where a launcher within that one uses PMI, as mpirun in a task of srun --mpi=pmix, it starts by that.
    """
    is_without_pmix = library.startswith("MPICH Version") and "pmix" not in library.lower()
    hidden = {name: environ.pop(name) for name in list(environ) if is_without_pmix and name.startswith("PMIX_")}
    try:
        yield
    finally:
        environ.update(hidden)


def describe_error(error: BaseException) -> str:
    """Format why mpi4py's MPI cannot be imported, and the command that corrects it, as one line."""
    if isinstance(error, ModuleNotFoundError):
        return describe_missing(error)
    reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"mpi4py cannot load an MPI library: {reason}; {describe_cure()}"


def describe_missing(error: ModuleNotFoundError) -> str:
    """Format that a package is missing, as where the environment is not active, and the remedy."""
    packages = "mpi4py mpich" if error.name == "mpi4py" else error.name
    return (
        f"{error.name} is not installed in {sys.prefix}: activate hpcmoe's environment (source .venv/bin/activate), "
        f"or {sys.executable} -m pip install {packages}"
    )


def describe_start() -> str:
    """Name the mpirun that starts this environment's ranks, or the command that makes another one start them."""
    mpirun = Path(sys.prefix, "bin", "mpirun")
    if mpirun.is_file():
        return f"start with {mpirun}"
    return f"start with the mpirun of that MPI, or {describe_cure()}"


def describe_cure() -> str:
    """Name the command that gives mpi4py an MPI: a build for the mpirun on the PATH, else PyPI's MPICH."""
    pip = f"{sys.executable} -m pip install"
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        return f"no mpirun is on the PATH either: {pip} mpich, or load or install an MPI"
    build = f"{pip} {' '.join(BUILD)}"
    missing = find_missing_tools()
    needed = f"install {', '.join(missing)}, then " if missing else ""
    return f"build mpi4py for the MPI of {mpirun}: {needed}{build}"


def find_missing_tools() -> list[str]:
    """List what is missing for a build of mpi4py, each with Debian's package."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    found = {
        "mpicc (Debian: libmpich-dev or libopenmpi-dev)": find_mpicc() is not None,
        "Python.h (Debian: python3-dev)": header.is_file(),
        "a C compiler (Debian: gcc)": shutil.which("cc") or shutil.which("gcc"),
    }
    return [name for name, is_found in found.items() if not is_found]


def find_mpicc() -> str | None:
    """Find the mpicc to build with: what MPICC names, else the one beside the mpirun on the PATH, else any."""
    if os.environ.get("MPICC"):
        return os.environ["MPICC"]
    mpirun = shutil.which("mpirun")
    beside = mpirun and shutil.which("mpicc", path=str(Path(mpirun).parent))
    return beside or shutil.which("mpicc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make mpi4py fit the mpirun on the PATH -> exit status."""
    error = build_if_needed(sys.argv[1:] if arguments is None else arguments)
    if error is not None:
        print_to_stderr([f"hpcmoe: {error}"])
    return 0 if error is None else EXIT_USER


def build_if_needed(arguments: Sequence[str]) -> str | None:
    """Build mpi4py unless two ranks start together -> what is wrong, as one line, or None."""
    error = check_ranks()
    if error is None:
        return None
    if missing := find_missing_tools():
        return f"{error}; to build mpi4py for that MPI, install {', '.join(missing)}"
    print_to_stderr([f"hpcmoe: {error}: building mpi4py from source with {find_mpicc()}, some minutes"])
    if build(arguments) != 0:
        return "mpi4py could not be built: see pip's lines above"
    error = check_ranks()
    return error and f"{error}, though mpi4py was built with {find_mpicc()}: are they of one MPI?"


def build(arguments: Sequence[str]) -> int:
    """Build and install mpi4py by pip for the MPI on the PATH, with more of pip's arguments -> its status."""
    flags = f"{_CFLAGS} {os.environ.get('CFLAGS', '')}".strip()
    environment = {**os.environ, "MPICC": find_mpicc() or "", "CFLAGS": flags}
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments, *BUILD]
    return subprocess.run(command, env=environment).returncode


def check_ranks() -> str | None:
    """Start two ranks by the mpirun on the PATH -> what is wrong, or None where each sees a world of two."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return "no mpirun is on the PATH"

    # Start them.
    command = [mpirun, "-n", "2", sys.executable, "-c", _PROGRAM]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        return f"two ranks by {mpirun} have not ended after {_START_SECONDS:.0f} s"

    # Compare the sizes of their worlds; without any, find the line that names the error.
    sizes = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("size ")]
    if sizes == ["2", "2"]:
        return None
    if sizes:
        return f"two ranks by {mpirun} see worlds of {', '.join(sizes)}: mpi4py has loaded another MPI's library"
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()] or [f"status {ended.returncode}"]
    cause = next((line for line in lines if "Error: " in line), lines[-1])
    return f"two ranks by {mpirun} do not start: {cause}"


if __name__ == "__main__":
    sys.exit(main())
