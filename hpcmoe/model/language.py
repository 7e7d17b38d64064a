"""A decoder-only language model over bytes: embedding, L blocks, head; or the stack of MoE layers alone.

A block is x + attention(norm(x)), then x + experts(norm(x)). Without attention it is the second half.
RMSNorm: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hpcmoe.clock import Stage
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.device import Device
from hpcmoe.config import ModelConfig, NetworkSpec
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.router import Router, Routing
from hpcmoe.experts.feed_forward import Expert, GroupedExperts, LocalExperts, make_expert_weights
from hpcmoe.experts.layer import ExpertLayer, Turns
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.experts.slots import ExpertSlots, make_chooser
from hpcmoe.gemm import multiply
from hpcmoe.model.routing_stats import RoutingSums
from hpcmoe.model.text import VOCABULARY_SIZE

Draw = Callable[[int, int], torch.Tensor]  # random weights of so many rows and columns
Past = Callable[[torch.Tensor], torch.Tensor]  # attends [T, 3 H] to what a cache holds of its sequences -> [T, H]


class Dense(nn.Module):
    """The part of a block before its router: attention, if any, and the norm of the experts' input."""

    def __init__(self, model: ModelConfig, draw: Draw):
        super().__init__()
        self.num_heads, self.sequence_length = model.num_heads, model.sequence_length
        self.dtype = getattr(torch, model.dtype)
        self.experts_norm = nn.Parameter(torch.ones(model.hidden))
        if model.attention:
            self.attention_norm = nn.Parameter(torch.ones(model.hidden))
            self.query_key_value = nn.Parameter(draw(3 * model.hidden, model.hidden))
            self.attention_out = nn.Parameter(draw(model.hidden, model.hidden))
        self.attention = model.attention

    def forward(self, x: torch.Tensor, past: Past | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute x [T, H] -> (residual, normed) [T, H]; T is whole sequences, or goes on from a past."""
        if self.attention:
            x = x + self.attend(norm(x, self.attention_norm).to(self.dtype), past).float()
        return x, norm(x, self.experts_norm)

    def attend(self, x: torch.Tensor, past: Past | None) -> torch.Tensor:
        """Compute causal self-attention within each sequence: x [T, H] -> [T, H]."""
        mixed = multiply(x, self.query_key_value.to(x.dtype))
        shape = (len(x) // self.sequence_length, self.sequence_length, 3, self.num_heads, -1)
        if past is not None:
            heads = past(mixed)
        elif len(x) == 0:  # some of torch's kernels reject it; the gradients are zeros, as on other ranks
            heads = mixed[:, : x.shape[1]]
        else:
            query, key, value = mixed.view(shape).permute(2, 0, 3, 1, 4)
            heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            heads = heads.transpose(1, 2).reshape(x.shape)
        return multiply(heads, self.attention_out.to(x.dtype))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute RMSNorm of each token in float32."""
    return nn.functional.rms_norm(x, x.shape[-1:], weight)


class Block(nn.Module):
    """A layer of the network: `dense` up to the router's input, then the experts, with a residual around both."""

    def __init__(self, dense: Dense, router: Router, experts: ExpertLayer):
        super().__init__()
        self.dense, self.router, self.experts = dense, router, experts

    def forward(self, x: torch.Tensor, load: torch.Tensor, sums: RoutingSums) -> tuple[torch.Tensor, Routing]:
        """Compute x [T, H] -> the next x [T, H], and how its tokens were routed under the load [E]. Collective."""
        turns = self.experts.turns
        with turns.stage(Stage.DENSE, self.experts.number):
            residual, normed = self.dense(x)
        with turns.stage(Stage.ROUTE, self.experts.number):
            routing = self.router(normed, load)
            gates = sums.add(turns.micro_batch, routing, turns)
        return self.experts(normed, routing.experts, gates, routing.kept, residual), routing


class LanguageModel(nn.Module):
    """The network of a run; it holds one step's batch, losses and routing counts while the step lasts."""

    def __init__(self, spec: NetworkSpec, layers: Sequence[Block], draw: Draw, mesh: Mesh, device: Device):
        super().__init__()
        model = spec.model
        self.spec, self.mesh, self.device = spec, mesh, device
        self.embedding = nn.Parameter(draw(VOCABULARY_SIZE, model.hidden) * model.hidden**0.5)
        self.positions = nn.Parameter(0.1 * draw(model.sequence_length, model.hidden) * model.hidden**0.5)
        self.layers = cast(Sequence[Block], nn.ModuleList(layers))
        self.last_norm = nn.Parameter(torch.ones(model.hidden))
        self.head_weight = nn.Parameter(0.1 * draw(VOCABULARY_SIZE, model.hidden))
        self.sums: Any = None  # GradientSums during training

    def dense_parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that all ranks hold, in the order in which the backward pass reaches them.

        Keys: the head, the dense parts of each layer, the last first, the embedding.
        """
        parts = {"the head": [self.last_norm, self.head_weight]}
        for number, layer in reversed(list(enumerate(self.layers))):
            parts[f"the dense parts of layer {number}"] = [*layer.dense.parameters(), *layer.router.parameters()]
        return parts | {"the embedding": [self.embedding, self.positions]}

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the experts that this rank holds."""
        return [parameter for layer in self.layers for parameter in layer.experts.local.parameters()]

    def poke(self) -> bool:
        """Advance the sums of gradients -> whether one has ended."""
        return self.sums is not None and self.sums.poke()

    def begin(
        self, batches: list[np.ndarray], num_tokens: int, load: np.ndarray, purpose: str, watched: Sequence[int] = ()
    ) -> None:
        """Start a step: batches uint8 [n, length + 1] of each micro-batch, num_tokens over all ranks, load [L, E].

        purpose is "train", "evaluate" (losses, no gradients) or "infer" (the stack alone, no head). The activations of
        the watched layers are kept.
        """
        self.batches = [self.device.copy_from_host(batch.astype(np.int64)) for batch in batches]
        self.num_tokens, self.purpose, self.watched = max(num_tokens, 1), purpose, watched
        self.load = self.device.copy_from_host(np.asarray(load, np.float32))
        self.loss_sums: dict[int, torch.Tensor] = {}  # by micro-batch, cross-entropy over this rank's tokens, nats
        self.routing = RoutingSums(self.spec, self.mesh, self.device, self.num_tokens)
        self.activations: dict[str, dict[int, np.ndarray]] = {}  # of the watched layers, an array a micro-batch

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the last x of a micro-batch of bytes: inputs [n, length] int64 -> [n * length, H]. Collective."""
        x = (nn.functional.embedding(inputs, self.embedding) + self.positions).flatten(0, 1)
        for layer, (block, load) in enumerate(zip(self.layers, self.load, strict=True)):
            before = x
            x, routing = block(x, load, self.routing)
            if layer in self.watched:
                self.watch(layer, {"input": before, "output": x, "experts": routing.experts})
        return x

    def run(self, micro_batch: int) -> None:
        """Pass a micro-batch of the step forward and, when training, backward. Collective over the group."""
        batch = self.batches[micro_batch]
        x = self(batch[:, :-1])
        self.routing.close(micro_batch)
        if self.purpose == "infer":
            return
        loss_sum = self.sum_losses(x, batch[:, 1:].flatten())
        self.loss_sums[micro_batch] = loss_sum.detach().double()  # on the device: no wait of the host
        if self.purpose == "train":
            (loss_sum / self.num_tokens).backward()

    def sum_losses(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Predict each next byte from x [T, H] and sum the cross-entropies -> []; no logits are kept."""
        logits = multiply(norm(x, self.last_norm), self.head_weight)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def sum_own_losses(self) -> float:
        """Sum the cross-entropies of this rank's micro-batches, nats; the host waits for the device."""
        return float(sum(loss for _, loss in sorted(self.loss_sums.items())))

    def watch(self, layer: int, values: dict[str, torch.Tensor]) -> None:
        """Keep what passes through a watched layer."""
        for name, value in values.items():
            of_micro_batch = self.activations.setdefault(f"layer{layer}/{name}", {})
            of_micro_batch[self.layers[layer].experts.turns.micro_batch] = value.detach().cpu().numpy().copy()

    def take_activations(self) -> dict[str, np.ndarray]:
        """Return the activations kept in the last step, by name: [tokens of this rank, ...]."""
        return {
            name: np.concatenate([a for _, a in sorted(arrays.items())]) for name, arrays in self.activations.items()
        }


def make_model(
    spec: NetworkSpec,
    mesh: Mesh,
    placement: ExpertSlots,
    dispatcher: TokenDispatcher,
    turns: Turns,
    device: Device,
) -> LanguageModel:
    """Build this rank's part of the network; the weights drawn are the same at any number of ranks."""
    generator = torch.Generator().manual_seed(spec.seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    numbers = range(spec.model.num_layers)
    layers = [make_block(spec, mesh, placement, dispatcher, turns, draw, number) for number in numbers]
    network = LanguageModel(spec, layers, draw, mesh, device).to(device.torch_device)
    for layer in layers:
        layer.experts.local.stack_weights()
    return network


def make_block(
    spec: NetworkSpec,
    mesh: Mesh,
    placement: ExpertSlots,
    dispatcher: TokenDispatcher,
    turns: Turns,
    draw: Draw,
    number: int,
) -> Block:
    """Build a block: dense part and router whole, and the experts of this rank's slots."""
    model = spec.model
    dense = Dense(model, draw)
    router = Router(draw(model.num_experts, model.hidden), model.top_k, spec.dispatch)
    expert_of_slot = placement.experts_of_rank(number, mesh.expert_index)
    replicas = [make_expert(spec, mesh, number, expert) for expert in expert_of_slot.tolist()]
    local = (GroupedExperts if dispatcher.works_at_once else LocalExperts)(replicas)
    chooser = make_chooser(model.num_experts, mesh, placement, number)
    return Block(dense, router, ExpertLayer(local, dispatcher, chooser, turns, number))


def make_expert(spec: NetworkSpec, mesh: Mesh, layer: int, expert: int) -> nn.Module:
    """Build this rank's shard of a logical expert, or an Identity for an empty slot (-1)."""
    if expert < 0:
        return nn.Identity()
    shape, seeds = make_expert_shape(spec), (spec.seed, layer, expert)
    return make_expert_from(spec, make_expert_weights(shape, seeds, mesh.tensor_index, mesh.tensor_parallel))


def make_expert_from(spec: NetworkSpec, weights: dict[str, torch.Tensor]) -> Expert:
    """Build an expert from a shard's weights, in the precision of the run."""
    if not spec.trains:  # parameters that are not trained need no float32; router and norms keep it
        weights = {name: weight.to(getattr(torch, spec.model.dtype)) for name, weight in weights.items()}
    return Expert(spec.experts.kind, weights, packed=not spec.trains)
