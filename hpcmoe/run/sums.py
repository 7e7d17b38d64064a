"""Gradients are summed over the ranks that share a parameter, piece by piece, while the backward pass goes on.

Those on GPUs are summed when it is over: dense ones by NCCL where that carries the rows, the others through the host.

A gradient is final when the last micro-batch has passed its op. The order in which they become final is the same on all
ranks under any schedule: head, last layer ... first layer, embedding. So all ranks begin the same sums in one order.
"""

import contextlib

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.run.room import FLOAT32
from hpcmoe.wait import Patience


class GradientSums:
    """The sums of one step: dense gradients over all ranks, experts' over those that hold the same shard of them."""

    def __init__(self, dense, experts, network):
        """dense: FlatGradients, experts: SharedExperts. With bucket_bytes 0, and on GPUs, all begins in finish()."""
        self.dense, self.experts, self.mesh, self.device = dense, experts, network.mesh, network.device
        self.nccl = network.layers[0].exchange.nccl
        bucket_bytes, on_host = network.config.train.bucket_bytes, self.device.name == "host"
        self.overlaps = bucket_bytes > 0 and on_host  # for a GPU's gradients the host would have to wait
        self.bucket = max(bucket_bytes // FLOAT32, 1) if bucket_bytes else 2**31
        self.num_micro_batches = network.config.pipeline.micro_batches
        self.jobs = []
        self.begin()

    def begin(self):
        """Expect the gradients of a step, when the sums of the last are over. Collective over all ranks."""
        self.drain()
        units = [*self.dense.end_of_part, *(("compute_backward", layer) for layer in self.experts.of_layer)]
        units.sort(key=lambda unit: (unit[0] == "embed_backward", unit[0] != "head", -unit[1]))
        self.left = dict.fromkeys(units, self.num_micro_batches)  # micro-batches that have yet to pass an op
        self.is_open, self.num_started, self.next_layer = True, 0, max(self.experts.of_layer, default=0)

    def passed(self, op):
        """Hear that a micro-batch has passed an op, and begin to sum what is final now."""
        part = op.stage, op.layer
        if not (self.overlaps and self.is_open and part in self.left):
            return
        self.left[part] -= 1
        if self.left[part] == 0:
            self.start(part)

    def start(self, part):
        """Begin to sum the gradients that an op has ended."""
        del self.left[part]
        stage, layer = part
        of_experts = stage == "compute_backward"
        self.jobs.append(self.sum_experts(layer) if of_experts else self.sum_dense(self.dense.end_of_part[part]))
        self.poke()

    def poke(self):
        """Take all sums under way as far as they go without waiting -> whether one has ended."""
        before = len(self.jobs)
        self.jobs = [job for job in self.jobs if next(job, "over") != "over"]
        return len(self.jobs) < before

    def finish(self):
        """Begin what has not begun, and wait for all, once a step. Collective over all ranks."""
        if not self.is_open:
            return
        for part in list(self.left):
            self.start(part)
        self.drain()
        self.is_open = False

    def drain(self):
        """Wait for the sums under way."""
        patience = Patience()
        while self.jobs:
            if not self.poke():
                patience.pause()

    def sum_dense(self, end):
        """Sum the dense gradients that are final, up to number `end`, in whole buckets but for the last.

        By NCCL all at once.
        """
        if self.nccl is not None:
            if end == len(self.dense.flat):
                self.nccl.all_reduce(self.dense.flat)
            return
        if end < len(self.dense.flat):
            end -= end % self.bucket
        pieces, self.num_started = self.dense.flat[self.num_started : end], max(end, self.num_started)
        with self.on_host(pieces) as host:
            yield from sum_over(self.mesh.world, host, self.bucket)

    def sum_experts(self, layer):
        """Give every copy of a layer's experts the same sum, bit for bit."""
        held = self.experts.of_layer[layer]
        own = self.experts.flat[held[0].begin : held[-1].end] if held else self.experts.flat[:0]
        with self.on_host(own) as host:
            yield from self.sum_copies(layer, held, host)

    def sum_copies(self, layer, held, host):
        """Sum the gradients of a layer's experts, those held here in one array.

        In each group the first rank that holds an expert adds the others' gradients in rank order; these ranks sum over
        the data-parallel groups; then each gives the sum back.
        """
        comm, first = self.experts.comm, held[0].begin if held else 0
        gradient_of = {copy: host[copy.begin - first : copy.end - first] for copy in held}
        copies = [copy for copy in held if len(copy.ranks) > 1]

        # Gather to the first rank of each expert.
        gathered = {copy: np.empty((len(copy.ranks) - 1, copy.size), np.float32) for copy in copies if copy.owned}
        requests = [
            comm.Irecv(row, rank, copy.tag)
            for copy, rows in gathered.items()
            for row, rank in zip(rows, copy.ranks[1:], strict=True)
        ]
        requests += [comm.Isend(gradient_of[copy], copy.ranks[0], copy.tag) for copy in copies if not copy.owned]
        yield from until_done(requests)
        for copy, rows in gathered.items():
            for row in rows:
                gradient_of[copy] += row

        # Sum over the groups, layer after layer: all ranks of a communicator begin in one order.
        while self.next_layer != layer:
            yield
        self.next_layer -= 1
        yield from sum_over(self.mesh.dp, host[: sum(copy.size for copy in held if copy.owned)], self.bucket)

        # Give the sums back.
        requests = [comm.Isend(gradient_of[copy], rank, copy.tag) for copy in gathered for rank in copy.ranks[1:]]
        requests += [comm.Irecv(gradient_of[copy], copy.ranks[0], copy.tag) for copy in copies if not copy.owned]
        yield from until_done(requests)

    @contextlib.contextmanager
    def on_host(self, gradients):
        """Have gradients in the host's memory while they are summed: on the host the same, from a GPU a copy."""
        host, event = self.device.fetch(gradients)
        event.synchronize()  # host waits for the device here: all ranks are to begin their sums in one order
        yield host.numpy()
        if host is not gradients:
            gradients.copy_(host, non_blocking=True)


def sum_over(comm, array, bucket):
    """Sum a flat array over the ranks in place, `bucket` numbers at once; yields while it waits."""
    if comm.size > 1:
        pieces = [array[begin : begin + bucket] for begin in range(0, len(array), bucket)]
        yield from until_done([start_all_reduce(comm, piece) for piece in pieces])


def until_done(requests):
    """Yield while any request is under way."""
    while not MPI.Request.Testall(requests):
        yield
