"""Experts move to other ranks: weights and what an optimizer keeps of them travel in pieces, at once or beside a step.

A move is a permutation of slots, the same for every number of an expert. So experts change places within the slots, a
piece of each at a time, and beside these no rank holds more than STAGING_BYTES.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.placement.migrate import Moves
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.prepare.memory import STAGING_BYTES
from hpcmoe.wait import Backoff, until_done, wait_all

_TAG = 0  # of all moves: both ranks take them in one order, which MPI keeps. Gradients have the other tags
Ends = list[tuple[int, list[torch.Tensor]]]  # (peer, the tensors of an expert) of each expert sent or received
Descriptions = list["ParameterState"]  # of an expert's parameters, in their order
GroupOf = Mapping[nn.Parameter, int]  # the number of the optimizer's group that a parameter is in


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """A layer whose experts move, as a rank of the expert-parallel group sees it."""

    local: LocalExperts
    before: np.ndarray  # [S] the expert of each slot of all ranks, -1 where it is empty
    after: np.ndarray  # [S], what stays on a rank in its slot (hpcmoe.placement.migrate.plan_moves)
    moves: Moves  # from one to the other, of this layer alone
    make_replica: Callable[[], Expert]  # allocates an expert whose weights are to come


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """What a parameter is to an optimizer, but for the numbers that travel in pieces."""

    requires_grad: bool
    group: int | None  # of the optimizer's, None where it has no part in it
    values: dict[str, Any]  # of its state, those that are no tensors
    tensors: dict[str, tuple[torch.Size, torch.dtype, bool]]  # of its state: shape, type, is it on the device?


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoves:
    """The experts of a layer that this rank sends and receives."""

    local: LocalExperts
    piece_bytes: int  # at most, of each expert at a time
    sends: Ends
    receives: Ends


class Migration:
    """A background task: sends and receives experts, layer by layer."""

    def __init__(self, comm: MPI.Comm, layers: list[LayerMoves]):
        self.comm, self.done = comm, False
        self.started = time.perf_counter()
        self.seconds, self.staged_bytes = 0.0, 0  # its duration, and the most that was held
        for layer in layers:
            layer.local.awaits_weights = bool(layer.receives)
        self.progress = self.run(layers)

    def poke(self) -> bool:
        """Advance without waiting -> whether anything moved."""
        return next(self.progress, False)

    def run(self, layers: list[LayerMoves]) -> Iterator[bool]:
        """Move one layer's experts after the other, so that a step may begin with the first; yields as poke()."""
        while layers:  # frees what has been sent
            layer = layers.pop(0)
            ends = [*layer.sends, *layer.receives]
            for pieces in zip_longest(*(cut(tensors, layer.piece_bytes) for _, tensors in ends)):
                peers = [(peer, piece) for (peer, _), piece in zip(ends, pieces, strict=True)]
                leaving, coming = peers[: len(layer.sends)], peers[len(layer.sends) :]
                yield from self.swap_pieces(*([p for p in part if p[1] is not None] for part in (leaving, coming)))
            if layer.receives:
                layer.local.refresh()
            layer.local.awaits_weights = False
            yield True
        self.done, self.seconds = True, time.perf_counter() - self.started

    def swap_pieces(
        self, leaving: Sequence[tuple[int, torch.Tensor]], coming: Sequence[tuple[int, torch.Tensor]]
    ) -> Iterator[bool]:
        """Send a piece of each expert that leaves; when it has left, write one of each that comes in its place.

        leaving, coming: (peer, piece) of each.
        """
        # Receive into staging memory, and send.
        staged = [torch.empty(piece.shape, dtype=piece.dtype) for _, piece in coming]
        requests = [self.comm.Irecv(view_bytes(s), peer, _TAG) for (peer, _), s in zip(coming, staged, strict=True)]
        on_host = [piece.cpu() for _, piece in leaving]
        requests += [self.comm.Isend(view_bytes(s), peer, _TAG) for (peer, _), s in zip(leaving, on_host, strict=True)]
        copies = [copy for (_, piece), copy in zip(leaving, on_host, strict=True) if piece.device != copy.device]
        self.staged_bytes = max(self.staged_bytes, sum(piece.nbytes for piece in staged + copies))
        yield from until_done(requests)

        # Write what has come.
        for (_, piece), received in zip(coming, staged, strict=True):
            piece.copy_(received)
        yield True


def cut(tensors: Sequence[torch.Tensor], piece_bytes: int) -> Iterator[torch.Tensor]:
    """Cut tensors, one after the other, into flat pieces of so many bytes at most."""
    for tensor in tensors:
        yield from tensor.view(-1).split(max(piece_bytes // tensor.element_size(), 1))


def view_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a flat tensor on the host, a view."""
    return tensor.view(torch.uint8).numpy()


def move_experts(
    comm: MPI.Comm, changes: Sequence[LayerChange], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Move the experts of some layers and wait until they are there. Collective over comm, the expert-parallel group.

    To be called between an optimizer's step and the next forward pass. Of each expert that moves go its parameters,
    whether they are trained, and all of the optimizer's state of them. A slot that was empty gets new parameters, in
    the optimizer's group of those that they are; those of a slot that becomes empty leave the optimizer. Gradients of
    slots that get another expert are dropped.
    """
    migration, backoff = start_moves(comm, changes, optimizer), Backoff()
    while not migration.done:
        if migration.poke():
            backoff.reset()
        else:
            backoff.pause()


def start_moves(
    comm: MPI.Comm, changes: Sequence[LayerChange], optimizer: torch.optim.Optimizer | None = None
) -> Migration:
    """Start to move experts as move_experts does -> Migration, to be poked. Collective over comm.

    Slots and the optimizer change at once; each layer's experts wait for their weights.
    """
    # Keep the tensors that leave, and tell their new ranks what comes.
    groups = [] if optimizer is None else optimizer.param_groups
    group_of = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
    sends: list[Ends] = []
    leaving: dict[int, list[Descriptions]] = defaultdict(list)
    for change in changes:
        sends.append([])
        for slot, peer in list_ends(change.moves.source, change.moves.source_slot, change.moves.target, comm.rank):
            replica = change.local.replicas[slot]
            leaving[peer].append(describe_expert(replica, optimizer, group_of))
            sends[-1].append((peer, list_tensors(replica, optimizer, leaving[peer][-1])))
    sources = {int(peer) for c in changes for peer in c.moves.source[c.moves.target == comm.rank]}
    coming = exchange_descriptions(comm, leaving, sources)

    # Change slots and optimizer.
    layers = []
    for change, own_sends in zip(changes, sends, strict=True):
        resize_slots(change, comm.rank, optimizer)
        receives = []
        for slot, peer in list_ends(change.moves.target, change.moves.target_slot, change.moves.source, comm.rank):
            replica, states = change.local.replicas[slot], next(coming[peer])
            prepare_expert(replica, optimizer, group_of, states)
            receives.append((peer, list_tensors(replica, optimizer, states)))

        # Cut all experts of a layer alike, so that a rank's pieces fit the staging memory.
        counts = [np.bincount(ranks, minlength=1) for ranks in (change.moves.source, change.moves.target)]
        most = max(int(count.max()) for count in counts)
        piece_bytes = STAGING_BYTES // max(most, 1)
        layers.append(LayerMoves(local=change.local, piece_bytes=piece_bytes, sends=own_sends, receives=receives))
    return Migration(comm, layers)


def list_ends(own: np.ndarray, slots: np.ndarray, peers: np.ndarray, rank: int) -> Iterator[tuple[int, int]]:
    """List the moves that begin or end on a rank -> (its slot, the peer) of each.

    own, slots, peers [n]: the rank, its slot and the other rank of each move, seen from the end in question.
    """
    here = own == rank
    yield from zip(slots[here].tolist(), peers[here].tolist(), strict=True)


def describe_expert(expert: nn.Module, optimizer: torch.optim.Optimizer | None, group_of: GroupOf) -> Descriptions:
    """Describe an expert's parameters and the optimizer's state of them."""
    states = []
    for parameter in expert.parameters():
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        states.append(
            ParameterState(
                requires_grad=parameter.requires_grad,
                group=group_of.get(parameter),
                values={name: value for name, value in state.items() if name not in tensors},
                tensors={name: (t.shape, t.dtype, t.device == parameter.device) for name, t in tensors.items()},
            )
        )
    return states


def list_tensors(
    expert: nn.Module, optimizer: torch.optim.Optimizer | None, states: Descriptions
) -> list[torch.Tensor]:
    """List the tensors of an expert that travel: its parameters, then the optimizer's of each."""
    parameters = list(expert.parameters())
    tensors = [parameter.data for parameter in parameters]
    if optimizer is not None:
        for parameter, state in zip(parameters, states, strict=True):
            tensors += [optimizer.state[parameter][name].contiguous() for name in state.tensors]
    return tensors


def exchange_descriptions(
    comm: MPI.Comm, leaving: dict[int, list[Descriptions]], sources: Iterable[int]
) -> dict[int, Iterator[Descriptions]]:
    """Send each peer the descriptions of what it gets -> those that come, by peer, in the order of the moves."""
    requests = [comm.isend(experts, peer, _TAG) for peer, experts in leaving.items()]
    coming: dict[int, Iterator[Descriptions]] = {}
    waiting, backoff = set(sources), Backoff()
    while waiting:
        found = {peer: message for peer in waiting if (message := comm.improbe(peer, _TAG)) is not None}
        coming |= {peer: iter(message.recv()) for peer, message in found.items()}
        waiting -= found.keys()
        if not found:
            backoff.pause()
    wait_all(requests)
    return coming


def resize_slots(change: LayerChange, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Allocate the slots of a rank that are to be filled, and free those that are to be empty."""
    replicas, ranks = change.local.replicas, (-1, len(change.local.replicas))
    before, after = (slots.reshape(ranks)[rank] == EMPTY for slots in (change.before, change.after))
    gone: set[nn.Parameter] = set()
    for slot in np.flatnonzero(before & ~after).tolist():
        replicas[slot] = change.make_replica()
    for slot in np.flatnonzero(after & ~before).tolist():
        gone.update(replicas[slot].parameters())
        replicas[slot] = nn.Identity()
    if (before != after).any():
        change.local.stack_weights()
    if optimizer is not None and gone:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone:
            optimizer.state.pop(parameter, None)


def prepare_expert(
    expert: nn.Module, optimizer: torch.optim.Optimizer | None, group_of: GroupOf, states: Descriptions
) -> None:
    """Prepare a slot's expert, and the optimizer's state of it, for the numbers of one that comes."""
    # Write over what leaves, piece by piece, where both have the same tensors in one order; else beside it.
    own = describe_expert(expert, optimizer, group_of)
    overwrites = all(
        list(old.tensors.items()) == list(new.tensors.items()) for old, new in zip(own, states, strict=True)
    )
    for parameter, state in zip(expert.parameters(), states, strict=True):
        parameter.grad = None
        parameter.requires_grad_(state.requires_grad)
        if optimizer is None:
            continue
        if state.group is not None and parameter not in group_of:
            optimizer.param_groups[state.group]["params"].append(parameter)
        held = optimizer.state.pop(parameter, {})
        tensors = {
            name: held[name] if overwrites and held[name].is_contiguous() else allocate(described, parameter)
            for name, described in state.tensors.items()
        }
        if tensors or state.values:
            optimizer.state[parameter] = state.values | tensors


def allocate(described: tuple[torch.Size, torch.dtype, bool], parameter: nn.Parameter) -> torch.Tensor:
    """Allocate a tensor of a parameter's state by its description."""
    shape, dtype, on_device = described
    return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
