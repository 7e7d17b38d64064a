"""Host or CUDA: where arrays live, how rows get from them into message buffers and back, and when they are there.

Message buffers are host memory on both devices: with a GPU rows are staged through them.
"""

import torch
from torch import nn

from hpcmoe.errors import ClusterError


class HostEvent:
    """An event on the host: whatever was asked for has already happened."""

    def synchronize(self):
        """Return at once."""


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
        self.compute = self.send = self.receive = HostStream()

    def make_buffer(self, num_rows, row_bytes):
        """Allocate and touch a message buffer -> uint8 tensor [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)

    def put(self, rows, target):
        """Copy rows [n, H] of any precision to message rows [n, H] -> Event."""
        target.copy_(rows)
        return HostEvent()

    def take(self, table, order):
        """Gather message rows table[order] -> a fresh tensor [n, H] on the device."""
        return table.index_select(0, order)

    def lay(self, rows, table, order):
        """Write rows [n, H] to message rows table[order], order an int64 array."""
        table.view(torch.uint8).numpy()[order] = rows.view(torch.uint8).numpy()  # twice as fast as torch's index_copy_

    def sum_rows(self, table, rows, weights):
        """Sum message rows table[rows[t, k]] * weights[t, k] over k -> a fresh tensor [T, H] on the device."""
        return nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))

    def read_memory(self):
        """Tell of no memory but the node's -> None."""
        return None


class CudaDevice:
    """One GPU: three streams, and pinned host memory for what travels (staged)."""

    name = "cuda"

    def __init__(self, index):
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.send = torch.cuda.Stream()
        self.receive = torch.cuda.Stream()

    @property
    def compute(self):
        """The stream on which torch works."""
        return torch.cuda.current_stream()

    def make_buffer(self, num_rows, row_bytes):
        """Allocate a pinned message buffer -> uint8 tensor [num_rows, row_bytes] on the host."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8, pin_memory=True)

    def put(self, rows, target):
        """Copy rows [n, H] of any precision to message rows [n, H] on the send stream -> Event."""
        rows = rows.to(target.dtype)
        self.send.wait_event(self.compute.record_event())
        with torch.cuda.stream(self.send):
            target.copy_(rows, non_blocking=True)
            rows.record_stream(self.send)
            return self.send.record_event()

    def take(self, table, order):
        """Gather message rows table[order] on the receive stream -> a fresh tensor [n, H] on the device."""
        return self.bring(table.index_select(0, order))

    def lay(self, rows, table, order):
        """Write rows [n, H] to message rows table[order], order an int64 array."""
        staged = rows.cpu()  # host waits for the device here
        table.view(torch.uint8).numpy()[order] = staged.view(torch.uint8).numpy()

    def sum_rows(self, table, rows, weights):
        """Sum message rows table[rows[t, k]] * weights[t, k] over k -> a fresh tensor [T, H] on the device."""
        weights = weights.to(table.dtype)
        return self.bring(nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights))

    def bring(self, rows):
        """Copy host rows to the device on the receive stream -> a tensor that the compute stream may use."""
        staged = rows.pin_memory()
        with torch.cuda.stream(self.receive):
            arrived = staged.to(self.torch_device, non_blocking=True)
        self.compute.wait_event(self.receive.record_event())
        arrived.record_stream(self.compute)
        return arrived

    def read_memory(self):
        """Read the GPU's name, the same for all its ranks, and its free memory -> (name, bytes)."""
        name = str(torch.cuda.get_device_properties(self.torch_device).uuid)
        return name, torch.cuda.mem_get_info(self.torch_device)[0]


def open_device(kind, local_rank):
    """Make this rank's device: "host", "cuda", or "auto" (CUDA where torch finds a GPU).

    Raises ClusterError when "cuda" is asked for and torch finds none.
    """
    num_gpus = torch.cuda.device_count() if kind != "host" else 0
    match kind:
        case "host":
            return HostDevice()
        case "cuda" if num_gpus == 0:
            raise ClusterError(
                '[comm] device = "cuda": torch finds no CUDA device here; use "host", or "auto" to take what there is'
            )
        case "cuda" | "auto":
            return CudaDevice(local_rank % num_gpus) if num_gpus else HostDevice()
        case _:
            raise ValueError(f"unknown device {kind}")
