"""A layer's experts, wherever they live, as one differentiable function of tokens, choices and gates.

    forward    dispatch -> compute -> combine
    backward   combine_backward -> compute_backward -> the gradients come home

A stage that may have to wait is a generator: it yields True after a piece of work and False when there is nothing to do
yet. Who runs it may let another micro-batch go on meanwhile (hpcmoe.pipeline.lanes). Autograd sees one function: the
gradients of the experts' parameters are added where they are computed.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcmoe.clock import Stage
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.dispatcher import ExchangeId, TokenDispatcher
from hpcmoe.dispatch.notice import ONE_ROUND, Notice, count_rounds_left, pack_call
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.experts.feed_forward import Kept, LocalExperts


class Turns(Protocol):
    """Who runs stages (hpcmoe.pipeline.lanes.Lanes)."""

    contexts: Any  # a set of LayerContext

    @property
    def micro_batch(self) -> int:
        """Return the number of the calling thread's micro-batch."""

    def stage(self, stage: Stage, layer: int) -> AbstractContextManager[None]:
        """Count the seconds of the with-block to a stage that need not wait, and name this in what goes wrong."""

    def run_stages(self, layer: int, stages: Sequence[tuple[Stage, Iterator[bool]]]) -> None:
        """Run stages of a layer, one after the other, to their ends."""

    def end_exchange(self) -> None:
        """Finish an exchange for the other ranks, where no stage follows."""


class Call(Protocol):
    """What an exchange needs to know of the call of a layer that makes it."""

    micro_batch: int
    plan: Any  # the dispatcher's
    gates: Tensor  # [T, K * shards] float32
    notice: Notice


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class LayerContext:
    """What a call of a layer leaves behind in its forward pass, for its backward pass."""

    micro_batch: int
    training: bool
    plan: Any  # the dispatcher's, as the handle and batches
    gates: Tensor  # [T, K * shards] float32
    notice: Notice  # what this rank tells the others of the call
    rounds_left: int = 0  # exchanges of the same call that some rank has still to make, as all have told
    handle: Any = field(init=False)  # of the exchange under way
    batches: list[Any] = field(default_factory=list)  # of this rank's experts
    kept: list[list[Kept]] = field(default_factory=list)  # of each batch, what its experts need for their backward
    num_kept: list[list[int]] = field(default_factory=list)  # tensors of each of these
    inputs: Any = None  # rows and residual [T, H], while the forward pass lasts
    output: Any = None  # [T, H], of the forward pass, then the gradient of x
    grad_gates: Any = None  # [T, K * shards]


class ExpertLayer(nn.Module):
    """The experts of a layer: those of this rank's slots, and the way to all others."""

    def __init__(
        self, local: LocalExperts, dispatcher: TokenDispatcher, chooser: SlotChooser, turns: Turns, number: int
    ) -> None:
        """local: this rank's; chooser: experts [T, K] -> slots [T, K * shards]; number: of the layer, from 0."""
        super().__init__()
        self.local, self.dispatcher, self.chooser = local, dispatcher, chooser
        self.turns, self.number = turns, number
        self.anchor = torch.empty(0, requires_grad=True)  # of the graph, where nothing else wants a gradient

    def forward(
        self, x: Tensor, experts: Tensor, gates: Tensor, kept: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Compute residual + the sum over k of gates[:, k] * expert[experts[:, k]](x) -> [T, H].

        x [T, H]; experts [T, K] int64; gates [T, K] float32; kept [T, K] bool where assignments are dropped; residual
        [T, H] or none. Collective over the group: all ranks call the same layers in the same order, in training and
        not alike. Once differentiable.
        """
        return self.exchange(x, experts, gates, kept, residual)[0]

    def exchange(
        self,
        x: Tensor,
        experts: Tensor,
        gates: Tensor,
        kept: Tensor | None,
        residual: Tensor | None = None,
        notice: Notice = ONE_ROUND,
    ) -> tuple[Tensor, int]:
        """Compute what forward() does, for one of several exchanges of a call -> (output, exchanges to come).

        notice: how many this rank has still to make; the most of any rank is returned. Collective over the group.
        """
        with self.turns.stage(Stage.ROUTE, self.number):
            plan = self.dispatcher.plan(experts, kept, self.chooser)
        num_shards = plan.top_k // experts.shape[1]  # one assignment to each shard of an expert
        context = LayerContext(
            micro_batch=self.turns.micro_batch,
            training=torch.is_grad_enabled(),
            plan=plan,
            gates=repeat_for_shards(gates.detach().float(), num_shards),
            notice=notice,
        )
        if context.training:
            output = Exchange.apply(x, gates, residual, self.anchor, self, context)
        else:
            output = self.run_forward(context, x, residual)
        return output, context.rounds_left

    def run_forward(self, context: LayerContext, x: Tensor, residual: Tensor | None) -> Tensor:
        """Run the stages of a forward pass -> residual, if any, + the sum of the experts' results times their gates."""
        self.turns.contexts.add(context)
        context.inputs = x, residual
        self.turns.run_stages(
            self.number,
            [
                (Stage.DISPATCH, self.start(context, x, Direction.DISPATCH)),
                (Stage.COMPUTE, self.compute(context)),
                (Stage.COMBINE, self.combine(context, residual)),
            ],
        )
        context.rounds_left = count_rounds_left(context.handle.words)
        self.turns.end_exchange()
        output, context.output, context.inputs = context.output, None, None
        return output if residual is not None else output.to(x.dtype)

    def start(self, context: LayerContext, rows: Tensor, direction: Direction) -> Iterator[bool]:
        """Start an exchange of rows [T, H] as soon as it can."""
        context.handle = yield from start_exchange(self.dispatcher, self.number, context, rows, direction)

    def compute(self, context: LayerContext) -> Iterator[bool]:
        """Compute on rows as they come, and scatter the results to where they go home from."""
        dispatcher = self.dispatcher
        while self.local.awaits_weights:
            yield False
        for batch in dispatcher.receive(context.handle):
            if batch is None:
                yield False
                continue
            kept: list[Kept] = []
            for number, chunk in enumerate(dispatcher.split(context.handle, batch)):
                if number > 0:
                    yield True
                dispatcher.traffic.count_batches(self.number, chunk.slots)
                rows, _ = dispatcher.gather(chunk.rows)
                dispatcher.scatter(self.local(chunk.slots, rows, kept if context.training else None), chunk.rows)
            dispatcher.return_batch(context.handle, batch)  # before anything else is done: the homes wait for it
            if context.training:
                context.batches.append(batch)
                context.kept.append(kept)
            yield True

    def compute_backward(self, context: LayerContext) -> Iterator[bool]:
        """Compute the gradients of inputs and gates at the experts, as gradients come, and scatter them."""
        dispatcher = self.dispatcher
        for index in dispatcher.receive_again(context.handle, context.batches):
            if index is None:
                yield False
                continue
            batch, kept = context.batches[index], context.kept[index][::-1]
            context.kept[index] = []
            for number, chunk in enumerate(dispatcher.split(context.handle, batch)):
                if number > 0:
                    yield True
                grad_x, grad_gates = self.local.backward(chunk.slots, *dispatcher.gather(chunk.rows), kept)
                dispatcher.scatter(grad_x, chunk.rows, grad_gates)
            dispatcher.return_batch(context.handle, batch)
            yield True
        self.local.gradients_added()

    def combine(self, context: LayerContext, residual: Tensor | None) -> Iterator[bool]:
        """Add the results of each token, times their gates, to the residual, if any."""
        while not self.dispatcher.poll_results(context.handle):
            yield False
        context.output = self.dispatcher.combine(context.handle, context.gates)
        if residual is not None:
            same = context.output.dtype == residual.dtype
            context.output = context.output.add_(residual) if same else residual + context.output

    def gather_grads(self, context: LayerContext) -> Iterator[bool]:
        """Sum each token's gradients, and gather those of its gates."""
        while not self.dispatcher.poll_results(context.handle):
            yield False
        context.output = self.dispatcher.combine(context.handle, torch.ones_like(context.gates))
        context.grad_gates = self.dispatcher.gather_gate_grads(context.handle)


class Exchange(torch.autograd.Function):
    """Tokens to their experts and back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        residual: Tensor | None,
        _anchor: Tensor,
        layer: ExpertLayer,
        context: LayerContext,
    ) -> Tensor:
        """Return residual, if any, + the sum of the experts' results times their gates [T, H]."""
        output = layer.run_forward(context, x, residual)
        ctx.layer, ctx.context, ctx.dtype, ctx.top_k = layer, context, x.dtype, gates.shape[1]
        kept = pack_kept(context, layer.dispatcher.repeats_order)
        ctx.save_for_backward(context.gates, *kept)  # never nothing: a checkpoint recomputes on all ranks
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x [T, H], gates [T, K] and residual; add those of the experts' parameters."""
        layer, context = ctx.layer, ctx.context
        context.gates, *kept = ctx.saved_tensors
        unpack_kept(context, kept)
        layer.turns.run_stages(
            layer.number,
            [
                (Stage.COMBINE_BACKWARD, layer.start(context, grad_output, Direction.COMBINE_BACKWARD)),
                (Stage.COMPUTE_BACKWARD, layer.compute_backward(context)),
                (Stage.ROUTE_BACKWARD, layer.gather_grads(context)),
            ],
        )
        layer.turns.end_exchange()
        layer.turns.contexts.discard(context)
        grad_x, context.output = context.output.to(ctx.dtype), None
        grad_gates = context.grad_gates.unflatten(1, (ctx.top_k, -1)).sum(dim=2)
        return grad_x, grad_gates, grad_output if ctx.needs_input_grad[2] else None, None, None, None


def start_exchange(
    dispatcher: TokenDispatcher, layer: int, call: Call, rows: Tensor, direction: Direction
) -> Generator[bool, None, Any]:
    """Yield False until an exchange of rows [T, H] can start, and start it -> the dispatcher's handle."""
    word = pack_call(call.notice, layer, direction, call.plan.top_k)
    exchange = ExchangeId(layer, call.micro_batch, direction, word)
    while not dispatcher.poll_ready(call.plan, exchange):
        yield False
    return dispatcher.dispatch(call.plan, rows, call.gates, exchange)


def pack_kept(context: LayerContext, repeats_order: bool) -> list[Tensor]:
    """Move what the experts keep out of a context, into one list: autograd holds it, and may recompute it.

    Batches that come in another order at each run are put into one that does not depend on it.
    """
    if not repeats_order:
        order = sorted(range(len(context.batches)), key=lambda index: context.batches[index].key)
        context.batches, context.kept = ([of[index] for index in order] for of in (context.batches, context.kept))
    kept, context.kept = context.kept, []
    context.num_kept = [[len(of_slot) for of_slot in of_batch] for of_batch in kept]
    return [tensor for of_batch in kept for of_slot in of_batch for tensor in of_slot]


def unpack_kept(context: LayerContext, tensors: Sequence[Tensor]) -> None:
    """Restore in the context what pack_kept() has moved."""
    left = iter(tensors)
    context.kept = [[tuple(itertools.islice(left, number)) for number in of_batch] for of_batch in context.num_kept]
