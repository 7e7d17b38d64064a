"""How a step's tokens were routed, summed over all ranks while the step goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.device import Device
from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.config import NetworkSpec
from hpcmoe.dispatch.router import Routing, load_balancing_grad, load_balancing_loss
from hpcmoe.experts.layer import Turns
from hpcmoe.experts.losses import AddLosses
from hpcmoe.wait import wait_all


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStats:
    """How a step's tokens were routed, over all ranks."""

    num_tokens: int
    num_dropped: int  # assignments
    tokens_of_expert: np.ndarray  # [L, E] assignments
    own_tokens: np.ndarray  # [L, E] assignments of this rank alone
    utilisation: np.ndarray  # U_e [L, E], actual / expected tokens
    aux_loss: float | None  # None of a router that is not ours
    z_loss: float | None


class RoutingSums:
    """Counts of a step's routings, micro-batch by micro-batch, and their sums over all ranks."""

    def __init__(self, spec: NetworkSpec, mesh: Mesh, device: Device, num_tokens: int):
        """num_tokens: of the step, over all ranks."""
        self.spec, self.mesh, self.device, self.num_tokens = spec, mesh, device, num_tokens
        self.routings: dict[int, list[Routing]] = {}  # micro-batch: of its layers so far
        self.counted: dict = {}  # micro-batch: (this rank's counts, the event of their arrival on the host)
        self.counts: dict = {}  # micro-batch: (array, the request for its sum over all ranks, None when it is done)
        self.loss_grads: dict = {}  # micro-batch: gradients of the routing losses, [L, E + 1] on the device
        self.own_tokens = np.zeros((spec.model.num_layers, spec.model.num_experts), np.int64)

    def add(self, micro_batch: int, routing: Routing, turns: Turns) -> Tensor:
        """Count the routing of a micro-batch's next layer -> its gates, from which the routing losses are derived too.

        Where gradients come back to these, they wait for the counts of all ranks as one of `turns`.
        """
        routings = self.routings.setdefault(micro_batch, [])
        routings.append(routing)
        layer = len(routings) - 1
        if not routing.gates.requires_grad:
            return routing.gates
        return AddLosses.apply(routing.gates, routing.probability_sum, routing.z_sum, self, turns, layer, micro_batch)

    def close(self, micro_batch: int) -> None:
        """Count a micro-batch, all of whose layers are routed, and start to sum where the device has counts ready."""
        self.counted[micro_batch] = self.device.copy_to_host(count_routings(self.routings.pop(micro_batch)))
        self.start()

    def start(self, wait_for: int = -1) -> None:
        """Start the sums of what is counted, in the order of the micro-batches, which is the same on every rank.

        The host waits for the device up to micro-batch wait_for, and for no other.
        """
        while (micro_batch := len(self.counts)) in self.counted:
            on_host, event = self.counted[micro_batch]
            if micro_batch <= wait_for:
                event.synchronize()
            elif not event.query():
                return
            counts = self.counted.pop(micro_batch)[0].numpy()
            self.own_tokens += counts[:, : self.own_tokens.shape[1]].astype(np.int64)
            self.counts[micro_batch] = (counts, start_all_reduce(self.mesh.world, counts))

    def poll(self, micro_batch: int) -> bool:
        """Advance the sums and return True once those of a micro-batch are done."""
        self.start()
        if micro_batch not in self.counts:
            return False
        _, request = self.counts[micro_batch]
        return request is None or request.Test()

    def until_done(self, micro_batch: int) -> Iterator[bool]:
        """Yield False until the sums of a micro-batch are done."""
        while not self.poll(micro_batch):
            yield False

    def wait(self, micro_batch: int) -> np.ndarray:
        """Wait for a micro-batch's counts, summed over all ranks -> float64 [L, 2 E + 2]."""
        self.start(micro_batch)
        counts, request = self.counts[micro_batch]
        if request is not None:
            wait_all([request])
            self.counts[micro_batch] = (counts, None)
        return counts

    def grads(self, layer: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return the routing losses' gradients with respect to a layer's probability_sum [E] and z_sum []."""
        if micro_batch not in self.loss_grads:
            self.loss_grads[micro_batch] = self.device.copy_from_host(self.compute_grads(self.wait(micro_batch)))
        grads = self.loss_grads[micro_batch][layer]
        return grads[:-1], grads[-1]

    def compute_grads(self, counts: np.ndarray) -> np.ndarray:
        """Compute the routing losses' gradients of all layers from a micro-batch's counts -> float32 [L, E + 1]."""
        dispatch, num_experts = self.spec.dispatch, self.spec.model.num_experts
        grads = np.full((len(counts), num_experts + 1), dispatch.z_loss_weight / self.num_tokens, np.float32)
        for layer, tokens in enumerate(torch.from_numpy(counts[:, :num_experts])):
            grads[layer, :-1] = dispatch.aux_loss_weight * load_balancing_grad(tokens, self.num_tokens)
        return grads

    def wait_stats(self) -> RoutingStats:
        """Wait for the sums of all micro-batches and return the step's RoutingStats."""
        counts = [self.wait(micro_batch) for micro_batch in sorted(self.counted.keys() | self.counts.keys())]
        return make_routing_stats(counts, self.num_tokens, self.own_tokens, self.spec.model.top_k)


def make_routing_stats(counts: list[np.ndarray], num_tokens: int, own_tokens: np.ndarray, top_k: int) -> RoutingStats:
    """Compute a step's RoutingStats from the micro-batches' counts [L, 2 E + 2], summed over all ranks."""
    num_experts, total = own_tokens.shape[1], sum(counts[1:], start=counts[0])
    rows = [torch.from_numpy(row[: 2 * num_experts]) for of_micro_batch in counts for row in of_micro_batch]
    losses = [load_balancing_loss(row[:num_experts], row[num_experts:], num_tokens) for row in rows]
    return RoutingStats(
        num_tokens=num_tokens,
        num_dropped=int(total[:, -1].sum()),
        tokens_of_expert=total[:, :num_experts],
        own_tokens=own_tokens,
        utilisation=total[:, :num_experts] / (num_tokens * top_k / num_experts),
        aux_loss=sum(map(float, losses)),
        z_loss=total[:, -2].sum() / num_tokens,
    )


@torch.no_grad()
def count_routings(routings: Sequence[Routing]) -> Tensor:
    """Count in a row per layer: assignments and probability of each expert, z, drops -> float64 [L, 2 E + 2]."""
    assignments, probabilities, z = (
        torch.stack([getattr(routing, name) for routing in routings])
        for name in ("tokens_of_expert", "probability_sum", "z_sum")
    )
    drops = torch.stack([z.new_zeros(()) if r.kept is None else (~r.kept).sum() for r in routings])
    return torch.cat([part.double() for part in (assignments, probabilities, z[:, None], drops[:, None])], dim=1)
