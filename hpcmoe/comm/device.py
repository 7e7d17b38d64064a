"""Host or CUDA: where arrays live, how rows get from them into message buffers and back, and when they are there.

On the host rows pass through memory that ranks share (hpcmoe.comm.window); GPUs have buffers of their own, and an
all-to-all between them (hpcmoe.comm.cuda, hpcmoe.comm.all_to_all).
"""

import contextlib
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.cuda import CudaDevice, StreamSpan, count_gpus, find_missing_cuda
from hpcmoe.comm.rows import Buffer, RowOps, TorchRowOps
from hpcmoe.errors import ClusterError


class Event(Protocol):
    """A mark behind the work that a stream was given, as torch has it."""

    def synchronize(self) -> None:
        """Wait until it has happened."""

    def query(self) -> bool:
        """Return True if it has happened."""


class Stream(Protocol):
    """Work in order, as torch has it."""

    def record_event(self) -> Any:
        """Mark the work given to the stream so far, and return the Event."""

    def wait_event(self, event: Any) -> None:
        """Make what the stream is given from now on wait for an Event."""


class Device(Protocol):
    """One rank's memory and streams: torch computes on the compute stream, copies and NCCL have the others.

    By default it is the host, whose memory is every thread's and whose work is done at once.
    """

    name: str
    torch_device: torch.device
    row_ops: RowOps
    compute_stream: Any  # a Stream, as the next two: torch's own on a GPU
    send_stream: Any
    recv_stream: Any

    @property
    def generators(self) -> list[torch.Generator]:
        """Return torch's generators of random numbers, the CPU's first."""
        return [torch.default_generator]

    def bind_thread(self) -> None:
        """Make this device the calling thread's own."""
        return None

    def use(self, stream: Any) -> contextlib.AbstractContextManager:
        """Make torch work on a stream within the with-block."""
        return contextlib.nullcontext()

    def make_buffer(self, num_rows: int, row_bytes: int) -> Buffer:
        """Allocate and touch message rows, all zero; the host waits for them."""
        tensor = torch.zeros(num_rows, row_bytes, dtype=torch.uint8)
        return Buffer(array=tensor.numpy(), tensor=tensor)

    def make_pinned(self, num_rows: int, row_bytes: int) -> torch.Tensor:
        """Allocate host memory that the device copies from and to by itself -> uint8 [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)

    def copy_to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Start to copy a tensor to the host on the compute stream -> (host tensor, event of its arrival)."""
        return tensor, HostEvent()

    def copy_from_host(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the device on the compute stream; the host does not wait."""
        return torch.from_numpy(array)

    def synchronize(self) -> None:
        """Wait until all streams have done their work."""
        return None

    def record_streams(self) -> contextlib.AbstractContextManager[list[StreamSpan]]:
        """Record what the streams do within the with-block -> list, which holds it when the block has ended."""
        return contextlib.nullcontext([])

    def read_memory(self) -> tuple[str, int] | None:
        """Return the device's name, the same for all its ranks, and its free bytes; None for the node's memory."""
        return None


class HostEvent:
    """An event on the host: whatever was asked for has already happened."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True


class HostStream:
    """A stream of the host: its work is done when the call returns."""

    def record_event(self) -> HostEvent:
        """Return an event that has happened."""
        return HostEvent()

    def wait_event(self, event: Event) -> None:
        """Return at once: the event has happened."""


class HostDevice(Device):
    """The host's cores: arrays are message buffers as they are."""

    name = "host"
    torch_device = torch.device("cpu")
    row_ops: RowOps = TorchRowOps()
    compute_stream = send_stream = recv_stream = HostStream()

    def put(self, rows: torch.Tensor, target: torch.Tensor) -> HostEvent:
        """Copy rows [n, H] of any precision to message rows [n, H]."""
        target.copy_(rows)
        return HostEvent()

    def gather(self, table: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Gather message rows table[order] into a fresh tensor [n, H]."""
        return table.index_select(0, order)

    def scatter(self, rows: torch.Tensor, table: torch.Tensor, order: np.ndarray) -> None:
        """Scatter rows [n, H] to message rows table[order], order int64."""
        table.view(torch.uint8).numpy()[order] = rows.view(torch.uint8).numpy()  # twice as fast as torch's index_copy_

    def sum_rows(self, table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum message rows table[rows[t, k]] * weights[t, k] over k into a fresh tensor [T, H]."""
        return nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))


class PlainDevice(HostDevice):
    """The host in a GPU's place: what crosses between both is copied, so that a GPU's path runs anywhere."""

    name = "plain"

    def copy_to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Return a copy, and the event of its arrival."""
        return tensor.clone(), self.compute_stream.record_event()

    def copy_from_host(self, array: np.ndarray) -> torch.Tensor:
        """Return a copy."""
        return torch.from_numpy(array.copy())


def open_device(kind: str, local_rank: int) -> Device:
    """Open this rank's device: "host", "cuda", or "auto" (CUDA where there is a GPU and what it takes to use it).

    Ranks of a node take its GPUs in turn. Raises ClusterError when "cuda" is asked for and something is missing.
    """
    missing = None if kind == "host" else find_missing_cuda()
    match kind:
        case "host":
            return HostDevice()
        case "cuda" if missing:
            raise ClusterError(f'[comm] device = "cuda": {missing}; use "host", or "auto" to take what there is')
        case "cuda" | "auto":
            return HostDevice() if missing else cast(Device, CudaDevice(local_rank % count_gpus()))
        case _:
            raise ValueError(f"unknown device {kind}")
