"""Each token chooses its experts.

Sources: softmax top-k gating with renormalised weights, Shazeer et al. 2017 (arXiv:1701.06538) and Lepikhin et al. 2020
(arXiv:2006.16668), section 2.2; with one expert a token, p itself, Fedus et al. 2021 (arXiv:2101.03961), section 2.1;
load-balancing loss, there, equation 4; router z-loss, Zoph et al. 2022 (arXiv:2202.08906), equation 5; a bias on the
choice alone, Wang et al. 2024 (arXiv:2408.15664).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.gate import load_acts_on_gates, renormalizes
from hpcmoe.gemm import multiply

_FEW_MAXIMA, _FEW_EXPERTS = 2, 64  # one maximum after the other then takes a third of topk's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where the T tokens of a micro-batch go."""

    experts: Tensor  # [T, K] int64
    gates: Tensor  # [T, K] float32, differentiable; a dropped assignment's gate is zero
    kept: Tensor | None  # [T, K] bool, False where an expert's capacity was exceeded; None where there is none
    probability_sum: Tensor  # [E] float32, differentiable: softmax probabilities summed over the tokens
    z_sum: Tensor  # [] float32, differentiable: squared log-sum-exp of the logits, summed over the tokens
    tokens_of_expert: Tensor  # [E] int64, assignments to each expert, dropped ones too

    @property
    def num_dropped(self) -> int:
        """Return the number of assignments over capacity."""
        return 0 if self.kept is None else self.kept.numel() - int(self.kept.sum())


class Router(nn.Module):
    """The gate of one layer: logits = W_g x, softmax, top-k."""

    bias: Tensor

    def __init__(self, weight: Tensor, top_k: int, settings: DispatchConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)  # [E, H] float32
        self.register_buffer("bias", torch.zeros(len(weight)))  # [E] float32, moved by the load, not by gradients
        self.top_k, self.settings = top_k, settings

    def forward(self, x: Tensor, load: Tensor) -> Routing:
        """Route tokens x [T, H] under the measured load [E] (tokens of an expert / expected; 1 is even).

        The choice is by logits - alpha x load + bias; the gates never see the bias.
        """
        logits = multiply(x.float(), self.weight.float())  # [T, E]

        # Push the choice by load and bias, and the gates by the load where it is to act on them.
        pressure = self.settings.load_feedback * load
        experts = choose_largest(logits.detach() + (self.bias - pressure), self.top_k)  # [T, K]
        weighing = pressure if load_acts_on_gates(self.settings) else None
        renormalize = renormalizes(self.settings, self.top_k)
        gates, probability_sum, z_sum = Softmax.apply(logits, weighing, experts, renormalize)

        # Drop what exceeds the experts' capacity.
        kept = self.keep_within_capacity(experts)
        return Routing(
            experts=experts,
            gates=gates if kept is None else gates * kept,
            kept=kept,
            probability_sum=probability_sum,
            z_sum=z_sum,
            tokens_of_expert=count_assignments(experts, len(self.weight)),
        )

    def keep_within_capacity(self, experts: Tensor) -> Tensor | None:
        """Keep each expert's first C assignments, all first choices before any second: experts [T, K] -> bool [T, K].

        C = ceil(capacity_factor x T x K / E) of this rank's micro-batch; a factor of 0 drops nothing: None.
        """
        if self.settings.capacity_factor == 0:
            return None
        num_experts = len(self.weight)
        capacity = math.ceil(self.settings.capacity_factor * experts.numel() / num_experts)
        chosen = nn.functional.one_hot(experts.T.flatten(), num_experts)  # [K * T, E], first choices first
        place = (chosen.cumsum(dim=0) * chosen).sum(dim=1)  # 1 for the first of its expert, 2 for the second ...
        return (place <= capacity).view(self.top_k, -1).T


class Softmax(torch.autograd.Function):
    """Gates and losses of logits. The backward is by hand: a third of the kernels that autograd starts."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, pressure: Tensor | None, experts: Tensor, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gates [T, K], the probabilities' sums [E] and the sum of squared log-sum-exps [].

        logits [T, E]; pressure [E] acts on the gates, if any; experts [T, K] are those chosen.
        """
        # Compute the losses' sums, which see the logits alone.
        log_probabilities = logits.log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        first = experts[:, :1]  # any entry of a row differs by its log-sum-exp, and a large one loses the least
        log_sums = logits.gather(1, first) - log_probabilities.gather(1, first)

        # Compute the gates.
        pushed = logits if pressure is None else logits - pressure
        if renormalize:
            weights = None
            gates = pushed.gather(1, experts).softmax(dim=-1)  # the same as p / sum(p), and safe where p underflows
        else:
            weights = probabilities if pressure is None else pushed.softmax(dim=-1)
            gates = weights.gather(1, experts)
        ctx.save_for_backward(probabilities, log_sums, weights, gates, experts)
        return gates, probabilities.sum(dim=0), log_sums.square().sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_gate: Tensor, grad_probability: Tensor, grad_z: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the logits [T, E]."""
        probabilities, log_sums, weights, gates, experts = ctx.saved_tensors
        of_losses = grad_probability - (probabilities @ grad_probability)[:, None] + (2 * grad_z) * log_sums
        grad_logits = of_losses.mul_(probabilities)

        of_gates = gates * grad_gate
        total = of_gates.sum(dim=1, keepdim=True)
        if weights is None:  # a softmax over the chosen alone
            of_gates -= gates * total
        else:
            grad_logits -= weights * total
        return grad_logits.scatter_add_(1, experts, of_gates), None, None, None


def count_assignments(experts: Tensor, num_experts: int) -> Tensor:
    """Count the assignments to each expert: experts [T, K] -> [E] int64."""
    chosen = experts.flatten()
    if not chosen.is_cuda:  # torch.bincount would wait for a GPU
        return torch.bincount(chosen, minlength=num_experts)
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def choose_largest(logits: Tensor, count: int) -> Tensor:
    """Return the columns of each row's largest entries, largest first: logits [T, E] -> [T, count] int64."""
    if count > _FEW_MAXIMA or logits.shape[-1] > _FEW_EXPERTS:
        return logits.topk(count, dim=-1).indices
    chosen, left = list[Tensor](), logits
    for _ in range(count):
        if chosen:
            left = left.scatter(1, chosen[-1], -math.inf)
        chosen.append(left.max(dim=-1, keepdim=True).indices)
    return torch.cat(chosen, dim=1)


def repeat_for_shards(of_assignments: Tensor, num_shards: int) -> Tensor:
    """Repeat each entry once per tensor-parallel shard: [T, K] -> [T, K * num_shards]."""
    return of_assignments if num_shards == 1 else of_assignments.repeat_interleave(num_shards, dim=1)


def load_balancing_loss(tokens_of_expert: Tensor, probability_sum: Tensor, num_tokens: int) -> Tensor:
    """Return E x sum over experts of (share of assignments) x (mean probability): 1 when even; equation 4 there."""
    return (load_balancing_grad(tokens_of_expert, num_tokens) * probability_sum).sum()


def load_balancing_grad(tokens_of_expert: Tensor, num_tokens: int) -> Tensor:
    """Return the loss's gradient with respect to probability_sum [E]; the assignments' shares count as constants."""
    assignments = max(int(tokens_of_expert.sum()), 1)
    return len(tokens_of_expert) * tokens_of_expert.float() / assignments / max(num_tokens, 1)
