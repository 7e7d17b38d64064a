"""Routing losses: their gradients join those of the gates, once all ranks' choices are known.

Between a layer's choice of experts and the backward pass of its gates other work goes on, and the counts are summed.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcmoe.clock import Stage
from hpcmoe.comm.device import Device
from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.dispatch.router import Routing, load_balancing_grad
from hpcmoe.experts.layer import Turns
from hpcmoe.wait import Backoff


class LossSums(Protocol):
    """Counts of all ranks' routings on their way, and the gradients that follow from them."""

    def until_done(self, micro_batch: int) -> Iterator[bool]:
        """Yield False until the sums of a micro-batch are done."""

    def grads(self, layer: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return the losses' gradients with respect to a layer's probability_sum [E] and z_sum []."""


class AddLosses(torch.autograd.Function):
    """Passes gates on; where their gradients come back, adds those of the routing losses."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        _probability: Tensor,
        _z: Tensor,
        sums: LossSums,
        turns: Turns,
        layer: int,
        micro: int,
    ) -> Tensor:
        """Return gates [T, K]."""
        ctx.sums, ctx.turns, ctx.layer, ctx.micro_batch = sums, turns, layer, micro
        return gates.view_as(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gates [T, K], and of the routing's probability_sum [E] and z_sum []."""
        sums, layer, micro_batch = ctx.sums, ctx.layer, ctx.micro_batch
        ctx.turns.run_stages(layer, [(Stage.ROUTE_BACKWARD, sums.until_done(micro_batch))])
        return grad_gates, *sums.grads(layer, micro_batch), None, None, None, None


class CallSums:
    """The sum over all ranks of one call's counts."""

    def __init__(self, comm: MPI.Comm, device: Device, counts: Tensor) -> None:
        """comm: all ranks, which make the same calls in its order; counts: this rank's, float64 [n], overwritten."""
        self.comm = comm
        self.counts, self.event = device.copy_to_host(counts)
        self.request: MPI.Request | None = None
        self.done = False

    def try_start(self) -> bool:
        """Start the sum if this rank's counts are on the host -> whether it has started."""
        if self.request is None and self.event.query():
            self.request = start_all_reduce(self.comm, self.counts.numpy())
        return self.request is not None

    def poke(self) -> bool:
        """Advance the sum without waiting -> whether it has ended now."""
        if self.done or self.request is None or not self.request.Test():
            return False
        self.done = True
        return True

    def until_done(self) -> Iterator[bool]:
        """Yield False until the sum is done: who waits pokes it."""
        while not self.done:
            yield False


class CallLosses:
    """The routing losses of one call: LossSums of its one layer and micro-batch."""

    def __init__(self, sums: CallSums, device: Device, weights: tuple[float, float]) -> None:
        """sums: of the tokens of each expert, and of all tokens, [E + 1]; weights: of the aux and the z loss."""
        self.sums, self.device, self.weights = sums, device, weights

    def until_done(self, _micro_batch: int) -> Iterator[bool]:
        """Yield False until the sum is done."""
        return self.sums.until_done()

    def grads(self, _layer: int, _micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return the losses' gradients with respect to probability_sum [E] and z_sum []."""
        counts, (aux_weight, z_weight) = self.sums.counts, self.weights
        num_tokens = max(int(counts[-1]), 1)
        of_probability = aux_weight * load_balancing_grad(counts[:-1], num_tokens)
        grads = self.device.copy_from_host(np.append(of_probability.numpy(), np.float32(z_weight / num_tokens)))
        return grads[:-1], grads[-1]


class LaneSums:
    """The sums of all calls, each lane's on a communicator of its own: lanes need not keep step with each other."""

    def __init__(self, comms: Sequence[MPI.Comm], device: Device) -> None:
        """comms: one for each micro-batch in flight."""
        self.comms, self.device = comms, device
        self.waiting: list[deque[CallSums]] = [deque() for _ in comms]  # for their counts to reach the host
        self.started: list[CallSums] = []

    def add(self, turns: Turns, layer: int, routing: Routing, weights: tuple[float, float]) -> Tensor:
        """Start to sum a call's counts over all ranks -> its gates, from which the routing losses are derived too."""
        if not routing.gates.requires_grad or not any(weights):
            return routing.gates
        num_tokens = routing.tokens_of_expert.new_full((1,), len(routing.experts))
        sums = self.start(turns, torch.cat([routing.tokens_of_expert, num_tokens]).double())
        losses = CallLosses(sums, self.device, weights)
        return AddLosses.apply(
            routing.gates, routing.probability_sum, routing.z_sum, losses, turns, layer, turns.micro_batch
        )

    def start(self, turns: Turns, counts: Tensor) -> CallSums:
        """Start to sum the counts of a call of this micro-batch, float64 [n], over all ranks, which all make it."""
        lane = turns.micro_batch % len(self.comms)
        sums = CallSums(self.comms[lane], self.device, counts)
        self.waiting[lane].append(sums)
        self.poke()
        return sums

    def finish(self) -> None:
        """Wait for the sums of calls without a backward pass too. Collective over the group."""
        backoff = Backoff()
        while self.started or any(self.waiting):
            if not self.poke():
                backoff.pause()

    def poke(self) -> bool:
        """Start and advance the sums -> whether one has ended."""
        for waiting in self.waiting:
            while waiting and waiting[0].try_start():
                self.started.append(waiting.popleft())
        ended = [sums.poke() for sums in self.started]
        self.started = [sums for sums in self.started if not sums.done]
        return any(ended)
