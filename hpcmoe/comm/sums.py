"""Sums over groups of ranks of what lies on devices: by NCCL where a group has it, else by MPI through the host."""

import torch

from hpcmoe.comm.mpi import all_reduce


class Sums:
    """Adds up float32 tensors."""

    def __init__(self, groups=()):
        """groups: (communicator, the NCCL Group of the same ranks) of each that has one."""
        self.groups = groups

    def all_reduce(self, comm, tensor, poke=None):
        """Sum a tensor over the ranks of comm, in place, doing poke() while the host waits. Collective over comm."""
        for of_mpi, group in self.groups:
            if of_mpi is comm:
                group.all_reduce(tensor)
                return
        total = tensor.cpu().numpy()  # host waits for the device here
        all_reduce(comm, total, poke)
        tensor.copy_(torch.from_numpy(total))
