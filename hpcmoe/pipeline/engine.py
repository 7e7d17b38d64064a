"""Runs a schedule: takes every lane as far as it can go, and carries what one stage leaves for the next."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpcmoe.clock import Stage, Timer
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.errors import HpcmoeError
from hpcmoe.experts.layer import LayerContext, MoELayer
from hpcmoe.pipeline.schedule import Op
from hpcmoe.wait import Backoff

HEAVY = Stage.COMPUTE, Stage.COMPUTE_BACKWARD  # experts' work, which may wait while others send and fetch


class Network(Protocol):
    """What an engine runs: MoE layers between an embedding and a head."""

    layers: Sequence[MoELayer]
    load: Any  # [L, E], tokens of each expert / expected, as measured in earlier steps

    def embed(self, micro_batch: int) -> Tensor:
        """Return the first layer's x [T, H]."""

    def head(self, micro_batch: int, x: Tensor, contexts: list[LayerContext]) -> Tensor | None:
        """Compute the loss from the last x [T, H] and all layers' contexts, and return its gradient when training."""

    def poll_routing_grads(self, micro_batch: int) -> bool:
        """Return True if routing_grads need not wait."""

    def routing_grads(self, layer: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return the routing losses' gradients with respect to probability_sum [E] and z_sum []."""

    def embed_backward(self, micro_batch: int, grad: Tensor) -> None:
        """Apply the gradient of the first layer's x [T, H]."""

    def poke(self) -> bool:
        """Advance what goes on beside the schedule, and return True if any of it has ended."""


class Lane:
    """One lane of a schedule, as far as it has come."""

    def __init__(self, ops: Sequence[Op], run_op: Callable[[Op], Iterator[bool]]) -> None:
        self.ops, self.run_op = iter(ops), run_op
        self.next_op()

    def next_op(self) -> None:
        """Start the next op."""
        self.op = next(self.ops, None)
        self.pieces = iter(()) if self.op is None else self.run_op(self.op)

    def step(self) -> bool:
        """Advance by one piece of work, and return True if there was one to do."""
        worked = next(self.pieces, None)
        if worked is None:
            self.next_op()
            return True
        return worked


class Engine:
    """One step of a network, by a schedule."""

    def __init__(self, network: Network, dispatcher: TokenDispatcher) -> None:
        self.network, self.dispatcher, self.clock = network, dispatcher, dispatcher.clock
        self.values: dict[int, Any] = {}  # micro-batch: x between layers on the way up, its gradient on the way down
        self.contexts: dict[tuple[int, int], LayerContext] = {}  # by layer and micro-batch
        self.num_heads = 0  # micro-batches that have passed the head, in order: it begins a sum over all ranks
        self.at: Op | None = None  # what was last worked on

    def run(
        self,
        schedule: Sequence[Sequence[Op]],
        training: bool,
        observe: Callable[[Collection[LayerContext]], None] | None = None,
    ) -> None:
        """Run all ops of the schedule, and show observe() the contexts after each. Collective over ep and tp."""
        self.num_heads = 0
        with torch.set_grad_enabled(training), self.located_errors():
            self.go([Lane(ops, lambda op: self.run_op(op, training, observe)) for ops in schedule])
            self.drain()
        self.values.clear()
        self.contexts.clear()

    @contextlib.contextmanager
    def located_errors(self) -> Iterator[None]:
        """Add to whatever goes wrong which stage saw it; a device reports it some time after its cause."""
        try:
            yield
        except Exception as error:
            if self.at is None:
                raise
            place = f"in stage {self.at.stage} of layer {self.at.layer}, micro-batch {self.at.micro_batch}"
            if isinstance(error, HpcmoeError):
                raise type(error)(f"{place}: {error}") from error
            error.add_note(place)
            raise

    def go(self, lanes: list[Lane]) -> None:
        """Run all lanes to their ends: first those that send and fetch, then one piece of an expert's work."""
        backoff = Backoff()
        while lanes := [lane for lane in lanes if lane.op is not None]:
            moved = self.dispatcher.poke() | self.network.poke()  # before anything is looked at
            for lane in sorted(lanes, key=is_heavy):
                heavy = is_heavy(lane)
                if self.step(lane):
                    moved = True
                    if heavy:
                        break
            if moved:
                backoff.reset()
            elif (op := lanes[0].op) is not None:
                with self.clock.measure(op.stage.wait_as):
                    self.dispatcher.wait_for_change(backoff)

    def step(self, lane: Lane) -> bool:
        """Advance a lane by one piece, and return True if there was one."""
        assert lane.op is not None
        self.at = lane.op
        with self.clock.measure(lane.op.stage.report_as):
            return lane.step()

    def drain(self) -> None:
        """Wait until this rank has done all that others want of it."""
        backoff = Backoff()
        with self.clock.measure(Timer.WAITING):
            while not self.dispatcher.is_idle:
                if self.dispatcher.poke():
                    backoff.reset()
                else:
                    self.dispatcher.wait_for_change(backoff)

    def run_op(
        self, op: Op, training: bool, observe: Callable[[Collection[LayerContext]], None] | None
    ) -> Iterator[bool]:
        """Run one op, piece by piece."""
        yield from self.pieces(op, training)
        if observe is not None:
            observe(self.contexts.values())

    def pieces(self, op: Op, training: bool) -> Iterator[bool]:
        """Yield True after each piece of an op, and False while it must wait."""
        network, at, m = self.network, (op.layer, op.micro_batch), op.micro_batch
        layer = network.layers[op.layer]
        match op.stage:
            case Stage.EMBED:
                self.values[m] = network.embed(m)
            case Stage.ROUTE:
                self.contexts[at] = LayerContext(layer=op.layer, micro_batch=m, training=training)
                layer.route(self.contexts[at], self.values.pop(m), network.load[op.layer])
            case Stage.DISPATCH:
                yield from layer.dispatch(self.contexts[at])
            case Stage.COMPUTE:
                yield from layer.compute(self.contexts[at])
            case Stage.COMBINE:
                yield from layer.combine(self.contexts[at])
                self.values[m] = self.contexts[at].output
            case Stage.HEAD:
                while self.num_heads < m:
                    yield False
                contexts = [self.contexts[number, m] for number in range(len(network.layers))]
                self.values[m] = network.head(m, self.values.pop(m), contexts)
                self.num_heads += 1
                if not training:  # no way down needs them
                    self.contexts = {key: context for key, context in self.contexts.items() if key[1] != m}
            case Stage.COMBINE_BACKWARD:
                yield from layer.combine_backward(self.contexts[at], self.values.pop(m))
            case Stage.COMPUTE_BACKWARD:
                yield from layer.compute_backward(self.contexts[at])
            case Stage.ROUTE_BACKWARD:
                while not network.poll_routing_grads(m):
                    yield False
                yield from layer.route_backward(self.contexts[at], *network.routing_grads(*at))
                self.values[m] = self.contexts.pop(at).output
            case Stage.EMBED_BACKWARD:
                network.embed_backward(m, self.values.pop(m))
            case _:
                raise ValueError(f"unknown stage {op.stage}")


def is_heavy(lane: Lane) -> bool:
    """Return True if a lane is at its experts' work."""
    return lane.op is not None and lane.op.stage in HEAVY
