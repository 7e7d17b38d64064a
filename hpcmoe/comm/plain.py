"""The host in a GPU's place: the same methods on its own memory, so that the way of the rows can be tried anywhere."""

import contextlib

import numpy as np
import torch

from hpcmoe.comm.all_to_all import Buffer
from hpcmoe.comm.device import HostStream
from hpcmoe.comm.rows import TorchRowOps


class PlainDevice:
    """Arrays on the host, and streams whose work is done when it is asked for."""

    name = "plain"
    torch_device = torch.device("cpu")
    row_ops = TorchRowOps()

    def __init__(self):
        self.compute_stream, self.send_stream, self.recv_stream = HostStream(), HostStream(), HostStream()

    def bind_thread(self):
        """Need nothing: the host's memory is every thread's."""

    def use(self, stream):
        """Have torch work on a stream within the with-block."""
        return contextlib.nullcontext(stream)

    def make_buffer(self, num_rows, row_bytes):
        """Allocate message rows, all zero -> Buffer."""
        array = np.zeros((num_rows, row_bytes), np.uint8)
        return Buffer(array=array, tensor=torch.from_numpy(array))

    def make_pinned(self, num_rows, row_bytes):
        """Allocate host memory that the device copies from and to -> uint8 tensor [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8)

    def copy_to_host(self, tensor):
        """Begin to copy a tensor to the host on the compute stream -> (host tensor, event of its arrival)."""
        return tensor.clone(), self.compute_stream.record_event()

    def copy_from_host(self, array):
        """Copy a NumPy array to the device on the compute stream -> tensor."""
        return torch.from_numpy(array.copy())

    def synchronize(self):
        """Wait until all streams have done their work."""

    def read_memory(self):
        """Tell of no memory but the node's -> None."""
        return None
