"""Whether messages may lie on a GPU: what the MPI that is loaded says of CUDA's pointers, and what UCX below it can."""

import ctypes
import os
import pathlib
import re

from mpi4py import MPI

from hpcmoe.environment import read_setting

MAPS = pathlib.Path("/proc/self/maps")
KNOWS_CUDA = {"all", "cuda", "cuda_copy"}  # UCX's names for what tells a GPU's memory from the host's


def ask_mpi(comm, maps=MAPS):
    """Ask the MPI that is loaded, then UCX, for CUDA's pointers -> (MPI takes them, UCX does, how they said so).

    Open MPI and MPICH answer by a function of their own; MPI 4.1 lists the kinds of memory on a communicator. One built
    without CUDA hands buffers as they are to UCX, which takes them where it has CUDA and carries all messages.
    """
    takes, how = ask_function(maps) or ask_kinds(comm)
    answer = f"MPI says {'yes' if takes else 'no'} to CUDA pointers ({how})"
    if takes or not loaded_libraries(maps, "libuct_cuda"):
        return takes, False, answer
    why_not = why_not_all_by_ucx(MPI.get_vendor()[0])
    told = f"but {why_not}" if why_not else 'and carries all messages, on which buffers = "direct" relies'
    return False, not why_not, f"{answer}; UCX has CUDA, {told}"


def why_not_all_by_ucx(name):
    """Find what keeps UCX from carrying all messages of an MPI, a GPU's too -> a few words, "" where nothing does."""
    for key in ("UCX_TLS", "MPI_UCX_TLS"):
        transports = read_setting(key)
        if transports and not knows_cuda(transports):
            return f"{key}={transports} leaves out cuda_copy"
    match name:
        case "Open MPI":
            key, value = "OMPI_MCA_pml", "ucx"
        case "MPICH":
            netmod = read_setting("MPIR_CVAR_CH4_NETMOD") or first_netmod(MPI.Get_library_version())
            if netmod != "ucx":
                return f"MPICH goes by {netmod or 'another way'}"
            key, value = "MPIR_CVAR_NOLOCAL", "1"  # else ranks of a node share memory, which is the host's
        case _:
            return f"what {name} leaves to it is not known"
    return "" if read_setting(key) == value else f"{name} leaves all messages to it only with {key}={value}"


def knows_cuda(transports):
    """Whether a list of UCX's transports, or with ^ of those left out, leaves one that knows a GPU's memory."""
    return transports.startswith("^") == KNOWS_CUDA.isdisjoint(transports.removeprefix("^").split(","))


def first_netmod(library_version):
    """Find the way between nodes that an MPICH takes by itself -> "ucx", "ofi" or "", where it does not tell."""
    found = re.search(r"ch4:(\w+)", library_version)
    return found[1] if found else ""


def ask_function(maps):
    """Ask by MPIX_Query_cuda_support -> (bool, its name), None where there is none."""
    for path in loaded_libraries(maps, "libmpi"):
        function = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
        if function is not None:
            return bool(function()), "MPIX_Query_cuda_support"
    return None


def ask_kinds(comm):
    """Look for CUDA among the kinds of memory that MPI lists -> (bool, the list)."""
    info = comm.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    takes = any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))
    return takes, f"it lists memory of the kinds {kinds}" if kinds else "it tells nothing of CUDA"


def loaded_libraries(maps, name):
    """List the shared libraries of this process whose file is called so -> paths."""
    if not maps.is_file():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(f"{name}."))
