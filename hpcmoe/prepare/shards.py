"""The number of ranks that share an expert's matrices: as the config says, or as few as its memory needs."""

import dataclasses
import logging

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.topology import Topology
from hpcmoe.config import NetworkSpec, ParallelConfig
from hpcmoe.errors import on_all
from hpcmoe.experts.shapes import estimate_expert, make_expert_shape
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.messages import format_size
from hpcmoe.model.shapes import count_dense_parameters
from hpcmoe.prepare.budget import share_gpu_memory
from hpcmoe.wait import gather_to_all

log = logging.getLogger(__name__)


def resolve_tensor_parallel(
    comm: MPI.Intracomm, parallel: ParallelConfig, spec: NetworkSpec, topology: Topology, device: str
) -> ParallelConfig:
    """Choose [parallel] tensor where it is 0 -> the section with its number. Collective over comm.

    device is [comm] device where experts may lie on GPUs, else "host".
    """
    if parallel.tensor:
        return parallel
    rank_bytes = read_rank_bytes(comm, topology, device)
    chosen, arithmetic = choose_tensor_parallel(parallel, spec, comm.size, rank_bytes)
    log.info("%s", arithmetic)
    return dataclasses.replace(parallel, tensor=chosen)


def read_rank_bytes(comm: MPI.Intracomm, topology: Topology, device: str) -> int:
    """Return the bytes of the rank that has least memory. Collective over comm."""
    if device != "host":
        from hpcmoe.comm.device import open_device  # imports torch

        here = list(topology.ranks_of_node(topology.node_of_rank[comm.rank]))
        opened = on_all(comm, lambda: open_device(device, here.index(comm.rank)))
        share_of_gpu = share_gpu_memory(gather_to_all(comm, opened.read_memory()))
        if share_of_gpu is not None:
            return int(share_of_gpu.min())
    return int((topology.memory_bytes / np.bincount(topology.node_of_rank)).min())


def choose_tensor_parallel(
    parallel: ParallelConfig, spec: NetworkSpec, num_ranks: int, rank_bytes: int
) -> tuple[int, str]:
    """Choose the fewest ranks that can hold an expert with all its state -> (ranks, the arithmetic as text).

    One expert of one layer is the least that a rank holds, beside dense parts with their state. Where no number is
    enough it is 1: the placement then tells what does not fit.
    """
    one_expert, states = estimate_expert(make_expert_shape(spec), spec.trains)
    dense = count_dense_parameters(spec.model) * FLOAT32_BYTES * states
    needed, left = one_expert * states, max(rank_bytes - dense, 0)
    others = parallel.data * max(parallel.expert, 1)
    may_share = [
        n for n in range(1, num_ranks + 1)
        if num_ranks % (others * n) == 0 and spec.model.feed_forward % n == 0
        and (parallel.expert == 0 or others * n == num_ranks)
    ]  # fmt: skip
    chosen = next((n for n in may_share if needed <= n * left), 1)
    return chosen, (
        f"an expert with its state takes {format_size(needed)}, a rank has {format_size(rank_bytes)} - dense parts "
        f"{format_size(dense)} = {format_size(left)}: [parallel] tensor = {chosen}"
        + " does not suffice"
        * (needed > chosen * left)
    )
