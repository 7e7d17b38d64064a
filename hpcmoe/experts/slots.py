"""Which slots hold a layer's experts, and which of an expert's replicas each of this rank's assignments goes to."""

from typing import Protocol

import numpy as np

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.dispatch.plan import SlotChooser, find_slots_of_shards


class ExpertSlots(Protocol):
    """What a layer needs to know of a placement (placement/result.py)."""

    @property
    def node_of_rank(self) -> np.ndarray:
        """Return the node of each rank [P]."""

    @property
    def rank_of_replica(self) -> np.ndarray:
        """Return the rank of each slot [S]."""

    @property
    def expert_of_replica(self) -> np.ndarray:
        """Return the expert of each slot [L, S]."""

    @property
    def slots_per_rank(self) -> int:
        """Return the number of slots of a rank."""

    def experts_of_rank(self, layer: int, rank: int) -> np.ndarray:
        """Return the experts in a rank's slots, EMPTY where there is none."""

    def shares_of_node(self, layer: int, node: int) -> np.ndarray:
        """Return the share of a node's tokens that each replica of an expert takes [S]."""


def make_chooser(num_experts: int, mesh: Mesh, placement: ExpertSlots, layer: int) -> SlotChooser:
    """Build the choice of replicas of a layer for this rank's tokens."""
    node = placement.node_of_rank[mesh.expert_index]
    return SlotChooser(
        placement.expert_of_replica[layer],
        placement.shares_of_node(layer, node),
        find_slots_of_shards(len(placement.rank_of_replica), placement.slots_per_rank, mesh.tensor_parallel),
        num_experts,
        mesh.group.rank,
    )
