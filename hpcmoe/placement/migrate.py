"""The migration decision: the replicas that would move, what that costs, what it gains, and the rule for both."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.placement.cost import resource_seconds
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import list_resources, port_seconds
from hpcmoe.placement.result import Placement
from hpcmoe.placement.search.layer_data import EMPTY


class RankLayout(Protocol):
    """The ranks of a problem or of a placement: their slots, their nodes, and how far these are apart."""

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks, P."""

    @property
    def slots_per_rank(self) -> int:
        """Return the number of slots of each rank, s."""

    @property
    def node_of_rank(self) -> np.ndarray:
        """Return the node of each rank -> [P] int64."""

    @property
    def distance(self) -> np.ndarray:
        """Return the distance of two nodes -> [nodes, nodes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Replicas that ranks without them receive, [n] each, layer by layer, each from one rank that holds it."""

    layer: np.ndarray
    expert: np.ndarray
    source: np.ndarray  # rank
    source_slot: np.ndarray  # of that rank
    target: np.ndarray  # rank
    target_slot: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    def of_layer(self, layer: int) -> "Moves":
        """Return those of one layer."""
        here = self.layer == layer
        return Moves(**{field.name: getattr(self, field.name)[here] for field in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationDecision:
    """The gain and the cost of a change of placement, and whether it is accepted."""

    moves: Moves
    num_bytes: int  # that travel, in one expert-parallel group
    seconds_before: float  # of a step's busiest resources, under the loads now known
    seconds_after: float
    gain_seconds: float  # over the horizon
    noise_seconds: float  # by which the sampling of tokens may have made that gain, over the horizon
    cost_seconds: float  # of the move
    accepted: bool


def keep_slots(old: np.ndarray, new: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """Order each rank's slots of a layout so that what stays on a rank stays in its slot: old, new [S] -> [S]."""
    kept = np.full_like(new, EMPTY)
    for slots in np.arange(len(new)).reshape(-1, slots_per_rank):
        # Keep what stays.
        stays = np.isin(old[slots], new[slots]) & (old[slots] != EMPTY)
        kept[slots[stays]] = old[slots[stays]]

        # Put what is new where something went, then in slots that were empty.
        comes = new[slots][~np.isin(new[slots], old[slots]) & (new[slots] != EMPTY)]
        empty_before = old[slots] == EMPTY
        free = np.concatenate([slots[~stays & ~empty_before], slots[~stays & empty_before]])
        kept[free[: len(comes)]] = comes
    return kept


def list_moves(ranks: RankLayout, old: np.ndarray, new: np.ndarray) -> Moves:
    """List the replicas to send from layouts [L, S] to layouts whose slots are kept.

    Each comes from the nearest rank that holds it; of several, from the one that has least to send so far.
    """
    size, rows, sends = ranks.slots_per_rank, [], np.zeros(ranks.num_ranks, np.int64)
    for layer, slot in np.argwhere((new != old) & (new != EMPTY)).tolist():
        expert, target = int(new[layer, slot]), slot // size
        holders = np.flatnonzero(old[layer] == expert)
        distance = ranks.distance[ranks.node_of_rank[holders // size], ranks.node_of_rank[target]]
        nearest = holders[np.lexsort((sends[holders // size], distance))[0]]
        sends[nearest // size] += 1
        rows.append((layer, expert, nearest // size, nearest % size, target, slot % size))
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    return Moves(**dict(zip(Moves.__slots__, columns, strict=True)))


def plan_moves(before: Placement, after: Placement) -> tuple[Placement, Moves]:
    """Plan the change from one placement to another of the same layers and ranks -> (that other, moves to it).

    The slots of each rank are ordered anew, so that an expert that stays on a rank stays in its slot. Raises
    PlacementError where their sizes differ.
    """
    old, new, size = before.expert_of_replica, after.expert_of_replica, after.slots_per_rank
    if old.shape != new.shape or before.num_ranks != after.num_ranks:
        raise PlacementError(
            f"placements of {len(old)} layers x {before.num_ranks} ranks x {before.slots_per_rank} slots and of "
            f"{len(new)} x {after.num_ranks} x {size}: must be alike"
        )
    kept = np.stack([keep_slots(*layers, size) for layers in zip(old, new, strict=True)])
    split = None if after.split is None else _follow_slots(after.split, new, kept, size)
    after = dataclasses.replace(after, expert_of_replica=kept, split=split)
    return after, list_moves(after, old, kept)


def _follow_slots(split: np.ndarray, new: np.ndarray, kept: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """Order shares [L, nodes, S] of layouts [L, S] as their experts' slots on each rank have been."""
    by_rank = (len(new), -1, slots_per_rank)
    slot = np.argmax(kept.reshape(by_rank)[..., None] == new.reshape(by_rank)[:, :, None, :], axis=3)  # [L, P, s]
    of_ranks = split.reshape(*split.shape[:2], -1, slots_per_rank)  # [L, nodes, P, s]
    return np.take_along_axis(of_ranks, slot[:, None], axis=3).reshape(split.shape)


def estimate_move_seconds(problem: PlacementProblem, moves: Moves, bytes_of_expert: int) -> float:
    """Estimate how long moves take: bytes over bandwidth of the busiest link, port, uplink or memory."""
    nodes = problem.node_of_rank
    sent = np.zeros((problem.num_nodes, problem.num_nodes))
    np.add.at(sent, (nodes[moves.source], nodes[moves.target]), float(bytes_of_expert))
    seconds = [sent / problem.bytes_per_second, *port_seconds(problem, sent).values()]
    return max(float(array.max(initial=0.0)) for array in seconds)


def estimate_layer_seconds(
    problem: PlacementProblem, expert_of_replica: np.ndarray, split: np.ndarray | None, repeats: tuple[float, float]
) -> np.ndarray:
    """Estimate the seconds of each layer's busiest resource in a step -> [L].

    split [L, nodes, S] or None as a placement's; repeats: (transfers of a row, experts' work over that of a forward).
    """
    crossings, passes = repeats
    taken = np.zeros(problem.num_layers)
    for layer, experts in enumerate(expert_of_replica):
        seconds = resource_seconds(problem, layer, experts, None if split is None else split[layer])
        taken[layer] = max(
            (passes if name == "rank" else crossings) * float(seconds[name].max(initial=0.0))
            for name in list_resources(problem.objective)
        )
    return taken


def should_migrate(gains: float, noise: float, cost_seconds: float, horizon: float, margin: float) -> bool:
    """Return True if a migration pays: H (J(old) - J(new)) > (1 + h) cost + H sigma.

    gains: seconds a step; noise: their standard error; horizon: steps for which the loads are assumed to hold.
    """
    return horizon * gains > (1 + margin) * cost_seconds + horizon * noise


def standard_error(gains: list[float], number: int) -> float:
    """Compute the standard error of the mean of so many gains, from a sample of at least two."""
    return float(np.std(gains, ddof=1) / number**0.5)
