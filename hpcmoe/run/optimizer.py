"""Gradients are summed where parameters are shared, clipped by their global norm, and applied by AdamW.

AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; clipping: Pascanu et al. 2013 (arXiv:1211.5063);
optimizer state sharded over the ranks: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5.1.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.reduce import make_reducer
from hpcmoe.config import Config
from hpcmoe.experts.layer import ExpertLayer
from hpcmoe.model.language import LanguageModel
from hpcmoe.placement.result import Placement
from hpcmoe.run.flat_gradients import FlatGradients, PlacedExperts, SharedExperts
from hpcmoe.run.gradient_sums import GradientSums
from hpcmoe.run.schedules import learning_rate_at
from hpcmoe.run.slices import cut_rows

MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}  # our name: AdamW's


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteppedRows:
    """Rows of a parameter that AdamW steps on this rank: a view, whose state is in Optimizer.adamw."""

    rows: nn.Parameter
    first: int


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its wrappers, which import torch's compiler: two seconds of CPU on each rank."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Optimizer:
    """AdamW over this rank's parameters, dense and expert.

    stepped_rows[parameter] are those stepped on this rank, which keeps their state: all of an expert that it holds; all
    of a dense parameter, or with shard_optimizer the rows of this rank's share.
    """

    def __init__(self, network: LanguageModel, placement: Placement, config: Config, mesh: Mesh):
        self.network, self.train, self.mesh = network, config.train, mesh
        self.num_micro_batches, self.num_steps = config.pipeline.micro_batches, config.run.steps
        self.dense = FlatGradients(network.dense_parts())
        self.share_gradients(placement)

        self.stepped_rows = {p: [SteppedRows(rows=p, first=0)] for p in network.parameters()}
        if self.train.shard_optimizer:
            self.stepped_rows |= cut_stepped_rows(self.dense, mesh.world.rank, mesh.world.size)

        # Norms and biases are not decayed.
        stepped = [rows.rows for of_parameter in self.stepped_rows.values() for rows in of_parameter]
        groups = [{"params": [p for p in stepped if p.dim() > 1], "weight_decay": self.train.weight_decay},
                  {"params": [p for p in stepped if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
        betas = (self.train.beta1, self.train.beta2)
        self.adamw = AdamW(groups, lr=self.train.learning_rate, betas=betas, eps=self.train.epsilon, fused=True)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the last step."""
        return float(self.adamw.param_groups[0]["lr"])

    def share_gradients(self, placement: Placement) -> None:
        """Sum the experts' gradients by a placement from the next step on."""
        layers = [make_placed_experts(placement, n, layer.experts) for n, layer in enumerate(self.network.layers)]
        self.shared = SharedExperts(layers[::-1], self.mesh.ep)

        # Order the sums as the backward pass goes: a layer's experts before its dense part.
        head, *blocks, embedding = self.dense.parts
        by_layer = [part for pair in zip(self.shared.of_layer, blocks, strict=True) for part in pair]
        groups = self.network.layers[0].experts.dispatcher.sum_groups
        reducer = make_reducer(self.mesh, self.network.device, groups, self.train.bucket_bytes)
        order = [head, *by_layer, embedding]
        self.sums = self.network.sums = GradientSums(self.dense, self.shared, order, reducer)

    def follow_placement(self, placement: Placement) -> None:
        """Step and sum the parameters of another placement's experts, which AdamW has already (run.move_experts)."""
        # Free the gradients before those of the new placement are allocated.
        held = set(self.network.expert_parameters())
        gone = self.stepped_rows.keys() - held - set(self.dense.parameters)
        for parameter in gone | held:
            parameter.grad = None
        self.network.sums = None
        del self.shared, self.sums
        self.share_gradients(placement)
        for parameter in gone:
            del self.stepped_rows[parameter]
        self.stepped_rows |= {p: [SteppedRows(rows=p, first=0)] for p in held - self.stepped_rows.keys()}

    def zero_gradients(self) -> None:
        """Set the gradients to zero before a step. Collective over world."""
        self.sums.begin(self.num_micro_batches if self.train.bucket_bytes else None)
        self.dense.flat.zero_()
        self.shared.flat.zero_()

    def step(self, number: int) -> float:
        """Sum, clip and apply the gradients of step `number` (from 1) -> their global norm before clipping.

        Collective over world.
        """
        self.sums.finish()
        norm = self.sums.global_norm()
        if 0 < self.train.clip_norm < norm:
            self.dense.flat *= self.train.clip_norm / norm
            self.shared.flat *= self.train.clip_norm / norm
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate_at(number, self.train, self.num_steps)
        self.adamw.step()
        if self.train.shard_optimizer:
            self.gather_dense()
        for layer in self.network.layers:
            layer.experts.local.refresh()
        return norm

    def gather_dense(self) -> None:
        """Gather the rows that other ranks stepped, in the memory of the applied gradients. Collective over world."""
        for parameter, grad in self.dense.grad_of.items():
            for stepped in self.stepped_rows[parameter]:
                grad[stepped.first : stepped.first + len(stepped.rows)] = stepped.rows.detach()
        shares = [cut_rows(self.dense.parameters, rank, self.mesh.world.size) for rank in range(self.mesh.world.size)]
        counts = [sum((end - first) * p[0].numel() for p, first, end in share) for share in shares]
        self.sums.all_gather_dense(counts)
        for parameter, grad in self.dense.grad_of.items():
            parameter.data.copy_(grad)


def make_placed_experts(placement: Placement, number: int, layer: ExpertLayer) -> PlacedExperts:
    """Build what sums of gradients need to know of a layer's experts."""
    expert_of_replica, rank_of_replica = placement.expert_of_replica[number], placement.rank_of_replica
    return PlacedExperts(
        layer=number, local=layer.local, expert_of_replica=expert_of_replica, rank_of_replica=rank_of_replica
    )


def make_zero_state(rows: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """Build AdamW's state of rows that it has not stepped yet, after so many steps: moments of zero."""
    moments = {name: torch.zeros_like(rows, dtype=torch.float32) for name in MOMENTS.values()}
    return {"step": torch.tensor(float(step), device=rows.device)} | moments


def cut_stepped_rows(dense: FlatGradients, index: int, num_shares: int) -> dict[nn.Parameter, list[SteppedRows]]:
    """Build the SteppedRows of one share, by parameter."""
    stepped: dict[nn.Parameter, list[SteppedRows]] = {parameter: [] for parameter in dense.parameters}
    for parameter, first, end in cut_rows(dense.parameters, index, num_shares):
        rows = nn.Parameter(parameter.data[first:end])
        rows.grad = dense.grad_of[parameter][first:end]
        stepped[parameter].append(SteppedRows(rows=rows, first=first))
    return stepped
