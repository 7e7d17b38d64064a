"""The experts of a library's layers move to where their tokens would have them."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import numpy as np
from torch.optim import Optimizer as TorchOptimizer

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.experts.moe import Experts
from hpcmoe.placement.migrate import plan_moves
from hpcmoe.placement.result import Placement
from hpcmoe.prepare.layer import make_layer_experts, place_layer
from hpcmoe.run.move_experts import LayerChange, move_experts


def rebalance_layers(
    mesh: Mesh, topology: Topology, loads: Mapping[Experts, np.ndarray], optimizer: TorchOptimizer | None
) -> int:
    """Place the experts of layers anew for loads [nodes, E] of each, and move them -> how many have moved.

    Collective over mesh.world. The optimizer's state of them moves too.
    """
    changes, placements = list[LayerChange](), dict[Experts, Placement]()
    for layer, tokens in loads.items():
        described = dataclasses.replace(make_layer_experts(layer.options, mesh), loads=tokens)
        before = cast(Placement, layer.placement)
        placements[layer], moves = plan_moves(before, place_layer(topology, mesh, described))
        changes.append(
            LayerChange(
                local=layer.local,
                before=before.expert_of_replica[0],
                after=placements[layer].expert_of_replica[0],
                moves=moves,
                make_replica=layer.make_replica,
            )
        )
    move_experts(mesh.ep, changes, optimizer)
    for layer, placement in placements.items():
        layer.follow_placement(placement)
    return sum(len(change.moves) for change in changes)
