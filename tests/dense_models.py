"""Models of dense modules and layers of experts, and their dense twins in one process on all ranks' tokens."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import DenseExperts, draw

import hpcmoe

ROUTED = ("moe", "experts", "own")
EXPERT_SEED = 7


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a model: something on the stream of tokens [T, H]."""

    kind: str  # "linear", "tied", "norm", "attention", "dropout" or one of ROUTED
    again: bool = False  # the last part of its kind once more, with its weights
    residual: bool = True
    frozen: bool = False
    width: int = 0  # of a layer of experts
    layer: dict[str, Any] = field(default_factory=dict)  # its arguments
    top_k: int = 1  # of its calls, the first


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what its ranks do with it, and with how many tokens."""

    parts: tuple[Part, ...]
    tokens: tuple[tuple[int, ...], ...]  # of each micro-batch, of each rank
    group: dict[str, Any] = field(default_factory=dict)
    num_nodes: int = 1
    hidden: int = 4
    autocast: bool = False
    lanes: bool = False
    in_flight: int | None = None
    earlier_steps: tuple[int, ...] = ()  # micro-batches of each, whose gradients are dropped
    checkpoint: str = ""  # "reentrant" or "other"
    checkpointed: tuple[int, int] = (0, 0)  # parts, as a slice
    wants_inputs: bool = True  # their gradients
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        """Return True if all is computed in float32."""
        return not self.autocast and all(part.layer.get("dtype") != torch.bfloat16 for part in self.parts)

    def draw_input(self, micro_batch: int, rank: int) -> torch.Tensor:
        """Draw a rank's tokens [T, H]."""
        seed = self.seed + 1000 * micro_batch + 10 * rank
        x = draw(self.tokens[micro_batch][rank], self.hidden, seed=seed)
        return x.requires_grad_(self.wants_inputs)

    def seed_dropout(self, micro_batch: int, rank: int) -> None:
        """Begin a micro-batch's random numbers."""
        torch.manual_seed(self.seed + 1000 * micro_batch + 10 * rank + 5)

    def loss(self, y: torch.Tensor) -> torch.Tensor:
        """Compute a number from the model's output."""
        return (y.float() * draw(1, self.hidden, seed=3)).sin().sum()


class Attention(nn.Module):
    """Causal attention of one head over a call's tokens."""

    def __init__(self, hidden):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.T / math.sqrt(x.shape[1])).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        return scores.softmax(-1) @ v


class Dropout(nn.Module):
    """Dropout with the same mask in any precision."""

    def forward(self, x):
        return x * nn.functional.dropout(torch.ones(x.shape), 0.3)


class OwnExperts(nn.Module):
    """A user's experts: all of them on every rank."""

    def __init__(self, width, num_experts):
        super().__init__()
        self.of_expert = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, width)) for _ in range(num_experts)
        )

    def forward(self, dispatcher, x, choices, gates):
        rows, counts, handle = dispatcher.dispatch(x, choices, gates)
        parts = zip(dispatcher.expert_of_slot.tolist(), rows.split(counts.tolist()), strict=True)
        results = [self.of_expert[e](part.float()).to(rows.dtype) for e, part in parts if len(part)]
        return dispatcher.combine(torch.cat([rows[:0], *results]) / dispatcher.group.mesh.tensor_parallel, handle)


class Step(nn.Module):
    """A part of a model but for its exchange: what is before and after it."""

    def __init__(self, part, hidden):
        super().__init__()
        self.part = part
        match part.kind:
            case "linear" | "tied":
                self.inner = nn.Linear(hidden, hidden)
            case "norm":
                self.inner = nn.LayerNorm(hidden)
            case "attention":
                self.inner = Attention(hidden)
            case "dropout":
                self.inner = Dropout()
            case _:
                self.norm = nn.LayerNorm(hidden)
                self.into, self.out = nn.Linear(hidden, part.width), nn.Linear(part.width, hidden)
                num_experts = part.layer["num_experts"]
                if part.kind != "moe":
                    self.gate = nn.Linear(part.width, num_experts, bias=False)
                if part.kind == "own":
                    self.own = OwnExperts(part.width, num_experts)

    def route(self, x, top_k, choices=None):
        """Choose experts, or take the choices that are given -> choices and their weights [T, K]."""
        logits = self.gate(x).float()
        choices = logits.topk(top_k).indices if choices is None else check_choices(logits, choices)
        return choices, logits.softmax(-1).gather(1, choices)

    def finish(self, x, y):
        """Compute the stream after the part."""
        y = self.out(y.to(x.dtype)) if self.part.kind in ROUTED else y
        return x + y if self.part.residual else y

    def top_k(self, micro_batch):
        """Return how many experts a token has in a call."""
        return (self.part.top_k - 1 + micro_batch) % self.part.layer["top_k"] + 1


def check_choices(logits, choices):
    """Assert that no expert left out is better than a chosen one, but for rounding -> the choices."""
    left = logits.detach().scatter(1, choices, -math.inf).amax(1)
    assert (logits.detach().gather(1, choices).amin(1) >= left - 0.05 * (1 + left.abs().clamp(max=1e9))).all()
    return choices


def make_steps(case):
    """Build the dense modules of a case, the same on all ranks -> a Step for each part, those used again twice."""
    torch.manual_seed(case.seed)
    steps, last = [], {}
    for part in case.parts:
        again = part.again and part.kind in last
        step = last[part.kind] if again else Step(part, case.hidden)
        if part.kind == "tied" and not again and "linear" in last:
            step.inner.weight = last["linear"].inner.weight
        if part.frozen and not again:
            step.requires_grad_(False)
        last[part.kind] = step
        steps.append(step)
    return nn.ModuleList(steps)


class Model(nn.Module):
    """The model of a case on the ranks of a group."""

    def __init__(self, case, group):
        super().__init__()
        self.case, self.group = case, group
        self.steps = make_steps(case)
        self.layers = nn.ModuleDict()
        for number, step in enumerate(self.steps):
            if step.part.kind in ROUTED and str(self.first(number)) not in self.layers:
                self.layers[str(number)] = self.make_layer(step.part)
        self.chosen = {}  # by part, micro-batch

    def experts(self):
        """List the layers' experts that are the library's -> by number."""
        layers = {n: layer.experts if isinstance(layer, hpcmoe.MoE) else layer for n, layer in self.layers.items()}
        return {n: layer for n, layer in layers.items() if isinstance(layer, hpcmoe.Experts)}

    def routers(self):
        """List the routers' weights -> by number."""
        return {n: layer.router.weight for n, layer in self.layers.items() if isinstance(layer, hpcmoe.MoE)}

    def first(self, number):
        """Return the number of the part that a part is."""
        return next(n for n, step in enumerate(self.steps) if step is self.steps[number])

    def make_layer(self, part):
        kind = {"moe": hpcmoe.MoE, "experts": hpcmoe.Experts, "own": hpcmoe.Dispatcher}[part.kind]
        layer = kind(part.width, group=self.group, **part.layer)
        if part.kind == "own":
            return layer
        return layer.requires_grad_(not part.frozen)

    def forward(self, x, micro_batch):
        begin, end = self.case.checkpointed
        x = self.apply_parts(range(begin), x, micro_batch)
        if self.case.checkpoint:
            reentrant = self.case.checkpoint == "reentrant"
            x = checkpoint(self.apply_parts, range(begin, end), x, micro_batch, use_reentrant=reentrant)
        else:
            x = self.apply_parts(range(begin, end), x, micro_batch)
        return self.apply_parts(range(end, len(self.steps)), x, micro_batch)

    def apply_parts(self, numbers, x, micro_batch):
        for number in numbers:
            x = self.apply_part(number, x, micro_batch)
        return x

    def apply_part(self, number, x, micro_batch):
        step = self.steps[number]
        if step.part.kind not in ROUTED:
            return step.finish(x, step.inner(x))
        layer, inner = self.layers[str(self.first(number))], step.into(step.norm(x))
        if step.part.kind == "moe":
            with self.record_routing(layer, number, micro_batch):
                return step.finish(x, layer(inner))
        choices, gates = step.route(inner, step.top_k(micro_batch))
        self.chosen[number, micro_batch] = choices
        y = layer(inner, choices, gates) if step.part.kind == "experts" else step.own(layer, inner, choices, gates)
        return step.finish(x, y)

    @contextlib.contextmanager
    def record_routing(self, moe, number, micro_batch):
        """Note what the router chooses, and drops."""
        route = moe.router.forward

        def record(x, load):
            routing = route(x, load)
            self.chosen[number, micro_batch] = routing.experts
            moe.router.forward = route
            return routing

        moe.router.forward = record
        yield


class Twin:
    """The same model without ranks, in one process: all ranks' tokens of a micro-batch go through it together."""

    def __init__(self, case, model, dtype):
        """model: the one on ranks, as it was built."""
        self.case, self.dtype, self.steps, self.first = case, dtype, make_steps(case).to(dtype), model.first
        self.experts, self.routers = {}, {}
        for number, layer in model.experts().items():
            experts = DenseExperts(layer)
            trains = not self.steps[int(number)].part.frozen
            experts.weights = {n: w.detach().to(dtype).requires_grad_(trains) for n, w in experts.weights.items()}
            self.experts[number] = experts
            if number in model.routers():
                weight = model.routers()[number].detach().clone().to(dtype)
                self.routers[number] = weight.requires_grad_(trains), model.layers[number].settings

    def __call__(self, xs, micro_batch, chosen):
        """Compute the outputs of all ranks' xs, and the routing losses -> (ys, loss).

        chosen: by part, of each rank.
        """
        masks = [self.draw_masks(rank, x, micro_batch) for rank, x in enumerate(xs)]
        loss = 0.0
        for number, step in enumerate(self.steps):
            if step.part.kind == "dropout":
                ys = [x * of_rank[number] for x, of_rank in zip(xs, masks, strict=True)]
            elif step.part.kind not in ROUTED:
                ys = [step.inner(x) for x in xs]
            else:
                inner = [step.into(step.norm(x)) for x in xs]
                ys, more = self.exchange(number, step, inner, micro_batch, chosen[number])
                loss = loss + more
            xs = [step.finish(x, y) for x, y in zip(xs, ys, strict=True)]
        return xs, loss

    def draw_masks(self, rank, x, micro_batch):
        """Draw the masks of a rank's dropouts, by part."""
        self.case.seed_dropout(micro_batch, rank)
        numbers = [n for n, step in enumerate(self.steps) if step.part.kind == "dropout"]
        return {number: Dropout()(torch.ones(x.shape)) for number in numbers}

    def exchange(self, number, step, xs, micro_batch, chosen):
        """Compute what a layer of experts does -> (ys, routing losses)."""
        key = str(self.first(number))
        if step.part.kind == "moe":
            return self.apply_moe(key, xs, chosen, step)
        routed = [step.route(x, step.top_k(micro_batch), choices) for x, choices in zip(xs, chosen, strict=True)]
        if step.part.kind == "experts":
            with torch.autocast("cpu", enabled=False):
                return [self.apply_experts(key, step, x, *r) for x, r in zip(xs, routed, strict=True)], 0.0
        return [
            self.round(step, apply_own(step.own, self.round(step, x), *r)) for x, r in zip(xs, routed, strict=True)
        ], 0.0

    def round(self, step, x):
        """Round rows as they travel, unless all is to be exact."""
        rounds = step.part.layer.get("dtype") == torch.bfloat16 and self.dtype == torch.float32
        return x.to(torch.bfloat16).to(x.dtype) if rounds else x

    def apply_experts(self, key, step, x, choices, gates):
        """Compute all experts on all tokens."""
        return self.round(step, self.experts[key](self.round(step, x.to(self.dtype)), choices, gates))

    def apply_moe(self, key, xs, chosen, step):
        """Compute a MoE of all ranks' tokens -> (ys, routing losses)."""
        weight, settings = self.routers[key]
        with torch.autocast("cpu", enabled=False):
            xs = [x.to(self.dtype) for x in xs]
            ys, logits = [], [x @ weight.T for x in xs]
            for x, of_rank, choices in zip(xs, logits, chosen, strict=True):
                check_choices(of_rank, choices)
                gates = of_rank.softmax(-1).gather(1, choices)
                if settings.renormalize and choices.shape[1] > 1:
                    gates = gates / gates.sum(1, keepdim=True)
                gates = gates * within_capacity(choices, settings, len(weight))
                ys.append(self.apply_experts(key, step, x, choices, gates))
            every, counts = torch.cat(logits), torch.bincount(torch.cat(chosen).flatten(), minlength=len(weight))
            if len(every) == 0:
                return ys, 0.0
            aux = len(weight) * (counts / counts.sum() * every.softmax(-1).mean(0)).sum()
            z = every.logsumexp(-1).square().mean()
            return ys, settings.aux_loss_weight * aux + settings.z_loss_weight * z


def apply_own(own, x, choices, gates):
    """Compute all of a user's experts on all tokens."""
    weights = [(gates * (choices == e)).sum(1, keepdim=True) for e in range(len(own.of_expert))]
    return sum(weight * expert(x) for weight, expert in zip(weights, own.of_expert, strict=True))


def within_capacity(choices, settings, num_experts):
    """Return 1 for each assignment [T, K] within its expert's capacity, first choices before second ones, else 0."""
    keep, taken = torch.ones(choices.shape), [0] * num_experts
    capacity = math.ceil(settings.capacity_factor * choices.numel() / num_experts)
    for k in range(choices.shape[1]):
        for t, expert in enumerate(choices[:, k].tolist()):
            taken[expert] += 1
            keep[t, k] = not settings.capacity_factor or taken[expert] <= capacity
    return keep
