"""The library's layers: experts on many ranks as modules of any torch model, with a router of one's own or ours."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.clock import Stage
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.device import Device
from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.notice import ONE_ROUND, Notice
from hpcmoe.dispatch.router import Router
from hpcmoe.experts.feed_forward import (
    Expert,
    GroupedExperts,
    LocalExperts,
    concatenate,
    make_empty_weights,
    make_expert_weights,
)
from hpcmoe.experts.layer import ExpertLayer, Turns
from hpcmoe.experts.logical import GroupModule, LogicalExperts
from hpcmoe.experts.losses import LaneSums
from hpcmoe.experts.options import ExpertsOptions, check_choices, check_input
from hpcmoe.experts.slots import ExpertSlots, make_chooser


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a group gives a new layer."""

    number: int  # among the group's layers, in the order in which they were built
    options: ExpertsOptions
    placement: ExpertSlots  # of this layer alone
    dispatcher: TokenDispatcher
    mesh: Mesh
    device: Device
    turns: Turns


class LayerGroup(Protocol):
    """What the layers need of a group (hpcmoe.group.Group)."""

    mesh: Mesh

    def meet(self, call: str) -> None:
        """Wait for all ranks to make the same call."""

    def add_layer(self, layer: Any, **arguments: Any) -> LayerParts:
        """Check that all ranks build the same layer, place its experts, and open what carries their rows."""

    def add_router(self, moe: "MoE", **arguments: Any) -> tuple[DispatchConfig, LaneSums]:
        """Check that all ranks build the same router -> its settings, and what sums its losses' counts."""

    def open_sums(self) -> LaneSums:
        """Return what sums counts over all ranks beside the lanes, opened at the first call. Collective."""

    @property
    def num_optimizer_steps(self) -> int:
        """Return how often any optimizer has stepped while the group was open."""

    @property
    def refuses_more(self) -> bool:
        """Return True if a call with more than max_tokens is an error."""


class Experts(LogicalExperts, ExpertLayer):
    """The experts of one layer, spread over a group's ranks; the router is elsewhere.

    Each expert is down(act(up x)), or down(silu(gate x) * up x) for kind "swiglu". This rank holds those of its slots;
    their weights are drawn from seed and layer number alone, alike at any number of ranks.
    """

    def __init__(
        self,
        hidden: int,
        feed_forward: int,
        num_experts: int,
        *,
        group: LayerGroup,
        kind: str = "swiglu",
        bias: bool = False,
        top_k: int = 2,
        dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
        spare_slots_per_rank: int = 0,
        replicate: bool = False,
        placement: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        """Build the layer. Collective over the group: all ranks build the same layers in the same order.

        kind: "gelu", "relu" or "swiglu". top_k: the most experts of a token. dtype: of the rows that travel, in which
        experts compute; parameters are float32. max_tokens: of a rank in one exchange, the group's by default.
        placement [S]: the expert of each slot, rank by rank, -1: empty; by default they are dealt evenly, and
        spare_slots_per_rank slots a rank stay empty unless replicate fills them. Raises ConfigError, PlacementError or
        ClusterError on all ranks.
        """
        parts = group.add_layer(
            self, hidden=hidden, feed_forward=feed_forward, num_experts=num_experts, kind=kind, bias=bias, top_k=top_k,
            dtype=dtype, max_tokens=max_tokens, spare_slots_per_rank=spare_slots_per_rank, replicate=replicate,
            placement=placement, seed=seed,
        )  # fmt: skip
        self.build(group, parts, make_local(parts))

    def build(self, group: LayerGroup, parts: LayerParts, local: LocalExperts) -> None:
        """Build the layer of what the group has given, and of this rank's experts."""
        options = parts.options
        chooser = make_chooser(options.num_experts, parts.mesh, parts.placement, 0)
        super().__init__(local, parts.dispatcher, chooser, parts.turns, parts.number)
        self.group, self.options, self.placement = group, options, parts.placement
        self.hidden, self.feed_forward, self.num_experts = options.hidden, options.feed_forward, options.num_experts
        self.kind, self.top_k, self.max_tokens = options.kind, options.top_k, options.max_tokens
        self.start_counting(options.num_experts)
        self.to(parts.device.torch_device)

    def forward(  # type: ignore[override]
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Compute the sum over k of top_k_weights[..., k] * expert[top_k_index[..., k]](x) -> [..., H] as x.

        x [..., H]; top_k_index [..., K] integers, 0 to num_experts - 1; top_k_weights [..., K]; K from 1 to top_k.
        kept [..., K] bool: False where a choice does not count.
        Collective over the group: all ranks call the same layers in the same order, each with its own number of tokens,
        and call backward alike. Once differentiable. Raises ConfigError for what does not fit.
        """
        check_choices(self.name, self.options, x, top_k_index, top_k_weights)
        top_k = top_k_index.shape[-1]
        rows, choices = x.reshape(-1, self.hidden), top_k_index.reshape(-1, top_k).long()
        kept = None if kept is None else kept.reshape(-1, top_k)
        self.count(choices if kept is None else choices[kept][:, None])
        return self.apply_to(rows, choices, top_k_weights.reshape(-1, top_k), kept).view(x.shape)

    def apply_to(self, x: Tensor, experts: Tensor, gates: Tensor, kept: Tensor | None) -> Tensor:
        """Compute what forward() does, for x [T, H], experts and gates [T, K], kept [T, K] bool if any are dropped.

        The caller counts.
        """
        self.refresh_if_changed()
        with torch.autocast(x.device.type, enabled=False):
            return concatenate(list(self.run_rounds(x, experts, gates, kept)))

    def run_rounds(self, x: Tensor, experts: Tensor, gates: Tensor, kept: Tensor | None) -> Iterator[Tensor]:
        """Yield the outputs of max_tokens tokens after the other, for as long as any rank has more."""
        number, more = 0, True
        own = -(-len(x) // self.max_tokens)
        while more:
            part = slice(number * self.max_tokens, (number + 1) * self.max_tokens)
            left = max(own - number - 1, 0)
            notice = Notice(rounds_left=left, refuses=self.group.refuses_more) if left else ONE_ROUND
            kept_part = None if kept is None else kept[part]
            output, left_anywhere = self.exchange(x[part], experts[part], gates[part], kept_part, notice=notice)
            yield output
            number, more = number + 1, left_anywhere > 0

    def make_replica(self) -> Expert:
        """Allocate an expert whose weights are to come from another rank."""
        mesh = self.group.mesh
        weights = make_empty_weights(self.options.shape, mesh.tensor_index, mesh.tensor_parallel)
        return Expert(self.kind, weights).to(self.tokens_of_expert.device, self.anchor.dtype)

    def follow_placement(self, placement: ExpertSlots) -> None:
        """Send tokens to where another placement has the experts, which have moved there."""
        self.placement = placement
        self.chooser = make_chooser(self.num_experts, self.group.mesh, placement, 0)
        self.refresh()

    def refresh_if_changed(self) -> None:
        """Drop the weights' casts if any weight has changed. Writes through .data do not show: refresh() after them."""
        seen = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.local.parameters()]
        seen.append((self.group.num_optimizer_steps, 0))  # torch's fused AdamW does not show in versions
        if seen != vars(self).get("_seen"):
            self.refresh()
            self._seen = seen

    def refresh(self) -> None:
        """Drop the weights' casts: they have changed."""
        self.local.refresh()
        self._seen = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        """Move or cast the parameters, as nn.Module.to() does, and stack them anew."""
        super()._apply(fn, recurse)
        self.anchor = fn(self.anchor.detach()).requires_grad_()  # shows the parameters' precision where a rank has none
        self.local.stack_weights()
        self.refresh()
        return self


class MoE(GroupModule):
    """A mixture-of-experts layer: a router with its losses, and Experts."""

    load: Tensor  # [E] float32, tokens of each expert / an even share, as update_routers() last averaged them

    def __init__(
        self,
        hidden: int,
        feed_forward: int,
        num_experts: int,
        *,
        group: LayerGroup,
        top_k: int = 2,
        renormalize: bool = True,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        load_feedback: float = 0.0,
        bias_update_speed: float = 0.0,
        capacity_factor: float = 0.0,
        seed: int = 0,
        **experts: Any,
    ) -> None:
        """Build the layer. Collective over the group, as Experts, which takes all other arguments.

        A token's gate weights are the softmax probabilities of its top_k experts, scaled to sum to 1 if renormalize
        (never for top_k = 1). The gradients of aux_loss_weight x load-balancing loss (1 when even) and z_loss_weight x
        router z-loss, of each call's tokens on all ranks, are added in its backward pass. update_routers() of the group
        moves load_feedback x load off the choice, and biases by bias_update_speed. An expert takes at most
        capacity_factor x its even share of a rank's assignments; 0: all. Raises as Experts does.
        """
        super().__init__()
        self.settings, self.sums = group.add_router(
            self, renormalize=renormalize, aux_loss_weight=aux_loss_weight, z_loss_weight=z_loss_weight,
            load_feedback=load_feedback, bias_update_speed=bias_update_speed, capacity_factor=capacity_factor,
        )  # fmt: skip
        self.experts = Experts(hidden, feed_forward, num_experts, group=group, top_k=top_k, seed=seed, **experts)
        (drawn,) = np.random.SeedSequence((seed, self.experts.number)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn))
        weight = torch.randn(self.experts.num_experts, self.experts.hidden, generator=generator)
        self.router = Router(weight * self.experts.hidden**-0.5, self.experts.top_k, self.settings)
        self.register_buffer("load", torch.ones(self.experts.num_experts))
        self.to(self.experts.tokens_of_expert.device)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the gated sum of each token's experts: x [..., H] -> [..., H] as x. See Experts.forward()."""
        experts, settings = self.experts, self.settings
        check_input(experts.name, experts.options, x)
        rows = x.reshape(-1, experts.hidden)
        with torch.autocast(x.device.type, enabled=False), experts.turns.stage(Stage.ROUTE, experts.number):
            routing = self.router(rows, self.load)
            weights = settings.aux_loss_weight, settings.z_loss_weight
            gates = self.sums.add(experts.turns, experts.number, routing, weights)
        experts.count(routing.experts)
        return experts.apply_to(rows, routing.experts, gates, routing.kept).view(x.shape)


def make_local(parts: LayerParts) -> LocalExperts:
    """Build the experts of this rank's slots, their weights drawn."""
    options, mesh = parts.options, parts.mesh
    replicas = [
        Expert(options.kind, make_expert_weights(
            options.shape, (options.seed, parts.number, expert), mesh.tensor_index, mesh.tensor_parallel
        )) if expert >= 0 else nn.Identity()
        for expert in parts.placement.experts_of_rank(0, mesh.expert_index).tolist()
    ]  # fmt: skip
    return (GroupedExperts if parts.dispatcher.works_at_once else LocalExperts)(replicas)
