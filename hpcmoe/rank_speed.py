"""What each rank's machine gives: rate of a GEMM, memory, shared memory, and whether its files can be locked."""

import fcntl
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmoe.cluster.machine import count_own_cores, read_memory_bytes
from hpcmoe.cluster.topology import Topology
from hpcmoe.messages import to_json

if TYPE_CHECKING:  # which imports torch
    from hpcmoe.comm.device import Device

SLOW = 0.75  # of the median rate of all nodes, below which a node is slow
_GEMM_SIZE, _GEMM_SECONDS = 512, 0.2  # of a square matrix; for all of the timing
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpeed:
    """What one rank has and gives."""

    flops_per_second: float  # of a float32 GEMM, while all ranks compute
    memory_bytes: int  # of its node
    shared_memory_bytes: int | None  # free in /dev/shm; None where there is none
    lock_error: str | None  # what keeps it from locking a file in the folder; None: nothing
    cores: int  # that it may use


def measure_rank(device: "Device", folder: Path) -> RankSpeed:
    """Measure this rank; folder: of the output. Call on all ranks at once; not collective."""
    shared = os.statvfs(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    return RankSpeed(
        flops_per_second=time_gemm(device),
        memory_bytes=read_memory_bytes(),
        shared_memory_bytes=None if shared is None else shared.f_bavail * shared.f_frsize,
        lock_error=find_lock_error(folder),
        cores=count_own_cores(),
    )


def time_gemm(device: "Device") -> float:
    """Time products of two square matrices -> operations per second, of the median product."""
    import torch

    x = torch.ones(_GEMM_SIZE, _GEMM_SIZE, device=device.torch_device)
    taken, until = list[float](), time.perf_counter() + _GEMM_SECONDS
    while len(taken) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        x @ x
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    return 2 * _GEMM_SIZE**3 / statistics.median(taken)


def find_lock_error(folder: Path) -> str | None:
    """Lock a file in a folder, or where it would be made, as HDF5 does -> what keeps it from that, or None."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"{there}: {error.strerror}"
    return None


def rate_nodes(rates: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """Return the rate of each node's median rank / the median of all nodes, [nodes]; rates [P] of the ranks."""
    of_node = np.array([np.median(rates[node_of_rank == node]) for node in range(max(node_of_rank) + 1)])
    return of_node / np.median(of_node)


def find_slow_nodes(rates: np.ndarray, topology: Topology) -> list[str]:
    """Return the names of the nodes whose ranks compute far slower than the median node's."""
    ratios = rate_nodes(rates, topology.node_of_rank)
    return [name for name, ratio in zip(topology.node_names, ratios, strict=True) if ratio < SLOW]


def describe_speeds(speeds: list[RankSpeed], topology: Topology) -> list[tuple[str, str]]:
    """Format what the ranks give in two columns."""
    rates = np.array([speed.flops_per_second for speed in speeds])
    low, median, high = np.quantile(rates, (0, 0.5, 1)) / 1e9
    slow = find_slow_nodes(rates, topology)
    shared = [speed.shared_memory_bytes for speed in speeds if speed.shared_memory_bytes is not None]
    errors = sorted({speed.lock_error for speed in speeds if speed.lock_error})
    return [
        ("GEMM", f"{low:.3g} to {high:.3g} GFLOP/s a rank, median {median:.3g}"),
        *[("", f"SLOW: {name} computes far slower than the median node") for name in slow],
        ("memory", f"{min(speed.memory_bytes for speed in speeds) / 1e9:.3g} GB a node at least"),
        ("", f"{min(shared) / 1e9:.3g} GB of shared memory free at least" if shared else "no /dev/shm"),
        ("file locks", "; ".join(errors) or "work"),
    ]  # fmt: skip


def list_links(topology: Topology) -> list[dict[str, Any]]:
    """List each ordered pair of nodes with what its link gives."""
    names = topology.node_names
    return [
        {
            "from": names[a],
            "to": names[b],
            "bytes_per_second": to_json(topology.bytes_per_second[a, b]),
            "latency_seconds": to_json(topology.latency_seconds[a, b]),
        }
        for a in range(len(names))
        for b in range(len(names))
        if a != b
    ]


def describe_nodes(topology: Topology, speeds: list[RankSpeed]) -> list[dict[str, Any]]:
    """List each node with its ports, its memory, and its ranks' rates beside the median node's."""
    rates = np.array([speed.flops_per_second for speed in speeds])
    ratios = rate_nodes(rates, topology.node_of_rank)
    nodes = []
    for node, name in enumerate(topology.node_names):
        ranks = topology.ranks_of_node(node)
        first = speeds[ranks[0]]
        nodes.append({
            "name": name,
            "rack": topology.rack_names[topology.rack_of_node[node]],
            "ranks": ranks.tolist(),
            "cores": int(topology.cores_of_node[node]),
            "memory_bytes": first.memory_bytes,
            "shared_memory_free_bytes": first.shared_memory_bytes,
            "egress_bytes_per_second": to_json(topology.egress_bytes_per_second[node]),
            "ingress_bytes_per_second": to_json(topology.ingress_bytes_per_second[node]),
            "gemm_to_median": float(ratios[node]),
            "is_slow": bool(ratios[node] < SLOW),
        })  # fmt: skip
    return nodes


def describe_all(topology: Topology, speeds: list[RankSpeed]) -> dict[str, Any]:
    """Return what there is and what it gives as JSON has it; what knows no limit is null."""
    rates = np.array([speed.flops_per_second for speed in speeds])
    uplinks = zip(topology.rack_names, topology.uplink_bytes_per_second, strict=True)
    return {
        "num_ranks": len(speeds),
        "nodes": describe_nodes(topology, speeds),
        "links": list_links(topology),
        "racks": [{"name": name, "uplink_bytes_per_second": to_json(rate)} for name, rate in uplinks],
        "ranks": [
            {
                "rank": rank,
                "node": topology.node_names[topology.node_of_rank[rank]],
                "cores": speed.cores,
                "gemm_flops_per_second": speed.flops_per_second,
                "gemm_to_median": float(speed.flops_per_second / np.median(rates)),
                "file_lock_error": speed.lock_error,
            }
            for rank, speed in enumerate(speeds)
        ],
        "gemm_flops_per_second_median": float(np.median(rates)),
        "slow_nodes": find_slow_nodes(rates, topology),
        "source": dict(topology.source),
    }
