"""A run on GPUs: who carries its rows and sums, how large their buffers are, and how they are opened."""

import contextlib
import dataclasses
import logging

import numpy as np

from hpcmoe.clock import Clock
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.nccl import NcclAllToAll, find_nccl, open_nccl
from hpcmoe.comm.select import (
    describe_row_ops,
    open_all_to_all,
    read_transport_support,
    select_backend,
    select_mpi_backend,
)
from hpcmoe.dispatch.device import DeviceDispatcher
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.wait import gather_to_all

log = logging.getLogger(__name__)


def select_device_backend(config, world, device):
    """Choose who carries rows between the ranks' devices, and say it, and who moves them there, once -> SelectedBackend.

    Collective over world. Raises ClusterError on all ranks when [comm] asks for what is not there.
    """
    support_of_rank = gather_to_all(world, read_transport_support(world, device))
    selected = on_root(world, lambda: select_backend(config.comm, support_of_rank, config.pipeline.schedule))
    if selected.kind == "nccl" and config.comm.transport == "auto":
        selected = try_nccl(config, world, device, selected, support_of_rank)
    row_ops_names = describe_row_ops(world, device)
    if world.rank == 0:
        log.info("rows between devices: %s, for: %s", selected.kind, selected.reason)
        for line in [
            *(f"rows on a device: {row_ops}" for row_ops in row_ops_names),
            *format_shared_gpus(support_of_rank),
        ]:
            log.info("%s", line)
    return selected


def try_nccl(config, world, device, selected, support_of_rank):
    """Keep NCCL if it can be set up among all ranks, else take MPI -> SelectedBackend. Collective over world."""
    try:
        with open_nccl(world, {"world": world}, device, find_nccl()[0]):
            return selected
    except ClusterError as error:
        why = f"{error}; "
    return on_root(world, lambda: select_mpi_backend(config.comm.buffers, support_of_rank, why))


def format_shared_gpus(support_of_rank):
    """Say which ranks share a GPU, as is meant for tests -> lines."""
    gpus = [support.gpu for support in support_of_rank]
    for gpu in sorted({gpu for gpu in gpus if gpu is not None and gpus.count(gpu) > 1}):
        ranks = ", ".join(str(rank) for rank, other in enumerate(gpus) if other == gpu)
        yield f"ranks {ranks} share one GPU: good for tests, and no faster than one rank"


@contextlib.contextmanager
def open_device_dispatcher(mesh, device, sizes, routes, kind, trains):
    """Open what carries the rows of the ranks of mesh.group between its devices -> DeviceDispatcher.

    Collective over mesh.world, both ends.
    """
    with (
        open_mpi_transport(mesh.group, sizes.row_bytes, bind_thread=device.bind_thread) as transport,
        open_backend_and_sums(mesh, device, sizes, kind, transport, trains) as (all_to_all, sum_groups),
    ):
        yield DeviceDispatcher(all_to_all, transport, device, Clock(), (sizes, routes), sum_groups)


@contextlib.contextmanager
def open_backend_and_sums(mesh, device, sizes, kind, transport, trains):
    """Open who carries rows, and NCCL where it sums what they train -> (AllToAll, Groups by name or None).

    Collective over mesh.world, both ends.
    """
    if kind != "nccl":
        with open_all_to_all(kind, mesh.group, device, sizes.row_bytes, transport) as all_to_all:
            yield all_to_all, None
        return
    with open_nccl(mesh.world, find_communicators(mesh, kind, trains), device, find_nccl()[0]) as groups:
        yield NcclAllToAll(groups["rows"]), {name: group for name, group in groups.items() if name != "rows"}


def find_communicators(mesh, kind, trains):
    """Find which ranks NCCL is to connect -> MPI's communicators by name, none where it does not carry rows.

    In training sums of gradients go over "world" and "dp", where these have other ranks.
    """
    if kind != "nccl":
        return {}
    sums = {"world": mesh.world, "dp": mesh.dp} if trains else {}
    return {"rows": mesh.group} | {name: comm for name, comm in sums.items() if comm.size > 1}


def record_gpu_memory(topology, share_of_gpu):
    """Keep in the topology what each node's GPUs have free for its ranks, share_of_gpu [ranks] or None -> Topology."""
    if share_of_gpu is None:
        return topology
    free = [share_of_gpu[topology.ranks_of_node(node)].sum() for node in range(topology.num_nodes)]
    return dataclasses.replace(
        topology,
        device_memory_bytes=np.array(free, np.int64),
        source=topology.source | {"device memory": "CUDA, when the ranks opened their devices"},
    )
