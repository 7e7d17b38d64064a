"""A all_to_all tried on a small exchange: every rank's rows must reach every other whole."""

import time

import numpy as np
import torch

from hpcmoe.comm.all_to_all import Transfer
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.select import open_all_to_all
from hpcmoe.errors import ClusterError, on_all
from hpcmoe.wait import Backoff

ROW_BYTES, ROWS = 4096, 256  # 1 MB for each rank
DEADLINE_SECONDS = 30.0
TIMES = 3  # of which the fastest counts


def run_self_test(kind, comm, device):
    """Send 1 MB from each rank to each -> bytes per second that left a rank. Collective over comm.

    Raises ClusterError on all ranks when rows come late or wrong.
    """
    with (
        open_mpi_transport(comm, ROW_BYTES, bind_thread=device.bind_thread) as transport,
        open_all_to_all(kind, comm, device, ROW_BYTES, transport) as all_to_all,
    ):
        send = device.make_buffer(comm.size * ROWS, ROW_BYTES)
        receive = device.make_buffer(comm.size * ROWS, ROW_BYTES)
        edges = np.arange(comm.size + 1) * ROWS
        seconds = []
        for number in range(TIMES):
            send.tensor.copy_(pattern(comm.rank, np.arange(comm.size), number, device))
            transfer = Transfer(tag=number, name="trial", send=send, send_edges=edges, recv=receive, recv_edges=edges)
            seconds.append(on_all(comm, lambda transfer=transfer: carry(all_to_all, transfer, device)))
            expected = pattern(np.arange(comm.size), comm.rank, number, device)
            on_all(comm, lambda expected=expected: compare(receive.tensor, expected, comm.size))
        return comm.size * ROWS * ROW_BYTES / min(seconds)


def pattern(source, target, number, device):
    """Bytes that tell from whom to whom they go, and when -> [P * ROWS, 1] uint8 on the device."""
    of_pair = (7 * source + 13 * target + 101 * number + 1) % 251
    rows = of_pair[:, None] + np.arange(ROWS)
    return torch.from_numpy((rows % 256).astype(np.uint8)).to(device.torch_device).reshape(-1, 1)


def carry(all_to_all, transfer, device):
    """Carry a transfer to its end -> seconds. Raises ClusterError when it takes too long."""
    begun, backoff = time.perf_counter(), Backoff()
    request = all_to_all.start(transfer, device.compute_stream.record_event(), None)
    while not (request.recv_done and request.send_done and request.is_over()):
        if not all_to_all.poke():
            backoff.pause()
        if time.perf_counter() - begun > DEADLINE_SECONDS:
            raise ClusterError(f"{all_to_all.name}: not done after {DEADLINE_SECONDS:.0f} s")
    device.compute_stream.wait_event(request.event)
    return time.perf_counter() - begun


def compare(received, expected, num_ranks):
    """Raise ClusterError where rows are not those that were sent."""
    wrong = (received != expected).any(dim=1).view(num_ranks, ROWS).any(dim=1)
    if wrong.any():
        ranks = ", ".join(map(str, wrong.nonzero().flatten().tolist()))
        raise ClusterError(f"rows of ranks {ranks} came wrong")
