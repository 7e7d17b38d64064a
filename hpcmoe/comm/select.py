"""Which backend carries rows between the ranks' devices: NCCL, MPI on their pointers, or MPI by way of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi4py import MPI

from hpcmoe.comm.all_to_all import AllToAll, DirectAllToAll
from hpcmoe.comm.nccl import NcclAllToAll, find_nccl, open_nccl
from hpcmoe.comm.pointers import read_cuda_support
from hpcmoe.comm.staging import StagedAllToAll
from hpcmoe.comm.transport import Transport
from hpcmoe.environment import NCCL_SHARES, may_share_gpus
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all

if TYPE_CHECKING:
    from hpcmoe.comm.device import Device
    from hpcmoe.config import CommConfig

_MULTI_RANK_VERSION = 23000  # of NCCL, as it counts: 2.30 may run several ranks on one GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSupport:
    """What one rank finds of the ways that its rows could take."""

    gpu: str | None  # its name, the same for all its ranks; None: rows lie on the host
    nccl: int | None  # its version
    no_nccl: str  # why there is none
    shares: bool  # NCCL may run several ranks on one GPU
    takes_pointers: bool  # MPI, of devices
    ucx_takes: bool  # or what is below MPI, which knows nothing of it
    answer: str  # of MPI and UCX, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedBackend:
    """The backend that carries rows, and why."""

    kind: str  # "nccl", "direct" or "staged"
    reason: str


def select_backend(settings: CommConfig, support_of_rank: list[TransportSupport], schedule: str) -> SelectedBackend:
    """Select the backend for [comm] transport and buffers, from what each rank finds.

    Raises ClusterError when the config asks for what is not there.
    """
    transport, no_nccl = settings.transport, find_nccl_obstacle(support_of_rank, schedule)
    if transport == "nccl" and no_nccl:
        raise ClusterError(f'[comm] transport = "nccl": {no_nccl}; use "mpi", or "auto" to take what there is')
    if transport == "nccl" or (transport == "auto" and not no_nccl):
        version = format_version(support_of_rank[0].nccl or 0)
        return SelectedBackend(kind="nccl", reason=f"each rank has a GPU, and NCCL {version}")
    return select_mpi_backend(settings.buffers, support_of_rank, f"no NCCL: {no_nccl}; " if transport == "auto" else "")


def select_mpi_backend(buffers: str, support_of_rank: list[TransportSupport], why: str) -> SelectedBackend:
    """Select how MPI carries rows for [comm] buffers; the reason begins with why it is MPI.

    Raises ClusterError when the config asks for what is not there.
    """
    no_direct = find_direct_obstacle(support_of_rank, buffers == "direct")
    if buffers == "direct" and no_direct:
        raise ClusterError(f'[comm] buffers = "direct": {no_direct}; use "staged", or "auto" to take what there is')
    if buffers == "staged":
        return SelectedBackend(kind="staged", reason=f"{why}[comm] buffers")
    if no_direct:
        return SelectedBackend(kind="staged", reason=why + no_direct)
    return SelectedBackend(kind="direct", reason=why + support_of_rank[0].answer)


def read_transport_support(comm: MPI.Comm, device: Device) -> TransportSupport:
    """Read which ways this rank's rows could take."""
    memory = device.read_memory()
    nccl, no_nccl = find_nccl() if memory else (None, "no GPU")
    takes, ucx_takes, answer = read_cuda_support(comm)
    return TransportSupport(
        gpu=memory[0] if memory else None,
        nccl=nccl and nccl.get_version(),
        no_nccl=no_nccl or "",
        shares=may_share_gpus(),
        takes_pointers=takes,
        ucx_takes=ucx_takes,
        answer=answer,
    )


def describe_row_ops(comm: MPI.Comm, device: Device) -> list[str]:
    """Format what moves rows on the ranks' devices, a line each. Collective over comm."""
    return [f"moved by {name}" for name in sorted(set(gather_to_all(comm, device.row_ops.name)))]


@contextlib.contextmanager
def open_all_to_all(
    kind: str, comm: MPI.Comm, device: Device, row_bytes: int, transport: Transport
) -> Iterator[AllToAll]:
    """Open the backend of this kind among the ranks of comm. Collective over comm.

    transport is MPI's, of rows of this width among the same ranks.
    """
    match kind:
        case "nccl":
            with open_nccl(comm, {"rows": comm}, device, find_nccl()[0]) as groups:
                yield NcclAllToAll(groups["rows"])
        case "direct":
            yield DirectAllToAll(transport, device)
        case "staged":
            yield StagedAllToAll(transport, device, row_bytes)
        case _:
            raise ValueError(f"unknown backend {kind}")


def find_nccl_obstacle(support_of_rank: list[TransportSupport], schedule: str) -> str:
    """Return what keeps these ranks from NCCL, in a few words; "" where nothing does."""
    # Each rank needs a GPU and the same NCCL.
    for rank, support in enumerate(support_of_rank):
        if support.gpu is None:
            return f"rank {rank} has no GPU"
        if support.nccl is None:
            return f"rank {rank}: {support.no_nccl}"
    versions = sorted({format_version(support.nccl or 0) for support in support_of_rank})
    if len(versions) > 1:
        return f"the ranks have different versions of it: {', '.join(versions)}"
    if schedule == "arrival":
        return '[pipeline] schedule = "arrival" starts transfers in another order on each rank, which NCCL cannot take'

    # Ranks may share a GPU with a new NCCL alone, and where the environment allows it.
    gpus = [support.gpu for support in support_of_rank]
    shared = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    may_share = all(support.shares and (support.nccl or 0) >= _MULTI_RANK_VERSION for support in support_of_rank)
    if shared and not may_share:
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared)
        return f"ranks {ranks} share a GPU: NCCL wants one rank a GPU, or from 2.30 on {NCCL_SHARES}=1"
    return ""


def find_direct_obstacle(support_of_rank: list[TransportSupport], asked: bool) -> str:
    """Return what keeps MPI from taking the ranks' buffers as they are, in a few words; "" where nothing does.

    asked: the user has asked for it. Where UCX takes what MPI says it does not, "auto" does not choose it.
    """
    for rank, support in enumerate(support_of_rank):
        takes = support.takes_pointers or (asked and support.ucx_takes)
        if support.gpu is not None and not takes:
            return f"rank {rank}: {support.answer}"
    return ""


def find_obstacles(support_of_rank: list[TransportSupport]) -> dict[str, str]:
    """Return what keeps these ranks from each kind of backend, were it asked for; "" where nothing does."""
    nccl, direct = find_nccl_obstacle(support_of_rank, "overlap"), find_direct_obstacle(support_of_rank, asked=True)
    return {"nccl": nccl, "direct": direct, "staged": ""}


def format_version(number: int) -> str:
    """Format NCCL's number of a version as people do: 23203 -> 2.32.3."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
