"""The MPI library under mpi4py: one line where it cannot be loaded, a build where the wheel does not fit.

PyPI's wheel of mpi4py loads a libmpi.so.12 (MPICH's ABI) or libmpi.so.40 (Open MPI). `python -m hpcmoe.mpi_library`,
which `make MPI=system` runs, starts two ranks by the mpirun on the PATH; unless they meet, it has pip build mpi4py from
source for that MPI. Its arguments go to pip.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings

from hpcmoe.output import DRAIN_SECONDS, EXIT_USER, print_to_stderr
from hpcmoe.segments import clear_segments
from hpcmoe.start import find_rank

NUMBERS = ("PMI_RANK", "PMI_SIZE", "PMI_FD")  # that MPICH reads as it starts, and aborts where they are none
START_SECONDS = 60.0  # for two ranks to start
TRIAL = "import os; from mpi4py import MPI; os.write(1, b'size %d\\n' % MPI.COMM_WORLD.size)"
BUILD = ("--no-binary", "mpi4py", "--no-cache-dir", "--force-reinstall", "--no-deps", "mpi4py")
CFLAGS = "-O1 -g0"  # thin wrappers, whose optimising takes minutes; what the user has set comes after it


def import_mpi():
    """Clear MPI's way and import mpi4py's MPI, which starts it -> that; leave with one line where it cannot be."""
    clear_segments()
    error = find_bad_variable(os.environ)
    if error is not None:
        exit_with_line(error, is_first=True)
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI

        with hide_pmix(MPI.Get_library_version(), os.environ), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="suspicious MPI execution environment")  # check_launcher says it
            if not MPI.Is_initialized():  # python -m mpi4py has
                MPI.Init_thread()
    except (ImportError, RuntimeError, OSError) as error:
        exit_with_line(describe_error(error), find_rank(os.environ) == "0")
    return MPI


def find_bad_variable(environ) -> str | None:
    """Find a variable of a launcher that is no number where an MPI wants one -> what is wrong, as one line, or None."""
    for name in NUMBERS:
        text = environ.get(name, "").strip()
        if text and not (text.isascii() and text.isdecimal()):
            return f"the environment's {name} = {text[:40]!r}: must be a whole number; whoever starts the run sets it"
    return None


@contextlib.contextmanager
def hide_pmix(library: str, environ):
    """Within, hide a PMIx launcher from an MPICH that does not speak PMIx, and would abort: it starts alone instead.

    Where a launcher within that one speaks PMI, as mpirun in a task of srun --mpi=pmix, it starts by that.
    """
    is_deaf = library.startswith("MPICH Version") and "pmix" not in library.lower()
    hidden = {name: environ.pop(name) for name in list(environ) if is_deaf and name.startswith("PMIX_")}
    try:
        yield
    finally:
        environ.update(hidden)


def exit_with_line(line: str, is_first: bool):
    """End this process with status 2; the first of the ranks writes the line, the others give it time to come out."""
    if is_first:
        print_to_stderr([f"hpcmoe: {line}"])
    else:
        time.sleep(DRAIN_SECONDS)
    sys.exit(EXIT_USER)


def describe_error(error: BaseException) -> str:
    """Format why mpi4py's MPI cannot be imported, and the command that mends it, as one line."""
    if isinstance(error, ModuleNotFoundError):
        return describe_missing(error)
    reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"mpi4py cannot load an MPI library: {reason}; {describe_cure()}"


def describe_missing(error: ModuleNotFoundError) -> str:
    """Format that a package is missing, which tells of an environment that is not active, and what mends it."""
    packages = "mpi4py mpich" if error.name == "mpi4py" else error.name
    return (
        f"{error.name} is not installed in {sys.prefix}: activate hpcmoe's environment (source .venv/bin/activate), "
        f"or {sys.executable} -m pip install {packages}"
    )


def describe_start() -> str:
    """Name the mpirun that starts this environment's ranks, or what makes another do."""
    mpirun = pathlib.Path(sys.prefix, "bin", "mpirun")
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
    """List what a build of mpi4py lacks, each with Debian's package."""
    header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    checks = (
        (find_mpicc() is not None, "mpicc (Debian: libmpich-dev or libopenmpi-dev)"),
        (header.is_file(), "Python.h (Debian: python3-dev)"),
        (shutil.which("cc") or shutil.which("gcc"), "a C compiler (Debian: gcc)"),
    )
    return [name for is_there, name in checks if not is_there]


def find_mpicc() -> str | None:
    """Find the mpicc to build with: what MPICC names, else the one beside the mpirun on the PATH, else any."""
    if os.environ.get("MPICC"):
        return os.environ["MPICC"]
    mpirun = shutil.which("mpirun")
    beside = mpirun and shutil.which("mpicc", path=str(pathlib.Path(mpirun).parent))
    return beside or shutil.which("mpicc")


def main(words=None) -> int:
    """Make mpi4py fit the mpirun on the PATH -> exit status."""
    error = check_ranks()
    if error is None:
        return 0
    missing = find_missing_tools()
    if missing:
        print_to_stderr([f"hpcmoe: {error}; to build mpi4py for that MPI, install {', '.join(missing)}"])
        return EXIT_USER
    print_to_stderr([f"hpcmoe: {error}: building mpi4py from source with {find_mpicc()}, some minutes"])
    if build(sys.argv[1:] if words is None else words) != 0:
        print_to_stderr(["hpcmoe: mpi4py could not be built: see pip's lines above"])
        return EXIT_USER
    error = check_ranks()
    if error is not None:
        print_to_stderr([f"hpcmoe: {error}, though mpi4py was built with {find_mpicc()}: are they of one MPI?"])
        return EXIT_USER
    return 0


def build(words) -> int:
    """Have pip build and install mpi4py for the MPI on the PATH, with more of pip's arguments -> its status."""
    environment = {**os.environ, "MPICC": find_mpicc(), "CFLAGS": f"{CFLAGS} {os.environ.get('CFLAGS', '')}".strip()}
    command = [sys.executable, "-m", "pip", "install", "--quiet", *words, *BUILD]
    return subprocess.run(command, env=environment).returncode


def check_ranks() -> str | None:
    """Start two ranks by the mpirun on the PATH -> what is wrong, or None when each sees a world of two."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return "no mpirun is on the PATH"
    command = [mpirun, "-n", "2", sys.executable, "-c", TRIAL]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        return f"two ranks by {mpirun} have not ended after {START_SECONDS:.0f} s"
    sizes = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("size ")]
    if sizes == ["2", "2"]:
        return None
    if sizes:
        return f"two ranks by {mpirun} see worlds of {', '.join(sizes)}: mpi4py has loaded another MPI's library"
    said = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    cause = next((line for line in said if "Error: " in line), said[-1] if said else f"status {ended.returncode}")
    return f"two ranks by {mpirun} do not start: {cause}"


if __name__ == "__main__":
    sys.exit(main())
