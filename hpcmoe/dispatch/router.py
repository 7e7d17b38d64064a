"""Each token chooses its experts.

Sources: softmax top-k gating with renormalised weights, Shazeer et al. 2017 (arXiv:1701.06538) and Lepikhin et al. 2020
(arXiv:2006.16668), section 2.2; load-balancing loss, Fedus et al. 2021 (arXiv:2101.03961), equation 4; router z-loss,
Zoph et al. 2022 (arXiv:2202.08906), equation 5; a bias on the choice alone, Wang et al. 2024
(arXiv:2408.15664).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from hpcmoe.gemm import multiply

FEW_MAXIMA, FEW_EXPERTS = 2, 64  # one maximum after the other then takes a third of topk's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where the T tokens of a micro-batch go."""

    experts: torch.Tensor  # [T, K] int64
    gates: torch.Tensor  # [T, K] float32, differentiable; a dropped copy's gate is zero
    kept: torch.Tensor  # [T, K] bool, False where an expert's capacity was exceeded
    probability_sum: torch.Tensor  # [E] float32, differentiable: softmax probabilities summed over the tokens
    z_sum: torch.Tensor  # [] float32, differentiable: squared log-sum-exp of the logits, summed over the tokens
    tokens_of_expert: torch.Tensor  # [E] int64, copies that chose each expert, dropped ones too

    @property
    def num_dropped(self):
        """Count the copies over capacity."""
        return self.kept.numel() - int(self.kept.sum())


class Router(nn.Module):
    """The gate of one layer: logits = W_g x, softmax, top-k."""

    def __init__(self, weight, top_k, config):
        super().__init__()
        self.weight = nn.Parameter(weight)  # [E, H] float32
        self.register_buffer("bias", torch.zeros(len(weight)))  # [E] float32, moved by the load, not by gradients
        self.top_k = top_k
        self.config = config

    def forward(self, x, load):
        """Route tokens x [T, H] under the measured load [E] (tokens of an expert / expected; 1 is even) -> Routing.

        The choice is by logits - alpha x load + bias; the gates never see the bias.
        """
        logits = multiply(x.float(), self.weight)  # [T, E]
        probabilities = logits.softmax(dim=-1)

        # Let load and bias speak on the choice, and the load on the weights too where it is to.
        pressure = self.config.load_feedback * load
        experts = choose_largest(logits.detach() + (self.bias - pressure), self.top_k)  # [T, K]
        speaking = logits - pressure if self.config.load_feedback_on == "both" else logits
        if self.config.renormalize:
            gates = speaking.gather(1, experts).softmax(dim=-1)  # the same as p / sum(p), and safe where p underflows
        else:
            gates = speaking.softmax(dim=-1).gather(1, experts)

        kept = self.within_capacity(experts)
        return Routing(
            experts=experts,
            gates=gates * kept,
            kept=kept,
            probability_sum=probabilities.sum(dim=0),
            z_sum=logits.logsumexp(dim=-1).square().sum(),
            tokens_of_expert=count_copies(experts, len(self.weight)),
        )

    def within_capacity(self, experts):
        """Keep each expert's first C copies, all first choices before any second: experts [T, K] -> bool [T, K].

        C = ceil(capacity_factor x T x K / E) of this rank's micro-batch; a factor of 0 drops nothing.
        """
        if self.config.capacity_factor == 0:
            return torch.ones_like(experts, dtype=torch.bool)
        num_experts = len(self.weight)
        capacity = math.ceil(self.config.capacity_factor * experts.numel() / num_experts)
        chosen = nn.functional.one_hot(experts.T.flatten(), num_experts)  # [K * T, E], first choices first
        place = (chosen.cumsum(dim=0) * chosen).sum(dim=1)  # 1 for the first copy of its expert, 2 for the second ...
        return (place <= capacity).view(self.top_k, -1).T


def count_copies(experts, num_experts):
    """Count the copies that chose each expert: experts [T, K] -> [E] int64; torch.bincount would wait for a GPU."""
    chosen = experts.flatten()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def choose_largest(logits, count):
    """Find each row's largest entries, largest first: logits [T, E] -> [T, count] int64."""
    if count > FEW_MAXIMA or logits.shape[-1] > FEW_EXPERTS:
        return logits.topk(count, dim=-1).indices
    chosen, left = [], logits
    for _ in range(count):
        best = left.max(dim=-1, keepdim=True).indices
        chosen.append(best)
        left = left.scatter(1, best, -math.inf)
    return torch.cat(chosen, dim=1)


def load_balancing_loss(tokens_of_expert, probability_sum, num_tokens):
    """E x sum over experts of (share of copies) x (mean probability); 1 when even (arXiv:2101.03961, equation 4)."""
    return (load_balancing_slope(tokens_of_expert, num_tokens) * probability_sum).sum()


def load_balancing_slope(tokens_of_expert, num_tokens):
    """Derivative of the load-balancing loss by probability_sum [E]; the copies' shares count as constants."""
    copies = max(int(tokens_of_expert.sum()), 1)
    return len(tokens_of_expert) * tokens_of_expert.float() / copies / max(num_tokens, 1)
