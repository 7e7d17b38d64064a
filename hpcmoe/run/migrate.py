"""Experts of a run move to other ranks while its next step begins: their slots, choosers and gradients follow."""

from hpcmoe.experts.feed_forward import Expert, make_empty_weights
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.experts.slots import make_chooser
from hpcmoe.model.language import make_expert_from
from hpcmoe.placement.migrate import Moves
from hpcmoe.prepare.placement import RunPlacement
from hpcmoe.run.job import Job
from hpcmoe.run.move_experts import LayerChange, Migration, start_moves
from hpcmoe.run.optimizer import Optimizer


def start_migration(job: Job, optimizer: Optimizer | None, layout: RunPlacement, moves: Moves) -> Migration:
    """Set another placement after a step, and start to move the experts. Collective over ep.

    Choosers and the optimizer change at once; each layer's experts wait for their weights.
    """
    network, mesh = job.stepper.network, job.mesh
    job.meter.batches.credit_experts(job.placement, mesh.expert_index)
    changes = list_changes(job, layout, moves)
    migration = start_moves(mesh.ep, changes, None if optimizer is None else optimizer.adamw)
    for number, layer in enumerate(network.layers):
        layer.experts.chooser = make_chooser(job.spec.model.num_experts, mesh, layout.placement, number)
    job.run_placement = layout
    if optimizer is not None:
        optimizer.follow_placement(layout.placement)
    return migration


def list_changes(job: Job, layout: RunPlacement, moves: Moves) -> list[LayerChange]:
    """List the layers of a run with the experts that move in each, if any."""
    device = job.stepper.network.device.torch_device

    def make_replica() -> Expert:
        """Allocate an expert of the run, on its device."""
        weights = make_empty_weights(make_expert_shape(job.spec), job.mesh.tensor_index, job.mesh.tensor_parallel)
        return make_expert_from(job.spec, weights).to(device)

    return [
        LayerChange(
            local=layer.experts.local,
            before=job.placement.expert_of_replica[number],
            after=layout.placement.expert_of_replica[number],
            moves=moves.of_layer(number),
            make_replica=make_replica,
        )
        for number, layer in enumerate(job.stepper.network.layers)
    ]
