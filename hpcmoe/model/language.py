"""A decoder-only language model over bytes: embedding, L blocks, head; or the stack of MoE layers alone.

A block is x + attention(norm(x)), then x + experts(norm(x)). Without attention it is the second half.
RMSNorm: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4.
"""

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.dispatch.plan import SlotChooser, find_slots_of_shards
from hpcmoe.dispatch.router import Router, load_balancing_grad, load_balancing_loss
from hpcmoe.experts.feed_forward import Expert, GroupedExperts, LocalExperts, make_expert_weights
from hpcmoe.experts.layer import MoELayer
from hpcmoe.gemm import multiply
from hpcmoe.model.text import VOCABULARY_SIZE
from hpcmoe.wait import wait_all


class Dense(nn.Module):
    """The part of a block before its router: attention, if any, and the norm of what goes to the experts."""

    def __init__(self, model, draw):
        super().__init__()
        self.num_heads, self.sequence_length = model.num_heads, model.sequence_length
        self.dtype = getattr(torch, model.dtype)
        self.experts_norm = nn.Parameter(torch.ones(model.hidden))
        if model.attention:
            self.attention_norm = nn.Parameter(torch.ones(model.hidden))
            self.query_key_value = nn.Parameter(draw(3 * model.hidden, model.hidden))
            self.attention_out = nn.Parameter(draw(model.hidden, model.hidden))
        self.attention = model.attention

    def forward(self, x):
        """x [T, H] -> (residual, normed) [T, H]; T is whole sequences."""
        if self.attention:
            x = x + self.attend(norm(x, self.attention_norm).to(self.dtype)).float()
        return x, norm(x, self.experts_norm)

    def attend(self, x):
        """Causal self-attention within each sequence: x [T, H] -> [T, H]."""
        if len(x) == 0:  # which some of torch's kernels refuse
            return x
        mixed = multiply(x, self.query_key_value.to(x.dtype))
        shape = (-1, self.sequence_length, 3, self.num_heads, x.shape[1] // self.num_heads)
        query, key, value = mixed.view(len(x) // self.sequence_length, *shape[1:]).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return multiply(heads.transpose(1, 2).reshape(x.shape), self.attention_out.to(x.dtype))


def norm(x, weight):
    """RMSNorm of each token in float32."""
    return nn.functional.rms_norm(x, x.shape[-1:], weight)


class LanguageModel(nn.Module):
    """The network that an engine runs; it holds one step's batch, losses and routing counts while the step lasts."""

    def __init__(self, spec, layers, draw, mesh, device):
        super().__init__()
        model = spec.model
        self.spec, self.mesh, self.device = spec, mesh, device
        self.embedding = nn.Parameter(draw(VOCABULARY_SIZE, model.hidden) * model.hidden**0.5)
        self.positions = nn.Parameter(0.1 * draw(model.sequence_length, model.hidden) * model.hidden**0.5)
        self.layers = nn.ModuleList(layers)
        self.last_norm = nn.Parameter(torch.ones(model.hidden))
        self.head_weight = nn.Parameter(0.1 * draw(VOCABULARY_SIZE, model.hidden))
        self.sums = None  # of gradients, while the backward pass goes on; None where nothing is trained

    def dense_parts(self):
        """List what all ranks hold by the op that ends its gradients, in order -> dict (stage, layer): parameters."""
        parts = {("head", 0): [self.last_norm, self.head_weight]}
        for number, layer in reversed(list(enumerate(self.layers))):
            parts["route_backward", number] = [*layer.dense.parameters(), *layer.router.parameters()]
        return parts | {("embed_backward", 0): [self.embedding, self.positions]}

    def complete_op(self, op):
        """Hear that a micro-batch has passed an op of training."""
        if self.sums is not None:
            self.sums.complete_op(op)

    def poke(self):
        """Let the sums of gradients progress -> whether one has ended."""
        return self.sums is not None and self.sums.poke()

    def begin(self, batches, num_tokens, load, purpose, watched_layers=()):
        """Take a step's batch: uint8 [n, length + 1] a micro-batch; num_tokens over all ranks; load [L, E].

        purpose is "train", "evaluate" (losses, no gradients) or "infer" (the stack alone, no head).
        """
        self.batches = [self.device.copy_from_host(batch.astype(np.int64)) for batch in batches]
        self.num_tokens, self.purpose, self.watched_layers = max(num_tokens, 1), purpose, watched_layers
        self.load = self.device.copy_from_host(np.asarray(load, np.float32))
        self.loss_sum = 0.0  # cross-entropy over this rank's tokens, nats
        self.counted = {}  # micro-batch: (its routing's sums, the event of their arrival on the host)
        self.counts = {}  # micro-batch: (array, the request for its sum over all ranks, None when it is there)
        self.loss_grads = {}  # micro-batch: those of the routing losses, [L, E + 1] on the device
        self.own_tokens = np.zeros(self.load.shape, np.int64)  # [L, E] assignments whose home is this rank
        self.seen = {}  # name: arrays of the activations asked for, a micro-batch each

    def embed(self, micro_batch):
        """Return the first layer's x [T, H]: bytes and their positions."""
        with torch.no_grad():
            return self.look_up(micro_batch)

    def head(self, micro_batch, x, contexts):
        """Take the last x [T, H]; start to add up the routing over all ranks -> its gradient, in training."""
        self.counted[micro_batch] = self.device.copy_to_host(count_routings([context.routing for context in contexts]))
        self.start_sums()
        self.watch(x, contexts)
        if self.purpose == "infer":
            return None
        x.requires_grad_(self.purpose == "train")
        targets = self.batches[micro_batch][:, 1:].flatten()
        loss_sum = self.sum_losses(x, targets)
        self.loss_sum = self.loss_sum + loss_sum.detach().double()  # on the device: the host need not know yet
        if self.purpose == "train":
            (loss_sum / self.num_tokens).backward()
        return x.grad

    def sum_losses(self, x, targets):
        """Predict each next byte from x [T, H], and add up the cross-entropies -> []; no logits are kept."""
        logits = multiply(norm(x, self.last_norm), self.head_weight)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def start_sums(self, wait_for=-1):
        """Begin to add up what has been counted over all ranks, micro-batch by micro-batch, the same on every rank.

        The host waits for the device up to micro-batch wait_for, and for no other.
        """
        for micro_batch in sorted(self.counted):
            counts, event = self.counted[micro_batch]
            if micro_batch <= wait_for:
                event.synchronize()
            elif not event.query():
                return
            del self.counted[micro_batch]
            counts = counts.numpy()
            self.own_tokens += counts[:, : self.own_tokens.shape[1]].astype(np.int64)
            self.counts[micro_batch] = (counts, start_all_reduce(self.mesh.world, counts))

    def watch(self, x, contexts):
        """Keep what enters and leaves the layers whose activations were asked for, and which experts were chosen."""
        outputs = [context.x for context in contexts[1:]] + [x]
        for layer in self.watched_layers:
            context = contexts[layer]
            kept = {"input": context.x, "output": outputs[layer], "experts": context.routing.experts}
            for name, values in kept.items():
                self.seen.setdefault(f"layer{layer}/{name}", []).append(values.detach().cpu().numpy().copy())

    def take_activations(self):
        """Return the activations kept in the last step -> dict name: array [tokens of this rank, ...]."""
        return {name: np.concatenate(arrays) for name, arrays in self.seen.items()}

    def poll_routing_grads(self, micro_batch):
        """Whether the routing of all ranks is known, so that routing_grads need not wait."""
        self.start_sums()
        if micro_batch not in self.counts:
            return False
        _, request = self.counts[micro_batch]
        return request is None or request.Test()

    def routing_grads(self, layer, micro_batch):
        """Return the routing losses' gradients with respect to a layer's probability_sum [E] and z_sum []."""
        if micro_batch not in self.loss_grads:
            self.loss_grads[micro_batch] = self.device.copy_from_host(
                self.compute_routing_grads(self.wait_counts(micro_batch))
            )
        grads = self.loss_grads[micro_batch][layer]
        return grads[:-1], grads[-1]

    def compute_routing_grads(self, counts):
        """Compute the routing losses' gradients of all layers from what a micro-batch counted -> float32 [L, E + 1]."""
        dispatch, num_experts = self.spec.dispatch, self.spec.model.num_experts
        grads = np.full((len(counts), num_experts + 1), dispatch.z_loss_weight / self.num_tokens, np.float32)
        for layer, tokens in enumerate(torch.from_numpy(counts[:, :num_experts])):
            grads[layer, :-1] = dispatch.aux_loss_weight * load_balancing_grad(tokens, self.num_tokens)
        return grads

    def embed_backward(self, micro_batch, grad):
        """Propagate the gradient of the first layer's x [T, H] to the embedding."""
        self.look_up(micro_batch).backward(grad)

    def look_up(self, micro_batch):
        """Add the vectors of bytes and positions -> [T, H]."""
        inputs = self.batches[micro_batch][:, :-1]
        return (nn.functional.embedding(inputs, self.embedding) + self.positions).flatten(0, 1)

    def wait_counts(self, micro_batch):
        """Wait for a micro-batch's routing, summed over all ranks -> float64 [L, 2 E + 2]."""
        self.start_sums(micro_batch)
        counts, request = self.counts[micro_batch]
        if request is not None:
            wait_all([request])
            self.counts[micro_batch] = (counts, None)
        return counts

    def wait_routing_stats(self):
        """Wait for the whole step's routing, summed over ranks and micro-batches -> RoutingStats."""
        micro_batches = [self.wait_counts(micro_batch) for micro_batch in range(len(self.batches))]
        return RoutingStats(self.spec.model, micro_batches, self.num_tokens, self.own_tokens)


class RoutingStats:
    """How a step's tokens were routed, over all ranks."""

    def __init__(self, model, micro_batches, num_tokens, own_tokens):
        num_experts = model.num_experts
        self.own_tokens = own_tokens  # [L, E] assignments of this rank alone
        self.tokens_of_expert = sum(micro_batches)[:, :num_experts]  # [L, E] assignments
        self.num_dropped = int(sum(micro_batches)[:, -1].sum())
        self.z_loss = sum(micro_batches)[:, -2].sum() / num_tokens
        self.aux_loss = sum(
            float(load_balancing_loss(*torch.from_numpy(layer[: 2 * num_experts]).chunk(2), num_tokens))
            for micro_batch in micro_batches
            for layer in micro_batch
        )
        expected = num_tokens * model.top_k / num_experts
        self.utilisation = self.tokens_of_expert / expected  # U_e [L, E], actual / expected tokens


@torch.no_grad()
def count_routings(routings):
    """Put all layers' sums in rows: assignments and probability of each expert, z, drops -> float64 [L, 2 E + 2]."""
    assignments, probabilities, z = (
        torch.stack([getattr(routing, name) for routing in routings])
        for name in ("tokens_of_expert", "probability_sum", "z_sum")
    )
    drops = torch.zeros_like(z) if routings[0].kept is None else torch.stack([(~r.kept).sum() for r in routings])
    return torch.cat([part.double() for part in (assignments, probabilities, z[:, None], drops[:, None])], dim=1)


def make_model(spec, mesh, placement, dispatcher, device):
    """Build this rank's part of the network, its weights drawn alike at any number of ranks."""
    generator = torch.Generator().manual_seed(spec.seed)

    def draw(rows, columns):
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    layers = [make_layer(spec, mesh, placement, dispatcher, draw, number) for number in range(spec.model.num_layers)]
    network = LanguageModel(spec, layers, draw, mesh, device).to(device.torch_device)
    for layer in layers:
        layer.experts.stack_weights()
    return network


def make_layer(spec, mesh, placement, dispatcher, draw, number):
    """Build block `number`: dense part and router whole, of the experts those in this rank's slots."""
    model = spec.model
    dense = Dense(model, draw)
    router = Router(draw(model.num_experts, model.hidden), model.top_k, spec.dispatch)
    expert_of_slot = placement.experts_of_rank(number, mesh.expert_index)
    replicas = [make_expert(spec, mesh, number, expert) for expert in expert_of_slot.tolist()]
    at_once = dispatcher.works_at_once
    experts = (GroupedExperts if at_once else LocalExperts)(replicas)
    chooser = make_chooser(model.num_experts, mesh, placement, number)
    return MoELayer(dense, router, experts, dispatcher, chooser)


def make_chooser(num_experts, mesh, placement, number):
    """Build what sends this rank's tokens to the replicas of layer `number`."""
    node = placement.node_of_rank[mesh.expert_index]
    return SlotChooser(
        placement.expert_of_replica[number],
        placement.shares_of_node(number, node),
        find_slots_of_shards(len(placement.rank_of_replica), placement.slots_per_rank, mesh.tensor_parallel),
        num_experts,
        mesh.group.rank,
    )


def make_expert(spec, mesh, layer, expert):
    """Build this rank's shard of a logical expert, or an Identity for an empty slot (-1)."""
    if expert < 0:
        return nn.Identity()
    return make_expert_from(spec, make_expert_weights(spec, layer, expert, mesh.tensor_index, mesh.tensor_parallel))


def make_expert_from(spec, weights):
    """Build an expert of a shard's weights, in the precision that the run keeps them in."""
    if not spec.trains:  # what is not trained needs no float32; router and norms keep theirs
        weights = {name: weight.to(getattr(torch, spec.model.dtype)) for name, weight in weights.items()}
    return Expert(spec.experts.kind, weights, packed=not spec.trains)
