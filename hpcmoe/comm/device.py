"""Host or CUDA: where arrays live, how rows get from them into message buffers and back, and when they are there.

On the host rows pass through memory that ranks share (hpcmoe.comm.window); GPUs have buffers of their own, and
all-to-all backends between them (hpcmoe.comm.cuda, hpcmoe.comm.all_to_all).
"""

import torch
from torch import nn

from hpcmoe.comm.cuda import CudaDevice, count_gpus, find_missing_cuda
from hpcmoe.errors import ClusterError


class HostEvent:
    """An event on the host: whatever was asked for has already happened."""

    def synchronize(self):
        """Return at once."""

    def query(self):
        """Say that it has happened."""
        return True


class HostStream:
    """A stream of the host: what is asked of it is done when the call returns, and messages progress when poked."""

    def record_event(self):
        """Mark the work given to the stream so far -> HostEvent."""
        return HostEvent()

    def wait_event(self, event):
        """Have what follows wait for an event, which here has happened."""


class HostDevice:
    """The host's cores: arrays are message buffers as they are."""

    name = "host"
    torch_device = torch.device("cpu")

    def __init__(self):
        self.compute_stream = self.send_stream = self.recv_stream = HostStream()

    def make_buffer(self, num_rows, row_bytes):
        """Allocate and touch a message buffer -> uint8 tensor [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)

    def copy_to_host(self, tensor):
        """Begin to copy a tensor to the host -> (host tensor, event of its arrival); here it is its own copy."""
        return tensor, HostEvent()

    def copy_from_host(self, array):
        """See a NumPy array as a tensor -> it, of the same memory."""
        return torch.from_numpy(array)

    def put(self, rows, target):
        """Copy rows [n, H] of any precision to message rows [n, H] -> Event."""
        target.copy_(rows)
        return HostEvent()

    def gather(self, table, order):
        """Gather message rows table[order] -> a fresh tensor [n, H] on the device."""
        return table.index_select(0, order)

    def scatter(self, rows, table, order):
        """Write rows [n, H] to message rows table[order], order an int64 array."""
        table.view(torch.uint8).numpy()[order] = rows.view(torch.uint8).numpy()  # twice as fast as torch's index_copy_

    def sum_rows(self, table, rows, weights):
        """Sum message rows table[rows[t, k]] * weights[t, k] over k -> a fresh tensor [T, H] on the device."""
        return nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))

    def read_memory(self):
        """Tell of no memory but the node's -> None."""
        return None


def open_device(kind, local_rank):
    """Make this rank's device: "host", "cuda", or "auto" (CUDA where there is a GPU and what it takes to use it).

    Ranks of a node take its GPUs in turn. Raises ClusterError when "cuda" is asked for and something is missing.
    """
    missing = None if kind == "host" else find_missing_cuda()
    match kind:
        case "host":
            return HostDevice()
        case "cuda" if missing:
            raise ClusterError(f'[comm] device = "cuda": {missing}; use "host", or "auto" to take what there is')
        case "cuda" | "auto":
            return HostDevice() if missing else CudaDevice(local_rank % count_gpus())
        case _:
            raise ValueError(f"unknown device {kind}")
