"""Experts whose arithmetic is another library's: each a module of that library with one expert.

The module is one of Hugging Face transformers' fused experts (hpcmoe.model.hf): its parameters are [E, ...], and
forward.__wrapped__(x [n, H], indices [n, K], weights [n, K]) is its family's own loop over them. Cut to one expert it
computes y = expert(x) with every index 0 and every weight 1. An adapter's module has apply_expert(number, x) instead.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.experts import fused
from hpcmoe.experts.family_shards import ADDED_ONCE, count_feed_forward, cut_shard, view_weight
from hpcmoe.experts.feed_forward import Kept, LocalExperts, Slots, concatenate, split_rows
from hpcmoe.experts.moe import Experts, LayerGroup
from hpcmoe.experts.shapes import ShardView
from hpcmoe.gemm import WeightMatrix


class LocalFamilyExperts(LocalExperts):
    """This rank's experts of a family, run one by one. An empty slot is an Identity that no row reaches."""

    @torch.no_grad()
    def forward(self, slots: Slots, rows: Tensor, kept: list[Kept] | None) -> Tensor:
        """Compute rows [m, H] grouped by slot -> results [m, H]; what backward() needs is appended to kept, if any."""
        parts = split_rows(slots, rows)
        return concatenate([run_expert(self.replicas[slot], own, kept) for slot, own in parts])

    @torch.no_grad()
    def backward(self, slots: Slots, grads: Tensor, gates: Tensor, kept: list[Kept]) -> tuple[Tensor, Tensor]:
        """Compute from grads [m, H] and gates [m], grouped by slot, the gradients of rows [m, H] and gates [m]."""
        parts = [
            run_expert_backward(self.replicas[slot], kept.pop(), *own) for slot, *own in split_rows(slots, grads, gates)
        ]
        grads_x, grads_gate = zip(*parts, strict=True)
        return concatenate(grads_x), concatenate(grads_gate)

    def list_matrices(self) -> Sequence[WeightMatrix]:
        """List nothing: no cast of a weight is kept."""
        return []

    def local_replicas(self) -> list[Any]:
        """Return the replicas that are there, in the order of their slots."""
        return [replica for replica in self.replicas if not isinstance(replica, nn.Identity)]


class FamilyExperts(Experts):
    """One layer's experts of a family, spread over a group's ranks. Its forward() is that of hpcmoe.Experts."""

    def __init__(
        self,
        family: nn.Module,
        *,
        group: LayerGroup,
        top_k: int,
        max_tokens: int | None = None,
        placement: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Copy this rank's experts out of a fused module of all, which stays as it is. Collective over the group.

        The other arguments are those of hpcmoe.Experts. Raises ConfigError, PlacementError or ClusterError on all
        ranks.
        """
        down = family.get_parameter("down_proj")
        feed_forward = count_feed_forward(family)
        parts = group.add_layer(
            self, hidden=down[0].numel() // feed_forward, feed_forward=feed_forward, num_experts=len(down),
            kind="swiglu" if getattr(family, "has_gate", True) else "gelu", bias=False, top_k=top_k, dtype=down.dtype,
            max_tokens=max_tokens, spare_slots_per_rank=0, replicate=False, placement=placement, seed=0,
        )  # fmt: skip
        held = parts.placement.experts_of_rank(0, parts.mesh.expert_index).tolist()
        device = parts.device.torch_device
        replicas = [copy_expert(family, e, parts.mesh, device) if e >= 0 else nn.Identity() for e in held]
        self.build(group, parts, LocalFamilyExperts(replicas))
        self.anchor = torch.empty(0, dtype=down.dtype, device=self.anchor.device, requires_grad=True)
        self.template = (copy_expert(family, 0, parts.mesh, torch.device("meta")).to("meta"),)  # no child of this

    def refresh_if_changed(self) -> None:
        """Do nothing: no cast of a weight is kept."""

    def make_replica(self) -> Any:
        """Allocate an expert whose weights are to come from another rank."""
        device, dtype = self.tokens_of_expert.device, self.anchor.dtype
        expert = cut_expert(self.template[0], lambda _, p: torch.empty_like(p, dtype=dtype, device=device))
        expert._buffers = {name: torch.zeros_like(b, dtype=dtype, device=device) for name, b in expert.named_buffers()}
        return expert

    def view_shard(self, name: str, weight: Tensor) -> ShardView:
        """Return how checkpoints keep a weight of one expert, of which this rank has the whole or a shard."""
        view = view_weight(self.template[0], name, weight.shape)
        return ShardView(shape=view.shape, axis=view.axis)


def copy_expert(family: nn.Module, number: int, mesh: Mesh, device: torch.device) -> nn.Module:
    """Copy one expert out of a fused module, or this rank's tensor-parallel shard of it.

    Of a module on the meta device, allocate it on another. A bias that is added once is a buffer of zeros on the other
    ranks.
    """
    index, count = mesh.tensor_index, mesh.tensor_parallel

    def cut(name: str, weight: Tensor) -> Tensor:
        return clone_or_allocate(cut_shard(family, name, weight[number : number + 1], index, count), device)

    expert = cut_expert(family, cut)
    if index > 0 and ADDED_ONCE in expert._parameters:
        bias = expert.get_parameter(ADDED_ONCE).detach()
        delattr(expert, ADDED_ONCE)
        expert.register_buffer(ADDED_ONCE, torch.zeros_like(bias), persistent=False)
    return expert


def clone_or_allocate(weight: Tensor, device: torch.device) -> Tensor:
    """Copy a weight; of one on the meta device, allocate memory on another, whose values are to come."""
    return torch.empty_like(weight, device=device) if weight.is_meta else weight.clone()


def cut_expert(family: nn.Module, cut: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a fused module, its parameters [E, ...] cut by their names to those of one expert [1, ...]."""
    expert = copy.copy(family)
    for kept in ("_modules", "_buffers", "_non_persistent_buffers_set"):
        setattr(expert, kept, copy.copy(getattr(family, kept)))
    expert._parameters = {
        name: nn.Parameter(cut(name, parameter.detach()), parameter.requires_grad)
        for name, parameter in family.named_parameters(recurse=False)
    }
    expert.num_experts = 1  # type: ignore[assignment]
    return expert


def compute_expert(expert: Any, x: Tensor) -> Tensor:
    """Compute x [n, H] -> y [n, H] by the family's own loop, in the precision of the weights."""
    rows = x.to(next(expert.parameters()).dtype)
    if hasattr(expert, "apply_expert"):
        return expert.apply_expert(0, rows).to(x.dtype)
    first, whole = rows.new_zeros((len(x), 1), dtype=torch.int64), rows.new_ones((len(x), 1))
    return vars(type(expert))["forward"].__wrapped__(expert, rows, first, whole).to(x.dtype)


def run_expert(expert: nn.Module, x: Tensor, kept: list[Kept] | None) -> Tensor:
    """Compute x [n, H] -> y [n, H]; what run_expert_backward() needs is appended to kept, if any."""
    if fused.has_products(expert):
        return fused.forward(expert, x, kept)
    if kept is not None:
        kept.append((x,))
    return compute_expert(expert, x)


def run_expert_backward(expert: nn.Module, kept: Kept, grad_y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients from grad_y [n, H], that of the output to which y came as gate * y, and gates [n] float32.

    -> (grad_x [n, H], grad_gate [n] float32). Adds to the parameters' gradients.
    """
    if fused.has_products(expert):
        return fused.backward(expert, kept, grad_y, gates)
    with torch.enable_grad(), fused.plain_graph():
        x = kept[0].detach().requires_grad_()
        y = compute_expert(expert, x)
    torch.autograd.backward(y, grad_y * gates.to(grad_y.dtype)[:, None])
    assert x.grad is not None  # y depends on x
    return x.grad, (grad_y * y.detach()).sum(dim=1).float()
