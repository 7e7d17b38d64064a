"""Families outside of transformers' registry of experts functions, given modules like those within it.

Such a family's block calls its experts in a way of its own. Here each block gets one module of all its experts whose
interface is the registry's, on the same memory; router and shared experts stay where they are. A model that is adapted
and not spread computes what it did.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SPREAD_NAME = "hpcmoe"  # of the layer within a fused module, and of our function in transformers' registry


class AdaptedExperts(nn.Module):
    """All experts of a layer, gate and up in one [E, 2F, H], down [E, H, F]: what the registry's modules have."""

    has_gate, is_transposed, is_concatenated = True, False, True
    gate_up_proj: Tensor
    down_proj: Tensor
    feed_forward_axis: int | None = None  # of all matrices, where is_transposed does not tell
    original: ClassVar[Mapping[str, str]] = {}  # names as the family has them, where they are others
    drops_rows: ClassVar[bool] = False  # of weights that nothing reads, so that they cannot be saved
    stacks_rows: ClassVar[bool] = False  # the family has the experts' rows one below the other, [E * F, H]

    def __init__(self, top_k: int, act_fn: Any, weights: Mapping[str, Tensor]) -> None:
        """weights [E, ...]: parameters or views of them, by their names here; top_k: the most experts of a row."""
        super().__init__()
        self.top_k, self.act_fn, self.num_experts = top_k, act_fn, len(weights["down_proj"])
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach(), weight.requires_grad))

    def apply_expert(self, number: int, x: Tensor) -> Tensor:
        """Compute x [n, H] -> y [n, H] by one expert, in the family's arithmetic."""
        return linear(self._apply_gate(linear(x, self.gate_up_proj[number])), self.down_proj[number])

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """Compute the hidden numbers [n, F] of gate and up [n, 2F]; its name is that of the registry's modules."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the gated sum of each row's experts: x [..., H], choices and weights [T, K] -> [..., H]."""
        return self.sum_chosen(x.reshape(-1, x.shape[-1]), top_k_index, top_k_weights).view(x.shape)

    def sum_chosen(self, x: Tensor, index: Tensor, weights: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute what forward() does of x [T, H], without the choices that are not kept [T, K]."""
        if SPREAD_NAME in self._modules:
            return self._modules[SPREAD_NAME](x, index, weights, kept)  # type: ignore[misc]  # not None
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, choice = torch.where(index == number if kept is None else (index == number) & kept)
            y.index_add_(0, token, (self.apply_expert(number, x[token]) * weights[token, choice, None]).to(x.dtype))
        return y


class Llama4Experts(AdaptedExperts):
    """Experts of llama4: [E, H, 2F] and [E, F, H]."""

    is_transposed = True

    def apply_expert(self, number: int, x: Tensor) -> Tensor:
        """Compute x [n, H] -> y [n, H] by one expert, in the family's arithmetic."""
        return self._apply_gate(x @ self.gate_up_proj[number]) @ self.down_proj[number]


class DbrxExperts(AdaptedExperts):
    """Experts of dbrx: three matrices [E, F, H], multiplied by the family's own module, which has none any more."""

    gate_proj: Tensor
    up_proj: Tensor
    is_transposed, feed_forward_axis = True, 1
    stacks_rows: ClassVar[bool] = True
    original: ClassVar[Mapping[str, str]] = {"gate_proj": "mlp.w1", "up_proj": "mlp.v1", "down_proj": "mlp.w2"}

    def apply_expert(self, number: int, x: Tensor) -> Tensor:
        """Compute x [n, H] -> y [n, H] by one expert, in the family's arithmetic."""
        return self.act_fn(x, self.gate_proj[number], self.up_proj[number], self.down_proj[number])


class LinearExperts(AdaptedExperts):
    """Experts that were two modules of matrices, beside a router that sorts rows by expert."""

    original: ClassVar[Mapping[str, str]] = {
        "gate_up_proj": "../input_linear.weight",
        "down_proj": "../output_linear.weight",
    }


class LongcatExperts(AdaptedExperts):
    """Experts of longcat_flash; choices beyond them are of experts that return their input."""

    drops_rows: ClassVar[bool] = True

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the gated sum of each row's experts: x [T, H], choices and weights [T, K] -> [T, H]."""
        real = top_k_index < self.num_experts
        y = self.sum_chosen(x, top_k_index.where(real, 0), top_k_weights, real)
        return y + (x * top_k_weights.masked_fill(real, 0).sum(dim=-1, keepdim=True)).to(x.dtype)


def adapt_model(model: nn.Module) -> None:
    """Replace, in place, what holds the experts in each block of a family outside of the registry. Not collective."""
    for block in list(model.modules()):
        adapt = _ADAPTERS.get(type(block).__name__)
        if adapt is not None and not any(isinstance(child, AdaptedExperts) for child in block.children()):
            adapt(block)


def adapt_llama4(block: Any) -> None:
    """Replace the experts of a block of llama4, whose weights multiply what goes to them."""
    experts = block.experts
    weights = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
    block.experts = Llama4Experts(1, experts.act_fn, weights)
    block.forward = MethodType(run_llama4, block)


def run_llama4(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what a block of llama4 does: hidden_states [..., H] -> ([T, H], router logits [T, E]).

    Each of a token's K rows is the token times that expert's weight, so that they differ.
    """
    x = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(x)
    weights, index = scores.topk(block.top_k, dim=1)
    rows, choices = (x[:, None] * weights[..., None]).flatten(0, 1), index.reshape(-1, 1)
    y = block.experts(rows, choices, torch.ones_like(choices, dtype=x.dtype))
    return block.shared_expert(x) + y.view(len(x), block.top_k, -1).sum(dim=1), logits


def adapt_dbrx(block: Any) -> None:
    """Replace the experts of a block of dbrx, whose matrices lie one below the other."""
    mlp, num_experts = block.experts.mlp, block.experts.num_experts
    names = DbrxExperts.original.items()
    weights = {
        own: mlp._parameters.pop(name.removeprefix("mlp.")).unflatten(0, (num_experts, -1)) for own, name in names
    }
    block.experts = DbrxExperts(block.top_k, mlp, weights)


def adapt_linear(block: Any) -> None:
    """Replace the experts of a block of jetmoe, or of granitemoe where the registry has it not yet."""
    if "input_linear" not in block._modules:
        return
    weights = {"gate_up_proj": block.input_linear.weight, "down_proj": block.output_linear.weight}
    del block.input_linear, block.output_linear
    block.experts = LinearExperts(block.router.top_k, block.activation, weights)
    block.forward = MethodType(run_linear, block)


def run_linear(block: Any, layer_input: Tensor) -> Tensor:
    """Compute what such a block does: [B, T, H] -> [B, T, H]. Its router's rows by expert become choices by token."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    order, _, gates, rows_of_expert, _ = block.router(x)
    sorted_choices = torch.arange(len(rows_of_expert), device=x.device).repeat_interleave(
        torch.tensor(rows_of_expert, device=x.device)
    )
    back = order.argsort()
    index, weights = (of_row[back].view(len(x), -1) for of_row in (sorted_choices, gates))
    y = block.experts(x, index, weights).view(layer_input.shape)
    return y + block.bias if "bias" in block._parameters else y


def adapt_longcat(block: Any) -> None:
    """Replace the experts of a block of longcat_flash; rows of gate_up_proj beyond them, which nothing reads, go."""
    experts = block.experts
    weights = {
        "gate_up_proj": experts.gate_up_proj[: experts.num_routed_experts],
        "down_proj": experts.down_proj,
    }
    block.experts = LongcatExperts(block.router.top_k, experts.act_fn, weights)


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Llama4TextMoe": adapt_llama4,
    "DbrxFFN": adapt_dbrx,
    "JetMoeMoE": adapt_linear,
    "GraniteMoeMoE": adapt_linear,
    "GraniteMoeSharedMoE": adapt_linear,
    "GraniteMoeHybridMoE": adapt_linear,
    "LongcatFlashMoE": adapt_longcat,
}
ADAPTED = ("llama4_text", "dbrx", "jetmoe", "longcat_flash")
