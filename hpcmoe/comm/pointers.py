"""Whether messages may lie on a GPU: what the MPI that is loaded says of CUDA's pointers, and what UCX below it can."""

import ctypes
import os
import pathlib

from hpcmoe.cluster.topology import why_not_all_by_ucx

MAPS = pathlib.Path("/proc/self/maps")


def ask_mpi(comm, maps=MAPS):
    """Ask the MPI that is loaded whether it takes pointers of CUDA devices -> (bool, how it said so).

    Open MPI and MPICH answer by a function of their own; MPI 4.1 lists the kinds of memory on a communicator. One built
    without CUDA hands buffers to UCX as they are: where UCX is built with it, and carries all messages, that is enough.
    """
    takes, how = ask_function(maps) or ask_kinds(comm)
    answer = f"MPI says {'yes' if takes else 'no'} to CUDA pointers ({how})"
    if takes or not loaded_libraries(maps, "libuct_cuda"):
        return takes, answer
    why_not = why_not_all_by_ucx()
    return not why_not, f"{answer}; UCX takes them, " + (f"but {why_not}" if why_not else "and carries all messages")


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
