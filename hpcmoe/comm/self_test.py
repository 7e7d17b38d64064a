"""A backend tested on a small exchange: every rank's rows must reach every other whole."""

import functools
import time

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.comm.all_to_all import AllToAll, Transfer
from hpcmoe.comm.device import Device
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.select import open_all_to_all
from hpcmoe.errors import ClusterError, on_all
from hpcmoe.wait import Backoff

ROW_BYTES, ROWS = 4096, 256  # 1 MB for each rank
DEADLINE_SECONDS = 30.0
REPEATS = 3  # of which the fastest counts


def run_self_test(kind: str, comm: MPI.Comm, device: Device) -> float:
    """Send 1 MB from each rank to each, and return the bytes per second that left a rank. Collective over comm.

    Raises ClusterError on all ranks when rows come late or wrong.
    """
    with (
        open_mpi_transport(comm, ROW_BYTES, device.bind_thread) as transport,
        open_all_to_all(kind, comm, device, ROW_BYTES, transport) as all_to_all,
    ):
        send = device.make_buffer(comm.size * ROWS, ROW_BYTES)
        recv = device.make_buffer(comm.size * ROWS, ROW_BYTES)
        edges, seconds = np.arange(comm.size + 1) * ROWS, []

        # Fill, time and check each repeat by a pattern of its own.
        for number in range(REPEATS):
            send.tensor.copy_(make_pattern(comm.rank, np.arange(comm.size), number, device))
            expected = make_pattern(np.arange(comm.size), comm.rank, number, device)
            transfer = Transfer(tag=number, name="self-test", send=send, send_edges=edges, recv=recv, recv_edges=edges)
            seconds.append(on_all(comm, functools.partial(time_transfer, all_to_all, transfer, device)))
            on_all(comm, functools.partial(check_received, recv.tensor, expected, comm.size))
        return comm.size * ROWS * ROW_BYTES / min(seconds)


def make_pattern(source: np.ndarray | int, target: np.ndarray | int, number: int, device: Device) -> torch.Tensor:
    """Return bytes that differ by who sends them, to whom, and when -> [P * ROWS, 1] uint8 on the device."""
    of_pair = np.asarray((7 * source + 13 * target + 101 * number + 1) % 251)
    rows = of_pair[:, None] + np.arange(ROWS)
    return torch.from_numpy((rows % 256).astype(np.uint8)).to(device.torch_device).reshape(-1, 1)


def time_transfer(all_to_all: AllToAll, transfer: Transfer, device: Device) -> float:
    """Run a transfer to its end -> seconds. Raises ClusterError when it takes too long."""
    begun, backoff = time.perf_counter(), Backoff()
    request = all_to_all.start(transfer, device.compute_stream.record_event(), None)
    while not request.done:
        if not all_to_all.poke():
            backoff.pause()
        if time.perf_counter() - begun > DEADLINE_SECONDS:
            raise ClusterError(f"{all_to_all.name}: not done after {DEADLINE_SECONDS:.0f} s")
    device.compute_stream.wait_event(request.event)
    return time.perf_counter() - begun


def check_received(received: torch.Tensor, expected: torch.Tensor, num_ranks: int) -> None:
    """Raise ClusterError where rows are not those that were sent."""
    wrong = (received != expected).any(dim=1).view(num_ranks, ROWS).any(dim=1)
    if wrong.any():
        ranks = ", ".join(map(str, wrong.nonzero().flatten().tolist()))
        raise ClusterError(f"rows of ranks {ranks} came wrong")
