"""The meter beside a run: what each step took and sent, over all ranks, and the whole of it at the end."""

import time
from dataclasses import dataclass

import numpy as np

from hpcmoe.clock import Timer
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.report.batches import Batches
from hpcmoe.report.metrics import LinkBalance, compute_balancedness, compute_link_balance, sum_own_links
from hpcmoe.wait import wait_all

STAGES = tuple(Timer)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step took, over all ranks."""

    seconds: float  # on the wall, on this rank
    seconds_of_stage: dict  # mean over the ranks
    links: LinkBalance  # dispatched tokens between ranks
    link_sigma_of_layer: np.ndarray  # [L]
    balancedness: float  # mean / max of the tokens that ranks serve, layer by layer
    balancedness_of_layer: np.ndarray  # [L]
    num_tokens: int

    @property
    def tokens_per_second(self):
        """Tokens of all ranks by wall-clock second."""
        return self.num_tokens / self.seconds


class Meter:
    """Reads clock and traffic at the end of each step, and adds them up."""

    def __init__(self, dispatcher, mesh):
        self.dispatcher, self.mesh, self.clock = dispatcher, mesh, dispatcher.clock
        self.rows_to_peer = np.zeros(dispatcher.transport.size, dtype=np.int64)
        self.own_tokens = 0  # [L, E] assignments whose home is this rank, since pop_tokens
        self.batches = Batches()
        self.num_steps = self.num_tokens = self.num_dropped = 0
        self.utilisation = self.link_sigma = self.balancedness = 0.0  # sums over the steps
        self.link_sigma_of_layer = self.balancedness_of_layer = 0.0
        self.seconds = 0.0
        self.seconds_of_stage = dict.fromkeys(STAGES, 0.0)
        self.start()

    def start(self):
        """Begin a step: forget what happened since the last one."""
        self.clock.pop_seconds()
        self.dispatcher.pop_traffic()
        self.started = time.perf_counter()

    def read(self, outcome):
        """End a step that had this Outcome -> StepMetrics. Collective over all ranks."""
        seconds = time.perf_counter() - self.started
        spent = self.clock.pop_seconds()
        traffic = self.dispatcher.pop_traffic()
        assignments = np.stack([traffic.assignments[layer] for layer in sorted(traffic.assignments)])  # [L, P]
        served, sums, stages = self.sum_over_ranks(assignments, [spent.get(stage, 0.0) for stage in STAGES])
        links, *of_layers = (compute_link_balance(*row) for row in sums)
        of_layer, whole = compute_balancedness(served)
        metrics = StepMetrics(
            seconds=seconds,
            seconds_of_stage=dict(zip(STAGES, stages / self.mesh.world.size, strict=True)),
            links=links,
            link_sigma_of_layer=np.array([layer.sigma for layer in of_layers]),
            balancedness=whole,
            balancedness_of_layer=of_layer,
            num_tokens=outcome.num_tokens,
        )
        self.rows_to_peer += traffic.rows.sum(axis=0)
        self.batches.add(traffic.batches)
        self.add(metrics, outcome.stats)
        return metrics

    def sum_over_ranks(self, assignments, spent):
        """Sum over all ranks, in one message, what this one sent in each layer [L, P] and how long each stage took.

        Gives the assignments that each rank serves [L, ranks], the sums of links of all layers and of each [1 + L, 3], and
        the seconds [stages]. Collective over all ranks.
        """
        mesh, rank = self.mesh, self.dispatcher.transport.rank
        served = np.zeros((len(assignments), mesh.data_parallel, assignments.shape[1]))
        served[:, mesh.data_index] = assignments
        links = np.stack([sum_own_links(row, rank) for row in (assignments.sum(axis=0), *assignments)])
        sums = all_reduce(mesh.world, np.concatenate([served.ravel(), links.ravel(), spent]))
        of_served, of_links, seconds = np.split(sums, [served.size, served.size + links.size])
        return of_served.reshape(len(assignments), -1), of_links.reshape(links.shape), seconds

    def add(self, metrics, stats):
        """Add a step to the totals."""
        self.utilisation = self.utilisation + stats.utilisation
        self.own_tokens = self.own_tokens + stats.own_tokens
        self.num_dropped += stats.num_dropped
        self.link_sigma += metrics.links.sigma
        self.link_sigma_of_layer = self.link_sigma_of_layer + metrics.link_sigma_of_layer
        self.balancedness += metrics.balancedness
        self.balancedness_of_layer = self.balancedness_of_layer + metrics.balancedness_of_layer
        self.num_steps += 1
        self.num_tokens += metrics.num_tokens
        self.seconds += metrics.seconds
        for stage, seconds in metrics.seconds_of_stage.items():
            self.seconds_of_stage[stage] += seconds

    def pop_tokens(self, node_of_rank):
        """Sum the assignments since the last call by home node -> [L, nodes, E] on rank 0, else None. Collective over world.

        None there too when no step was read since.
        """
        own, self.own_tokens = self.own_tokens, 0
        return None if np.ndim(own) == 0 else gather_by_node(self.mesh.world, own, node_of_rank)


def gather_by_node(world, own, node_of_rank):
    """Sum assignments whose home is a rank, own int64 [..., L, E], by node -> [..., L, nodes, E] on rank 0, else None.

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
