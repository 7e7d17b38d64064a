"""Memory of this process beside the arrays that are counted: Python, torch, MPI, and what a step makes these load."""

from __future__ import annotations

import pathlib
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.gemm import multiply
from hpcmoe.prepare.memory import Memory
from hpcmoe.wait import gather_to_all

if TYPE_CHECKING:
    from mpi4py import MPI

STEP_BYTES = 5 * 10**7  # that steps add beside all that is counted: kernels, scratch, holes in the heap. Of the default
# job 4 and 16 steps added 47 and 97 MB at 1 rank, 25 and 60 at 2, 17 and 40 at 4: the more rows a rank has, the more
_STATUS = pathlib.Path("/proc/self/status")  # on Linux


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Bytes of one process, by who shares them."""

    unshared: int  # that no other process has (USS)
    shared_memory: int  # in segments and windows: of these ranks on the node and of MPI
    resident: int  # all of it that is in RAM
    peak: int  # the most that has been there

    @property
    def libraries(self) -> int:
        """Return the bytes of code and files that other processes have too; a process alone has them unshared."""
        return max(self.resident - self.unshared - self.shared_memory, 0)


def read_process() -> ProcessMemory:
    """Read the memory of this process; the system takes some 25 ms to add that up."""
    memory = psutil.Process().memory_full_info()
    return ProcessMemory(
        unshared=memory.uss,
        shared_memory=read_status("RssShmem", _STATUS),
        resident=memory.rss,
        peak=peak_resident_bytes(),
    )


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_status(name: str, path: pathlib.Path) -> int:
    """Read a figure in kB from the system's status of a process -> bytes, 0 where it is not there."""
    if not path.is_file():
        return 0
    found = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else 0


def preload_libraries(trains: bool, places: bool) -> None:
    """Load now what a step would load: torch's symbols at the first backward pass, and the search.

    Then the process is as large as in the steps before their memory is estimated.
    """
    if places:
        import hpcmoe.placement.solve  # noqa: F401  numba and scipy
    if trains:
        weight = torch.ones(2, 2, requires_grad=True)
        product = multiply(torch.ones(2, 2), weight)
        product.backward(torch.ones_like(product))  # an explicit gradient, as in a layer, loads them


def estimate_process(world: MPI.Comm, node_of_rank: np.ndarray, trains: bool) -> int:
    """Estimate the bytes of a process in the steps, beside all arrays that are counted. Collective over world.

    The mean of a node's ranks, for one places the experts for all, on the node where that is most.
    """
    preload_libraries(trains, world.rank == 0)
    return mean_of_fullest_node(gather_to_all(world, read_process().unshared), node_of_rank) + STEP_BYTES


def mean_of_fullest_node(of_ranks: list[int], node_of_rank: np.ndarray) -> int:
    """Compute the mean over each node's ranks, of_ranks [P] bytes -> that of the fullest node."""
    return int((np.bincount(node_of_rank, weights=of_ranks) / np.bincount(node_of_rank)).max())


def count_unshared(memory: Memory, dispatcher: TokenDispatcher) -> int:
    """Count the bytes of a Memory's arrays that are in this process's own part of the host's memory."""
    if dispatcher.sizes.works_at_once:
        return memory.moving + memory.snapshot
    routes = dispatcher.routes
    return memory.total - (dispatcher.sizes.shared_bytes(routes) if len(routes.local_peers) > 1 else 0)
