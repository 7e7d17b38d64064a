"""A router's skew for benches: choices drawn by the rack of a token's home, or weights that lean Zipf-like."""

import numpy as np
import torch

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.dispatch.router import Router
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import draw_starts

OWN_SHARE = 0.85  # of a rack's tokens go to that rack's experts
ZIPF = 0.3  # how much the experts of a rack differ: the k-th is chosen with weight k ** -ZIPF
SAMPLES = 40000  # tokens that tell the probabilities of a router's choices
AWAY = 1e6  # a load that no logit outweighs


def make_weights(rack_of_node, num_layers, num_experts, seed):
    """Draw how likely each node's tokens choose each expert -> [L, nodes, E]; rack r of R prefers r, r + R ..."""
    random = np.random.default_rng(seed)
    num_racks = max(rack_of_node) + 1
    rack_of_expert = np.arange(num_experts) % num_racks
    weights = np.empty((num_layers, len(rack_of_node), num_experts))
    for layer in range(num_layers):
        heat = random.permutation(np.arange(1, num_experts + 1) ** -ZIPF)
        for node, rack in enumerate(rack_of_node):
            own = rack_of_expert == rack
            share = np.where(own, OWN_SHARE / heat[own].sum(), (1 - OWN_SHARE) / heat[~own].sum())
            weights[layer, node] = heat * share
    return weights


def draw_experts(weights, num_tokens, top_k, random):
    """Draw top_k different experts for each token by their weights [E] -> [num_tokens, top_k] (Gumbel, top k)."""
    keys = np.log(weights) + random.gumbel(size=(num_tokens, len(weights)))
    return np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]


def count_choices(weights, top_k, seed):
    """Count what tokens with weights [L, nodes, E] choose, for a sample of tokens -> [L, nodes, E]."""
    counts = np.empty(weights.shape)
    for at in np.ndindex(weights.shape[:2]):
        chosen = draw_experts(weights[at], SAMPLES, top_k, np.random.default_rng([seed, *at]))
        counts[at] = np.bincount(chosen.ravel(), minlength=weights.shape[2])
    return counts


class DrawnRouter(Router):
    """A router that chooses what it draws; its gates, losses and gradients are the real router's."""

    def __init__(self, router, weights, seed):
        """router is the network's own; weights [E] of this rank's node in this layer; seed of this rank and layer."""
        super().__init__(router.weight.data, router.top_k, router.settings)
        self.weights, self.random = weights, np.random.default_rng(seed)

    def forward(self, x, load):
        """Route tokens x [T, H] to drawn experts: to all others the load is such that none would go -> Routing."""
        experts = torch.from_numpy(draw_experts(self.weights, len(x), self.top_k, self.random))
        away = torch.full((len(x), len(self.weights)), AWAY).scatter_(1, experts, 0.0)
        return super().forward(x, away)


def shift_weights(weights, rack_of_node, num_hot):
    """Let the hottest num_hot experts of two racks change places in weights [L, nodes, E] -> [L, nodes, E]."""
    rack_of_expert = np.arange(weights.shape[2]) % (max(rack_of_node) + 1)
    shifted = weights.copy()
    for layer, row in enumerate(weights.max(axis=1)):
        left, right = (np.flatnonzero(rack_of_expert == rack) for rack in (0, 1))
        left, right = (own[np.argsort(-row[own], kind="stable")[:num_hot]] for own in (left, right))
        shifted[layer][:, left], shifted[layer][:, right] = weights[layer][:, right], weights[layer][:, left]
    return shifted


def skew_routers(job, exponent, common):
    """Lean the weights of a job's routers, Zipf-like by expert, each layer in an order of its own. Collective.

    An embedding gets `common` added to each of its numbers, which a router's inputs then share: the k-th expert's mean
    logit becomes -exponent x ln k along their mean, and what tells tokens apart is left as it was.
    """
    network, model = job.stepper.network, job.config.model
    with torch.no_grad():
        network.embedding += common
        for number, layer in enumerate(network.layers):  # in order: each layer's inputs come from the one before
            order = np.random.default_rng([job.config.run.seed, number]).permutation(model.num_experts)
            logits = torch.from_numpy(-exponent * np.log(1 + order)).float()
            mean = mean_input(job, layer.router)
            weight = layer.router.weight
            weight += torch.outer(logits - weight @ mean, mean / mean.square().sum())


def mean_input(job, router):
    """Average what a router takes in over a batch of all ranks -> [H]. Collective."""
    model, sums = job.config.model, torch.zeros(job.config.model.hidden)

    def look(_, inputs):
        sums.add_(inputs[0].detach().sum(dim=0))

    watch = router.register_forward_pre_hook(look)
    starts = draw_starts(len(job.training), job.config.data.batch_sequences, model.sequence_length, 0, 0)
    even = even_load(model.num_layers, model.num_experts)
    num_tokens = job.stepper.run(job.training, starts, even, "evaluate").stats.num_tokens
    watch.remove()
    return torch.from_numpy(all_reduce(job.mesh.world, sums.numpy())) / num_tokens
