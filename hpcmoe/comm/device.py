"""Host or CUDA: where arrays live, how rows get from them into message buffers and back, and when they are there.

Message buffers are host memory on both devices: on a GPU they are pinned, and rows are staged through them.
"""

import torch

from hpcmoe.errors import ClusterError


class HostEvent:
    """An event on the host: whatever was asked for has already happened."""

    def synchronize(self):
        """Return at once."""


class HostDevice:
    """The host's cores: arrays are message buffers as they are."""

    name = "host"
    torch_device = torch.device("cpu")

    def make_buffer(self, num_rows, row_bytes):
        """Allocate and touch a message buffer -> uint8 tensor [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)

    def pack(self, rows, order, buffer):
        """Copy rows[order] [n, H] (all rows when order is None) into the buffer's first n rows -> Event."""
        wire = as_rows(buffer, rows.dtype)[: len(rows) if order is None else len(order)]
        if order is None:
            wire.copy_(rows)
        else:
            torch.index_select(rows, 0, order, out=wire)  # no temporary: straight into the message
        return HostEvent()

    def unpack(self, buffer, order, dtype):
        """Copy the buffer's rows in this order -> a fresh tensor [n, H] on the device."""
        return as_rows(buffer, dtype).index_select(0, order)

    def scatter(self, rows, order, buffer):
        """Write rows [n, H] to the buffer's rows `order`."""
        as_rows(buffer, rows.dtype).index_copy_(0, order, rows)

    def record(self):
        """Mark the work given to the device so far -> Event."""
        return HostEvent()

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

    def make_buffer(self, num_rows, row_bytes):
        """Allocate a pinned message buffer -> uint8 tensor [num_rows, row_bytes] on the host."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8, pin_memory=True)

    def pack(self, rows, order, buffer):
        """Copy rows[order] (all rows when order is None) into the buffer on the send stream -> Event."""
        rows = rows if order is None else rows.index_select(0, order.to(self.torch_device))
        return self.copy_out(rows, as_rows(buffer, rows.dtype)[: len(rows)])

    def unpack(self, buffer, order, dtype):
        """Copy the buffer's rows in this order on the receive stream -> a fresh tensor [n, H] on the device."""
        rows = as_rows(buffer, dtype).index_select(0, order).pin_memory()
        with torch.cuda.stream(self.receive):
            arrived = rows.to(self.torch_device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self.receive)
        arrived.record_stream(torch.cuda.current_stream())
        return arrived

    def scatter(self, rows, order, buffer):
        """Write rows [n, H] to the buffer's rows `order`."""
        staged = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self.copy_out(rows, staged).synchronize()  # host waits for the device here
        as_rows(buffer, rows.dtype).index_copy_(0, order, staged)

    def record(self):
        """Mark the copies given to the send stream so far -> torch.cuda.Event."""
        return self.send.record_event()

    def read_memory(self):
        """Read the GPU's name, the same for all its ranks, and its free memory -> (name, bytes)."""
        name = str(torch.cuda.get_device_properties(self.torch_device).uuid)
        return name, torch.cuda.mem_get_info(self.torch_device)[0]

    def copy_out(self, rows, staged):
        """Copy device rows to pinned host rows behind the compute stream -> torch.cuda.Event."""
        self.send.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.send):
            staged.copy_(rows, non_blocking=True)
            rows.record_stream(self.send)
            return self.send.record_event()


def as_rows(buffer, dtype):
    """See a uint8 buffer [n, row_bytes] as rows of numbers [n, H] of this dtype, without a copy."""
    return buffer.view(dtype)


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
