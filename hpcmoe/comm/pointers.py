"""Whether messages may lie on a GPU: the answer of the MPI that is loaded, and of UCX below it."""

import ctypes
import os
import pathlib
import re

from mpi4py import MPI

from hpcmoe.environment import find_ucx_obstacle

_MAPS = pathlib.Path("/proc/self/maps")


def read_cuda_support(comm: MPI.Comm, maps: pathlib.Path = _MAPS) -> tuple[bool, bool, str]:
    """Query the MPI that is loaded, then UCX, for CUDA's pointers -> (MPI takes them, UCX does, the answers in words).

    Open MPI and MPICH answer by a function of their own; MPI 4.1 lists the kinds of memory on a communicator. One built
    without CUDA hands buffers as they are to UCX, which takes them where it has CUDA and carries all messages.
    """
    takes, how = query_function(maps) or query_kinds(comm)
    answer = f"MPI says {'yes' if takes else 'no'} to CUDA pointers ({how})"
    if takes or not list_libraries(maps, "libuct_cuda"):
        return takes, False, answer
    obstacle = find_ucx_obstacle(MPI.get_vendor()[0], find_netmod(MPI.Get_library_version()))
    but = f"but {obstacle}" if obstacle else 'and carries all messages, on which buffers = "direct" relies'
    return False, not obstacle, f"{answer}; UCX has CUDA, {but}"


def find_netmod(library_version: str) -> str:
    """Return the network module that an MPICH takes by itself: "ucx", "ofi", or "" where it does not tell."""
    found = re.search(r"ch4:(\w+)", library_version)
    return found[1] if found else ""


def query_function(maps: pathlib.Path) -> tuple[bool, str] | None:
    """Query MPIX_Query_cuda_support -> (its answer, its name), None where there is none."""
    for path in list_libraries(maps, "libmpi"):
        function = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
        if function is not None:
            return bool(function()), "MPIX_Query_cuda_support"
    return None


def query_kinds(comm: MPI.Comm) -> tuple[bool, str]:
    """Search the kinds of memory that MPI lists for CUDA -> (found, the list)."""
    info = comm.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    takes = any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))
    return takes, f"it lists memory of the kinds {kinds}" if kinds else "it tells nothing of CUDA"


def list_libraries(maps: pathlib.Path, name: str) -> list[str]:
    """Return the paths of this process's shared libraries whose file has this name."""
    if not maps.is_file():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(f"{name}."))
