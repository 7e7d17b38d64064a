"""The meter of a run: time and traffic of each step over all ranks, and their sums over the measured steps."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from hpcmoe.clock import Clock, Timer
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.dispatch.traffic import Traffic
from hpcmoe.model.routing_stats import RoutingStats
from hpcmoe.report.batches import Batches
from hpcmoe.report.metrics import compute_balancedness, compute_link_balance, sum_own_links
from hpcmoe.wait import wait_all

STAGES = tuple(Timer)
MEANS = ("utilisation", "balancedness", "balancedness_of_layer", "link_sigma", "link_sigma_of_layer")  # over the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Figures of one step, over all ranks."""

    seconds: float  # wall-clock, on this rank
    seconds_of_stage: dict[Timer, float]  # mean over the ranks
    num_tokens: int
    num_dropped: int
    utilisation: np.ndarray  # U_e [L, E]
    link_tokens_mean: float  # dispatched tokens of a link between ranks
    link_sigma: float  # their standard deviation / mean
    link_sigma_of_layer: np.ndarray  # [L]
    balancedness: float  # mean / max of the tokens that ranks serve, layer by layer
    balancedness_of_layer: np.ndarray  # [L]

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of all ranks per wall-clock second."""
        return self.num_tokens / self.seconds


class MeteredDispatcher(Protocol):
    """What the meter reads of what carries rows."""

    @property
    def clock(self) -> Clock:
        """Return the clock of its seconds."""

    @property
    def transport(self) -> Any:
        """Return what tells the number of ranks, and this rank's."""

    def pop_traffic(self) -> Traffic:
        """Return what was sent since the last call."""


class Meter:
    """Reads clock and traffic at the end of each step, and sums the steps' figures."""

    def __init__(self, dispatcher: MeteredDispatcher, mesh: Mesh):
        self.dispatcher, self.mesh, self.clock = dispatcher, mesh, dispatcher.clock
        self.rows_to_peer = np.zeros(dispatcher.transport.size, dtype=np.int64)
        self.own_tokens: Any = 0  # [L, E] assignments whose home is this rank, since pop_tokens
        self.batches = Batches()
        self.num_steps = 0
        self.hidden_share: float | None = None  # of the transfers, behind the experts' work, where it was traced
        self.sums: dict[str, Any] = dict.fromkeys((*MEANS, "num_tokens", "num_dropped", "seconds"), 0)
        self.seconds_of_stage = dict.fromkeys(STAGES, 0.0)
        self.start()

    def start(self) -> None:
        """Start a step: discard time and traffic since the last one."""
        self.clock.pop_seconds()
        self.dispatcher.pop_traffic()
        self.started = time.perf_counter()

    def read(self, stats: RoutingStats) -> StepMetrics:
        """End a step of these RoutingStats and return its figures. Collective over world."""
        seconds = time.perf_counter() - self.started
        spent = self.clock.pop_seconds()
        traffic = self.dispatcher.pop_traffic()

        # Sum over the ranks what was sent, and reduce it to figures of balance.
        assignments = np.stack([traffic.assignments[layer] for layer in sorted(traffic.assignments)])  # [L, P]
        served, sums, stages = self.sum_over_ranks(assignments, [spent.get(stage, 0.0) for stage in STAGES])
        (link_tokens_mean, link_sigma), *of_layers = (compute_link_balance(*row) for row in sums)
        balancedness_of_layer, balancedness = compute_balancedness(served)
        metrics = StepMetrics(
            seconds=seconds,
            seconds_of_stage=dict(zip(STAGES, stages / self.mesh.world.size, strict=True)),
            num_tokens=stats.num_tokens,
            num_dropped=stats.num_dropped,
            utilisation=stats.utilisation,
            link_tokens_mean=link_tokens_mean,
            link_sigma=link_sigma,
            link_sigma_of_layer=np.array([sigma for _, sigma in of_layers]),
            balancedness=balancedness,
            balancedness_of_layer=balancedness_of_layer,
        )

        # Add the step to the run's sums.
        self.rows_to_peer += traffic.rows.sum(axis=0)
        self.batches.add(traffic.batches)
        self.own_tokens = self.own_tokens + stats.own_tokens
        self.num_steps += 1
        for name in self.sums:
            self.sums[name] = self.sums[name] + getattr(metrics, name)
        for stage in STAGES:
            self.seconds_of_stage[stage] += metrics.seconds_of_stage[stage]
        return metrics

    def sum_over_ranks(self, assignments: np.ndarray, spent: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sum what ranks sent in each layer [L, P] and the seconds of each stage, in one message.

        Collective over world. Returns the assignments that each rank serves [L, ranks], the sums over links of all
        layers and of each [1 + L, 3], and the seconds [stages].
        """
        mesh, rank = self.mesh, self.dispatcher.transport.rank
        served = np.zeros((len(assignments), mesh.data_parallel, assignments.shape[1]))
        served[:, mesh.data_index] = assignments
        links = np.stack([sum_own_links(row, rank) for row in (assignments.sum(axis=0), *assignments)])
        sums = all_reduce(mesh.world, np.concatenate([served.ravel(), links.ravel(), spent]))
        of_served, of_links, seconds = np.split(sums, [served.size, served.size + links.size])
        return of_served.reshape(len(assignments), -1), of_links.reshape(links.shape), seconds

    def pop_tokens(self, node_of_rank: np.ndarray) -> np.ndarray | None:
        """Sum the assignments since the last call by home node -> [L, nodes, E] on rank 0. Collective over world.

        Returns None on the other ranks, and where no step was read since.
        """
        own, self.own_tokens = self.own_tokens, 0
        return None if np.ndim(own) == 0 else gather_by_node(self.mesh.world, own, node_of_rank)


def gather_by_node(world: MPI.Comm, own: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray | None:
    """Sum counts of this rank, own int64 [..., L, E], by node -> [..., L, nodes, E] on rank 0, else None.

    Collective over world.
    """
    own = np.ascontiguousarray(own)
    everyone = np.zeros((world.size, *own.shape), np.int64) if world.rank == 0 else None
    wait_all([world.Igather(own, everyone)])
    if everyone is None:
        return None
    of_node = np.zeros((max(node_of_rank) + 1, *own.shape), np.int64)
    np.add.at(of_node, node_of_rank, everyone)
    return np.moveaxis(of_node, 0, -2)
