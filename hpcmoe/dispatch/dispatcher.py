"""One face for what carries tokens to their experts and back: over the host's memory and MPI, or between devices.

    plan      assignments [T, K] -> the replica of each, and its way there
    dispatch  tokens [T, H] at home -> rows at their experts, which receive them in batches; returns a handle
    combine   takes the handle: the experts' results, times the gates, summed by token [T, H]

A batch is worked on chunk by chunk: gather its rows, run the experts, scatter the results. Backward is the mirror: the
gradient of what combine returned is dispatched, and combine returns the gradient of what was dispatched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from hpcmoe.clock import Clock
from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind, Transport, make_message_tag, make_tag
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.traffic import Traffic, make_traffic
from hpcmoe.errors import ClusterError
from hpcmoe.wait import BackgroundTask, Backoff, poke_all

Buffers = TypeVar("Buffers")
PAUSES = 16  # between two looks at everything: looking costs more than asking whether there is anything new


class ExchangeId(NamedTuple):
    """Which exchange of a step, and which way it goes."""

    layer: int
    micro_batch: int
    direction: Direction
    word: int = 0  # of this rank to all ranks of the group: a packed hpcmoe.dispatch.notice.Notice

    def __str__(self) -> str:
        """Format the exchange for who reads an error."""
        return f"{self.direction.name.lower()} of layer {self.layer}, micro-batch {self.micro_batch}"

    def back(self) -> "ExchangeId":
        """Return the way home of an outward exchange."""
        return self._replace(direction=HOMEWARD[self.direction])

    def tag(self, kind: MessageKind, message: int = 0, max_messages: int = 1) -> int:
        """Return the tag of one of its messages. Headers of both directions meet, and show which ranks err."""
        direction = Direction.DISPATCH if kind == MessageKind.HEADER else self.direction
        return make_message_tag(make_tag(self.micro_batch, direction), kind, message, max_messages)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Rows of a batch on which experts work at once, grouped by slot."""

    rows: Any  # where they lie, which gather and scatter of the same dispatcher take
    slots: Sequence[tuple[int, int]]  # (slot, rows) of each slot that has rows


class TokenDispatcher(Protocol):
    """Carries the rows of one expert-parallel group, for all its layers and micro-batches.

    All ranks of the group start the same exchanges in the same order. What plan, dispatch and receive return is the
    dispatcher's own: a plan [T, K], a handle and batches, which its other methods take.

    The handle's `words` [P] int64 are those of all ranks' ExchangeId, complete once receive or receive_again has ended.
    Where they do not fit together, all ranks raise the same ClusterError, from poll_ready, receive or receive_again,
    and from poll_ready ever after.
    """

    clock: Clock
    transport: Transport
    sizes: Any  # hpcmoe.dispatch.sizes
    routes: Routes
    traffic: Traffic
    sum_groups: dict[str, Any] | None  # NCCL's, by which the gradients of a training are summed too
    works_at_once: bool  # a batch has one chunk: all rows of an exchange, for all slots
    repeats_order: bool  # the same batches come in the same order at every run

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of this rank's buffers."""

    @property
    def is_idle(self) -> bool:
        """Return True if this rank has nothing left to do for others."""

    def register(self, task: BackgroundTask) -> None:
        """Poke a task too from now on, until it is over."""

    def pop_traffic(self) -> Traffic:
        """Return what was sent since the last call."""

    def poke(self) -> bool:
        """Advance messages and tasks without waiting, and return True if anything moved."""

    def wait_for_change(self, backoff: Backoff) -> None:
        """Pause, a few times at most, until something has changed since the last poke."""

    def plan(self, experts: Tensor, kept: Tensor | None, chooser: SlotChooser) -> Any:
        """Choose a replica for each assignment to experts [T, K], kept [T, K] bool, and return their plan."""

    def make_plan(self, slots: Any, kept: Any) -> Any:
        """Return the plan for assignments to slots [T, K], kept [T, K] bool."""

    def poll_ready(self, plan: Any, exchange: ExchangeId) -> bool:
        """Return True if an exchange can start. Send the plan's counts where other ranks must know them first."""

    def dispatch(self, plan: Any, rows: Tensor, gates: Tensor, exchange: ExchangeId) -> Any:
        """Start to send rows [T, H], and gates [T, K] beside them, to their experts, and return a handle."""

    def receive(self, handle: Any) -> Iterator[Any]:
        """Yield batches as rows reach this rank's experts, and None while there are none, until all have come."""

    def receive_again(self, handle: Any, batches: Sequence[Any]) -> Iterator[int | None]:
        """Yield the indices of an earlier exchange's batches, of the same plans, as their rows come again, and None."""

    def split(self, handle: Any, batch: Any) -> Iterator[Chunk]:
        """Yield the chunks of a batch."""

    def gather(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return a chunk's rows [m, H] and their gates [m] float32; those beyond the chunk's are padding, of gate 0."""

    def scatter(self, results: Tensor, rows: Any, grad_gates: Tensor | None = None) -> None:
        """Write a chunk's results [m, H], and gradients of its gates [m], to where they go home from."""

    def return_batch(self, handle: Any, batch: Any) -> None:
        """Send home a batch whose results are all written."""

    def poll_results(self, handle: Any) -> bool:
        """Return True if all results are home. Work that the device is given from then on comes after them."""

    def combine(self, handle: Any, gates: Tensor) -> Tensor:
        """Return the results, times gates [T, K], summed by token -> fresh [T, H]."""

    def gather_gate_grads(self, handle: Any) -> Tensor:
        """Return the gradients of the gates that came with the results -> [T, K] float32, 0 where none was sent."""


class ExchangeProgress(Generic[Buffers]):
    """The part of both dispatchers that counts what leaves, and lets messages and background tasks progress."""

    in_flight_buffers: list[Buffers]  # one micro-batch in each

    def __init__(self, transport: Transport, clock: Clock, *backends: Any) -> None:
        """backends: what carries rows besides the transport, each with poke()."""
        self.transport, self.clock = transport, clock
        self.backends = transport, *backends
        self.background_tasks: list[BackgroundTask] = []
        self.conflict: ClusterError | None = None  # of calls that did not fit together: messages may be left from them
        self.traffic = make_traffic(transport.size)

    def find_buffers(self, exchange: ExchangeId) -> Buffers:
        """Return the in-flight buffers of a micro-batch."""
        return self.in_flight_buffers[exchange.micro_batch % len(self.in_flight_buffers)]

    def register(self, task: BackgroundTask) -> None:
        """Poke a task too from now on, until it is over."""
        self.background_tasks.append(task)

    def poke_messages(self) -> bool:
        """Advance messages and tasks without waiting, and return True if anything moved."""
        moved = [backend.poke() for backend in self.backends]
        return any(moved) | poke_all(self.background_tasks)

    def find_missing(self, handle: Any) -> list[int]:
        """List the ranks without whose rows an exchange cannot go on, as far as is known."""
        return []

    def raise_conflict(self, notices: Notices | None = None) -> None:
        """Raise the ClusterError of an exchange in which the ranks' calls do not fit together, or of an earlier one."""
        if self.conflict is None and notices is not None:
            self.conflict = notices.find_conflict()
        if self.conflict is not None:
            raise self.conflict

    def has_changed(self) -> bool:
        """Return True if anything but a message tells of a change since the last poke."""
        return False

    def wait_for_change(self, backoff: Backoff) -> None:
        """Pause, a few times at most, until something has changed since the last poke."""
        for _ in range(PAUSES):
            backoff.pause()
            if self.poke_messages() or self.has_changed():
                return

    def pop_traffic(self) -> Traffic:
        """Return what was sent since the last call."""
        traffic, self.traffic = self.traffic, make_traffic(self.transport.size)
        return traffic

    def count_rows(self, direction: Direction, ranks: Any, rows: Any) -> None:
        """Count rows that leave for other ranks: two ints, or two arrays [n]."""
        self.traffic.rows[direction, ranks] += rows

    def count_assignments(self, exchange: ExchangeId, to_rank: np.ndarray) -> None:
        """Count the assignments that go to each rank [P], forward alone."""
        if exchange.direction == Direction.DISPATCH:
            of_layer = self.traffic.assignments
            of_layer[exchange.layer] = of_layer.get(exchange.layer, 0) + to_rank
