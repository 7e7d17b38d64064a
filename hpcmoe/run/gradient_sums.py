"""Gradients are summed over the ranks that share a parameter, piece by piece, while the backward pass goes on.

On GPUs NCCL does so too. Where MPI carries the rows between them, sums go through the host when the pass is over.

A gradient is final when the last micro-batch has passed its op. The order in which they become final is the same on all
ranks under any schedule: head, last layer ... first layer, embedding. So all ranks begin the same sums in one order.
"""

from hpcmoe.comm.reduce import HostReducer, NcclReducer
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.wait import Backoff

FIRST_TAG = 1  # of a layer's sums; MPI keeps the order of the experts in it. 0 is of experts that move
GATHERED = 2**22  # numbers of others' gradients that a rank holds at once, 16 MB


class GradientSums:
    """The sums of one step: dense gradients over all ranks, experts' over those that hold the same shard of them."""

    def __init__(self, dense, experts, network, bucket_bytes, num_micro_batches):
        """dense: FlatGradients, experts: SharedExperts.

        All begins in finish() with bucket_bytes 0, and where a GPU's gradients go by MPI.
        """
        self.dense, self.experts, self.mesh = dense, experts, network.mesh
        groups = network.layers[0].dispatcher.sum_groups
        self.bucket = max(bucket_bytes // FLOAT32_BYTES, 1) if bucket_bytes else 2**31
        self.reducer = (
            HostReducer(self.mesh, network.device, self.bucket)
            if groups is None
            else NcclReducer(self.mesh, network.device, groups)
        )
        self.overlaps = bucket_bytes > 0 and self.reducer.can_overlap
        self.num_micro_batches = num_micro_batches
        self.jobs = []
        self.begin()

    def begin(self):
        """Expect the gradients of a step, when the sums of the last are over. Collective over all ranks."""
        self.drain()
        units = [*self.dense.end_of_part, *(("compute_backward", layer) for layer in self.experts.of_layer)]
        units.sort(key=lambda unit: (unit[0] == "embed_backward", unit[0] != "head", -unit[1]))
        self.left = dict.fromkeys(units, self.num_micro_batches)  # micro-batches that have yet to pass an op
        self.is_open, self.num_started, self.next_layer = True, 0, max(self.experts.of_layer, default=0)

    def complete_op(self, op):
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
        self.reducer.poke()
        self.jobs = [job for job in self.jobs if next(job, "over") != "over"]
        return len(self.jobs) < before

    def finish(self):
        """Begin what has not begun, and wait for all, once a step. Collective over all ranks."""
        if not self.is_open:
            return
        for part in list(self.left):
            self.start(part)
            if not self.reducer.can_overlap:  # the host lends memory for one part, not for all
                self.drain()
        self.drain()
        self.is_open = False

    def drain(self):
        """Wait for the sums under way."""
        backoff = Backoff()
        while self.jobs:
            if not self.poke():
                backoff.pause()
        for _ in self.reducer.finish():
            self.reducer.poke()
            backoff.pause()

    def all_gather_dense(self, counts):
        """Give all ranks what lies in the dense gradients' place in parts: rank r has the r-th, counts[r] numbers.

        Collective over all ranks.
        """
        self.jobs.append(self.gather_dense(counts))
        self.drain()

    def gather_dense(self, counts):
        """Gather what lies in the dense gradients' place."""
        if self.mesh.world.size > 1:
            with self.reducer.open_for_sums(self.dense.flat) as numbers:
                yield from self.reducer.all_gather(numbers, counts)

    def sum_dense(self, end):
        """Sum the dense gradients that are final, up to number `end`, in whole buckets but for the last."""
        if end < len(self.dense.flat):
            end -= end % self.bucket
        pieces, self.num_started = self.dense.flat[self.num_started : end], max(end, self.num_started)
        if len(pieces) and self.mesh.world.size > 1:
            with self.reducer.open_for_sums(pieces) as numbers:
                yield from self.reducer.all_reduce("world", numbers)

    def sum_experts(self, layer):
        """Give every replica of a layer's experts the same sum, bit for bit.

        In each group the first rank that holds an expert adds the others' gradients in rank order; these ranks sum over
        the data-parallel groups; then each gives the sum back.
        """
        held = self.experts.of_layer[layer]
        replicas = sorted((replica for replica in held if len(replica.ranks) > 1), key=lambda replica: replica.expert)
        if not replicas and self.mesh.dp.size == 1:
            return
        first, end = (held[0].begin, held[-1].end) if held else (0, 0)
        with self.reducer.open_for_sums(self.experts.flat[first:end]) as numbers:
            gradient_of = {replica: numbers[replica.begin - first : replica.end - first] for replica in held}
            for replica in replicas:
                yield from self.gather_replica(replica, gradient_of[replica])
            yield from self.sum_groups(layer, numbers[: sum(replica.size for replica in held if replica.owned)])
            tag = FIRST_TAG + layer
            to_others = [(tag, rank, gradient_of[c]) for c in replicas if c.owned for rank in c.ranks[1:]]
            from_first = [(tag, c.ranks[0], gradient_of[c]) for c in replicas if not c.owned]
            yield from self.reducer.send_recv(outgoing=to_others, incoming=from_first)

    def gather_replica(self, replica, gradient):
        """Have the first rank that holds an expert add the others' gradients, piece by piece in little memory.

        All ranks take replicas in the order of their experts, so that nobody waits in a circle.
        """
        tag, others = FIRST_TAG + replica.layer, replica.ranks[1:]
        pieces = gradient.split(max(GATHERED // len(others), 1))
        if not replica.owned:
            for piece in pieces:
                yield from self.reducer.send_recv(outgoing=[(tag, replica.ranks[0], piece)], incoming=())
            return
        gathered = gradient.new_empty(len(others), len(pieces[0]))
        for piece in pieces:
            rows = gathered[:, : len(piece)]
            incoming = [(tag, rank, row) for rank, row in zip(others, rows, strict=True)]
            yield from self.reducer.send_recv(outgoing=(), incoming=incoming)
            for row in rows:
                piece += row

    def sum_groups(self, layer, owned):
        """Sum over the data-parallel groups, layer after layer: all ranks of a communicator begin in one order."""
        if self.mesh.dp.size > 1:
            while self.next_layer != layer:
                yield
            self.next_layer -= 1
            yield from self.reducer.all_reduce("dp", owned)
