"""Rows to experts of a user's own and back: dispatch and combine, as DeepEP has them, both differentiable.

    rows, counts, handle = dispatcher.dispatch(x, experts, gates)
    y = dispatcher.combine(own_experts(rows, counts), handle)

The backward pass of combine is an exchange, as dispatch is; that of dispatch brings its gradients home.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcmoe.clock import Stage
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.notice import Notice, Use
from hpcmoe.dispatch.router import repeat_for_shards
from hpcmoe.errors import ConfigError
from hpcmoe.experts.layer import start_exchange
from hpcmoe.experts.logical import LayerModule
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.experts.options import check_choices
from hpcmoe.experts.slots import make_chooser


@dataclass(slots=True, kw_only=True, eq=False)
class OwnHandle:
    """What a dispatch leaves for its combine, and both for their backward passes."""

    micro_batch: int
    plan: Any  # the dispatcher's, as exchange and batches
    gates: Tensor  # [T, K * shards] float32
    notice: Notice
    exchange: Any = None  # the one under way
    batches: list[Any] = field(default_factory=list)
    rows_of_chunk: list[list[int]] = field(default_factory=list)  # of each batch
    order: Tensor = field(init=False)  # [R] int64, where the rows by slot lie among those by batch and chunk
    anchor: Tensor = field(init=False)  # [0], by which combine's backward pass is followed by dispatch's
    grad_gates: Tensor | None = None  # [R] float32 by batch and chunk, between both


class Dispatcher(LayerModule):
    """Carries rows to the ranks of a user's own experts, and the results home."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        *,
        group: LayerGroup,
        top_k: int = 2,
        dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
        placement: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Open what carries the rows. Collective over the group; the arguments are those of hpcmoe.Experts.

        Under tensor parallelism each rank of a group gets the rows, and the results of all of them are added up.
        """
        super().__init__()
        parts = group.add_layer(
            self, hidden=hidden, feed_forward=group.mesh.tensor_parallel, num_experts=num_experts, kind="gelu",
            bias=False, top_k=top_k, dtype=dtype, max_tokens=max_tokens, spare_slots_per_rank=0, replicate=False,
            placement=placement, seed=0,
        )  # fmt: skip
        options = parts.options
        self.group, self.options, self.placement, self.number = group, options, parts.placement, parts.number
        self.dispatcher, self.turns = parts.dispatcher, parts.turns
        self.chooser = make_chooser(options.num_experts, parts.mesh, parts.placement, 0)
        self.open_handles: dict[int, OwnHandle] = {}  # micro-batch: dispatched, not combined yet
        self.start_counting(options.num_experts)
        self.to(parts.device.torch_device)

    def dispatch(self, x: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, OwnHandle]:
        """Send each token to its experts -> (rows [R, H] by slot, counts [s] int64 of each slot on the host, handle).

        x [T, H], T up to max_tokens; experts [T, K] integers, gates [T, K] floating-point, K up to top_k, alike on all
        ranks. Collective over the group: all ranks call it alike, and combine() before the next. Rows have the
        dispatcher's dtype. Raises ConfigError; ClusterError on all ranks where one has too many tokens.
        """
        options, turns = self.options, self.turns
        check_choices(self.name, options, x, experts, gates)
        if x.dim() != 2:
            raise ConfigError(f"{self.name}: x has shape {list(x.shape)}: must be [T, {options.hidden}]")
        if turns.micro_batch in self.open_handles:
            raise ConfigError(f"{self.name}: dispatch: combine() of the one before is to come")
        self.count(experts.long())
        first = slice(options.max_tokens)  # what is beyond is refused, on all ranks
        with turns.stage(Stage.ROUTE, self.number):
            plan = self.dispatcher.plan(experts[first].long(), None, self.chooser)
        handle = OwnHandle(
            micro_batch=turns.micro_batch,
            plan=plan,
            gates=repeat_for_shards(gates[first].detach().float(), plan.top_k // experts.shape[1]),
            notice=Notice(
                use=Use.OWN_EXPERTS,
                refuses=len(x) > options.max_tokens,
                rounds_left=max(-(-len(x) // options.max_tokens) - 1, 0),
            ),
        )
        anchor = torch.empty(0, requires_grad=True)
        rows, handle.anchor, counts = Dispatch.apply(x[first], gates[first], anchor, self, handle)
        self.open_handles[turns.micro_batch] = handle
        return rows, counts, handle

    def combine(self, rows: Tensor, handle: OwnHandle) -> Tensor:
        """Return the sum of each token's results, times its gates -> [T, H] in the rows' precision.

        rows [R, H]: the results of the rows that dispatch() returned, in their order. Collective over the group.
        """
        micro_batch = self.turns.micro_batch
        if self.open_handles.get(micro_batch) is not handle:
            raise ConfigError(f"{self.name}: combine: the handle is not that of the last dispatch()")
        wanted = [len(handle.order), self.options.hidden]
        if list(rows.shape) != wanted:
            raise ConfigError(f"{self.name}: rows have shape {list(rows.shape)}: must be {wanted}")
        del self.open_handles[micro_batch]
        return Combine.apply(rows, handle.anchor, self, handle)

    def run(self, *stages: tuple[Stage, Iterator[bool]]) -> None:
        """Run stages to their ends, one after the other, while other micro-batches go on."""
        self.turns.run_stages(self.number, list(stages))

    def start(self, handle: OwnHandle, rows: Tensor, direction: Direction) -> Iterator[bool]:
        """Start an exchange of rows [T, H] as soon as it can."""
        handle.exchange = yield from start_exchange(self.dispatcher, self.number, handle, rows, direction)
        yield True

    def receive(self, handle: OwnHandle, found: list[Any]) -> Iterator[bool]:
        """Receive all batches, and append to found (batch, its chunks' slots, its chunks' rows) of each."""
        for batch in self.dispatcher.receive(handle.exchange):
            if batch is not None:
                chunks = list(self.dispatcher.split(handle.exchange, batch))
                rows = [self.dispatcher.gather(chunk.rows)[0][: count_rows(chunk.slots)] for chunk in chunks]
                found.append((batch, [chunk.slots for chunk in chunks], rows))
            yield batch is not None

    def receive_again(self, handle: OwnHandle, found: dict[int, Any]) -> Iterator[bool]:
        """Receive the batches of an earlier exchange again, and note [(rows, gates)] of the chunks of each."""
        for index in self.dispatcher.receive_again(handle.exchange, handle.batches):
            if index is not None:
                chunks = self.dispatcher.split(handle.exchange, handle.batches[index])
                sizes = handle.rows_of_chunk[index]
                gathered = [self.dispatcher.gather(chunk.rows) for chunk in chunks]
                found[index] = [(r[:n], g[:n]) for (r, g), n in zip(gathered, sizes, strict=True)]
            yield index is not None

    def send_home(self, handle: OwnHandle, rows: Tensor, grad_gates: Tensor | None = None) -> Iterator[bool]:
        """Return rows [R, H] by batch and chunk, and gradients of gates [R] if any, and wait for this rank's own."""
        begin = 0
        for batch, sizes in zip(handle.batches, handle.rows_of_chunk, strict=True):
            for chunk, size in zip(self.dispatcher.split(handle.exchange, batch), sizes, strict=True):
                part, begin = slice(begin, begin + size), begin + size
                own = None if grad_gates is None else grad_gates[part]
                self.dispatcher.scatter(rows[part], chunk.rows, own)
            self.dispatcher.return_batch(handle.exchange, batch)
            yield True
        while not self.dispatcher.poll_results(handle.exchange):
            yield False


class Dispatch(torch.autograd.Function):
    """Tokens to their experts; backward, the gradients of rows and gates home."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, _: Tensor, own: Dispatcher, handle: OwnHandle
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows [R, H] by slot, an anchor [0], and the rows of each slot [s]."""
        # Receive all batches; their order is the same at every run.
        found: list[Any] = []
        own.run((Stage.DISPATCH, own.start(handle, x, Direction.DISPATCH)), (Stage.COMPUTE, own.receive(handle, found)))
        found.sort(key=lambda entry: entry[0].key)
        handle.batches = [batch for batch, _, _ in found]
        handle.rows_of_chunk = [[count_rows(slots) for slots in chunks] for _, chunks, _ in found]

        # Sort the rows by slot.
        runs = np.array([run for _, chunks, _ in found for slots in chunks for run in slots], np.int64).reshape(-1, 2)
        slots = torch.from_numpy(np.repeat(runs[:, 0], runs[:, 1]))
        handle.order = slots.argsort(stable=True).to(x.device)
        pieces = [rows for _, _, of_batch in found for rows in of_batch]
        empty = x.new_empty((0, x.shape[1]), dtype=getattr(torch, own.options.dtype))
        rows = torch.cat([empty, *pieces]).index_select(0, handle.order)
        counts = torch.bincount(slots, minlength=own.placement.slots_per_rank)
        ctx.own, ctx.handle, ctx.dtype, ctx.top_k = own, handle, x.dtype, gates.shape[1]
        ctx.mark_non_differentiable(counts)
        return rows, x.new_empty(0), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, _anchor: Tensor, _counts: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x [T, H] and of the gates [T, K]."""
        own, handle = ctx.own, ctx.handle
        if handle.grad_gates is None:
            raise ConfigError(f"{own.name}: backward of dispatch() without that of its combine()")
        by_chunk = torch.empty_like(grad_rows).index_copy_(0, handle.order, grad_rows)
        own.run((Stage.ROUTE_BACKWARD, own.send_home(handle, by_chunk, handle.grad_gates)))
        grad_x = own.dispatcher.combine(handle.exchange, torch.ones_like(handle.gates)).to(ctx.dtype)
        grad_gates = own.dispatcher.gather_gate_grads(handle.exchange).unflatten(1, (ctx.top_k, -1)).sum(dim=2)
        own.turns.end_exchange()
        return grad_x, grad_gates, None, None, None


class Combine(torch.autograd.Function):
    """Results home, times their gates; backward, the gradients of the sums to the experts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, _: Tensor, own: Dispatcher, handle: OwnHandle) -> Tensor:
        """Return the sums [T, H]."""
        by_chunk = torch.empty_like(rows).index_copy_(0, handle.order, rows)
        own.run((Stage.COMBINE, own.send_home(handle, by_chunk)))
        output = own.dispatcher.combine(handle.exchange, handle.gates).to(rows.dtype)
        own.turns.end_exchange()
        ctx.own, ctx.handle = own, handle
        ctx.save_for_backward(by_chunk)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows [R, H], and leave that of each row's gate to dispatch."""
        own, handle, (results,) = ctx.own, ctx.handle, ctx.saved_tensors
        found: dict[int, Any] = {}
        own.run(
            (Stage.COMBINE_BACKWARD, own.start(handle, grad_output, Direction.COMBINE_BACKWARD)),
            (Stage.COMPUTE_BACKWARD, own.receive_again(handle, found)),
        )
        pairs = [pair for index in sorted(found) for pair in found[index]]
        grads = torch.cat([results[:0], *(rows for rows, _ in pairs)])
        gates = torch.cat([results.new_empty(0, dtype=torch.float32), *(gates for _, gates in pairs)])
        handle.grad_gates = (grads * results).sum(dim=1).float()
        grad_rows = (grads * gates[:, None].to(grads.dtype)).index_select(0, handle.order)
        return grad_rows, grad_output.new_zeros(0), None, None


def count_rows(slots: Sequence[tuple[int, int]]) -> int:
    """Count the rows of a chunk."""
    return sum(rows for _, rows in slots)
