"""Who carries rows between the ranks' devices: NCCL, MPI on their pointers, or MPI by way of the host."""

import contextlib
from dataclasses import dataclass

from hpcmoe.comm.all_to_all import DirectAllToAll
from hpcmoe.comm.nccl import NcclAllToAll, find_nccl, open_nccl
from hpcmoe.comm.pointers import ask_mpi
from hpcmoe.comm.staging import StagedAllToAll
from hpcmoe.environment import NCCL_SHARES, may_share_gpus
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all

MULTI_RANK_VERSION = 23000  # of NCCL, as it counts: 2.30 may run several ranks on one GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSupport:
    """What one rank sees of the ways that its rows could take."""

    gpu: str | None  # its name, the same for all its ranks; None: rows lie on the host
    nccl: int | None  # its version
    no_nccl: str  # why there is none
    shares: bool  # NCCL may run several ranks on one GPU
    takes_pointers: bool  # MPI, of devices
    ucx_takes: bool  # or what is below MPI, which knows nothing of it
    answer: str  # how they said so


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedBackend:
    """Who carries rows, and why."""

    kind: str  # "nccl", "direct" or "staged"
    reason: str


def select_backend(comm_config, support_of_rank, schedule):
    """Choose who carries rows for [comm] transport and buffers, from what each rank sees -> SelectedBackend.

    Raises ClusterError when the config asks for what is not there.
    """
    transport, no_nccl = comm_config.transport, why_not_nccl(support_of_rank, schedule)
    if transport == "nccl" and no_nccl:
        raise ClusterError(f'[comm] transport = "nccl": {no_nccl}; use "mpi", or "auto" to take what there is')
    if transport == "nccl" or (transport == "auto" and not no_nccl):
        return SelectedBackend(
            kind="nccl", reason=f"each rank has a GPU, and NCCL {name_version(support_of_rank[0].nccl)}"
        )
    return select_mpi_backend(
        comm_config.buffers, support_of_rank, f"no NCCL: {no_nccl}; " if transport == "auto" else ""
    )


def select_mpi_backend(buffers, support_of_rank, why):
    """Choose how MPI carries rows for [comm] buffers -> SelectedBackend, whose reason begins with why it is MPI.

    Raises ClusterError when the config asks for what is not there.
    """
    no_direct = why_not_direct(support_of_rank, buffers == "direct")
    if buffers == "direct" and no_direct:
        raise ClusterError(f'[comm] buffers = "direct": {no_direct}; use "staged", or "auto" to take what there is')
    if buffers == "staged":
        return SelectedBackend(kind="staged", reason=f"{why}[comm] buffers")
    if no_direct:
        return SelectedBackend(kind="staged", reason=why + no_direct)
    return SelectedBackend(kind="direct", reason=why + support_of_rank[0].answer)


def read_transport_support(comm, device):
    """See which ways this rank's rows could take -> TransportSupport."""
    memory = device.read_memory()
    nccl, no_nccl = find_nccl() if memory else (None, "no GPU")
    takes, ucx_takes, answer = ask_mpi(comm)
    return TransportSupport(
        gpu=memory and memory[0],
        nccl=nccl and nccl.get_version(),
        no_nccl=no_nccl or "",
        shares=may_share_gpus(),
        takes_pointers=takes,
        ucx_takes=ucx_takes,
        answer=answer,
    )


def describe_row_ops(comm, device):
    """Say who moves rows on the ranks' devices -> lines. Collective over comm."""
    return [f"moved by {name}" for name in sorted(set(gather_to_all(comm, device.row_ops.name)))]


@contextlib.contextmanager
def open_all_to_all(kind, comm, device, row_bytes, transport):
    """Open who carries rows among the ranks of comm -> AllToAll. Collective over comm.

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
            raise ValueError(f"unknown all_to_all {kind}")


def why_not_nccl(support_of_rank, schedule):
    """Find what keeps these ranks from NCCL -> a few words, "" where nothing does."""
    for rank, support in enumerate(support_of_rank):
        if support.gpu is None:
            return f"rank {rank} has no GPU"
        if support.nccl is None:
            return f"rank {rank}: {support.no_nccl}"
    if len({support.nccl for support in support_of_rank}) > 1:
        versions = sorted({name_version(support.nccl) for support in support_of_rank})
        return f"the ranks have different versions of it: {', '.join(versions)}"
    if schedule == "arrival":
        return '[pipeline] schedule = "arrival" starts transfers in another order on each rank, which NCCL cannot take'
    gpus = [support.gpu for support in support_of_rank]
    shared = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if shared and (
        support_of_rank[0].nccl < MULTI_RANK_VERSION or not all(support.shares for support in support_of_rank)
    ):
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared)
        return f"ranks {ranks} share a GPU: NCCL wants one rank a GPU, or from 2.30 on {NCCL_SHARES}=1"
    return ""


def why_not_direct(support_of_rank, asked):
    """Find what keeps MPI from taking the ranks' buffers as they are -> a few words, "" where nothing does.

    asked: whether the user has asked for it. Where UCX takes what MPI says it does not, nobody else may choose it.
    """
    for rank, support in enumerate(support_of_rank):
        takes = support.takes_pointers or (asked and support.ucx_takes)
        if support.gpu is not None and not takes:
            return f"rank {rank}: {support.answer}"
    return ""


def find_obstacles(support_of_rank):
    """Find what keeps these ranks from each all_to_all, were it asked for -> dict kind: a few words, "" where nothing."""
    return {
        "nccl": why_not_nccl(support_of_rank, "overlap"),
        "direct": why_not_direct(support_of_rank, asked=True),
        "staged": "",
    }


def name_version(number):
    """Write NCCL's number of a version as people do: 23203 -> 2.32.3."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
