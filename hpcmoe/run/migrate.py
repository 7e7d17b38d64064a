"""Experts move to other ranks: weights and the optimizer's moments travel in pieces, while the next step begins.

A migration is a permutation of slots, the same for every number of an expert. So experts change places within the
slots, a piece of each at a time, and beside these no rank holds more than STAGING_BYTES.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpcmoe.experts.feed_forward import LocalExperts, make_empty_weights
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.experts.slots import make_chooser
from hpcmoe.model.language import LanguageModel, make_expert_from
from hpcmoe.placement.migrate import Moves
from hpcmoe.placement.result import Placement
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.prepare.memory import STAGING_BYTES
from hpcmoe.prepare.placement import RunPlacement
from hpcmoe.run.job import Job
from hpcmoe.run.optimizer import MOMENTS, Optimizer
from hpcmoe.wait import until_done

_TAG = 0  # of all migrations: both ranks take them in one order, which MPI keeps. Gradients have the other tags
Ends = list[tuple[int, list[torch.Tensor]]]  # (peer, the tensors of an expert) of each expert sent or received


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoves:
    """The experts of a layer that this rank sends and receives."""

    experts: LocalExperts
    piece_bytes: int  # at most, of each expert at a time
    sends: Ends
    receives: Ends


class Migration:
    """A background task of the dispatcher: sends and receives experts, layer by layer."""

    def __init__(self, comm: MPI.Comm, layers: list[LayerMoves]):
        self.comm, self.done = comm, False
        self.started = time.perf_counter()
        self.seconds, self.staged_bytes = 0.0, 0  # its duration, and the most that was held
        for layer in layers:
            layer.experts.awaits_weights = bool(layer.receives)
        self.progress = self.run(layers)

    def poke(self) -> bool:
        """Advance without waiting -> whether anything moved."""
        return next(self.progress, False)

    def run(self, layers: list[LayerMoves]) -> Iterator[bool]:
        """Move one layer's experts after the other, so that a step may begin with the first; yields as poke()."""
        while layers:  # frees what has been sent
            layer = layers.pop(0)
            ends = [*layer.sends, *layer.receives]
            for pieces in zip(*(cut(tensors, layer.piece_bytes) for _, tensors in ends), strict=True):
                yield from self.swap_pieces(layer, pieces)
            if layer.receives:
                layer.experts.refresh()
            layer.experts.awaits_weights = False
            yield True
        self.done, self.seconds = True, time.perf_counter() - self.started

    def swap_pieces(self, layer: LayerMoves, pieces: Sequence[torch.Tensor]) -> Iterator[bool]:
        """Send a piece of each expert that leaves; when it has left, write one of each that comes in its place."""
        # Receive into staging memory, and send.
        leaving, coming = pieces[: len(layer.sends)], pieces[len(layer.sends) :]
        staged = [torch.empty(piece.shape, dtype=piece.dtype) for piece in coming]
        receives, sends = ([peer for peer, _ in ends] for ends in (layer.receives, layer.sends))
        requests = [self.comm.Irecv(view_bytes(s), peer, _TAG) for peer, s in zip(receives, staged, strict=True)]
        on_host = [piece.cpu() for piece in leaving]
        requests += [self.comm.Isend(view_bytes(s), peer, _TAG) for peer, s in zip(sends, on_host, strict=True)]
        copies = [copy for piece, copy in zip(leaving, on_host, strict=True) if piece.device != copy.device]
        self.staged_bytes = max(self.staged_bytes, sum(piece.nbytes for piece in staged + copies))
        yield from until_done(requests)

        # Write what has come.
        for piece, received in zip(coming, staged, strict=True):
            piece.copy_(received)
        yield True


def cut(tensors: Sequence[torch.Tensor], piece_bytes: int) -> Iterator[torch.Tensor]:
    """Cut tensors, one after the other, into flat pieces of so many bytes at most."""
    for tensor in tensors:
        yield from tensor.view(-1).split(max(piece_bytes // tensor.element_size(), 1))


def view_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a flat tensor on the host, a view."""
    return tensor.view(torch.uint8).numpy()


def start_migration(job: Job, optimizer: Optimizer | None, layout: RunPlacement, moves: Moves, step: int) -> Migration:
    """Set another placement after a step, and start to move the experts. Collective over ep.

    Choosers and the optimizer change at once; each layer's experts wait for their weights.
    """
    network, rank = job.stepper.network, job.mesh.expert_index

    # Keep the tensors that leave before slots and the optimizer drop them.
    job.meter.batches.credit_experts(job.placement, rank)
    sends = find_own_ends(network, optimizer, moves, (moves.source, moves.source_slot, moves.target), rank)
    for layer in range(len(network.layers)):
        resize_slots(job, layer, layout.placement)
    job.run_placement = layout
    if optimizer is not None:
        optimizer.follow_placement(layout.placement, step)
    receives = find_own_ends(network, optimizer, moves, (moves.target, moves.target_slot, moves.source), rank)

    # Cut all experts of a layer alike, so that a rank's pieces fit the staging memory.
    layers = []
    for layer in np.unique(moves.layer).tolist():
        here = moves.layer == layer
        most = max(int(np.bincount(ranks[here]).max()) for ranks in (moves.source, moves.target))
        layers.append(
            LayerMoves(
                experts=network.layers[layer].experts.local,
                piece_bytes=STAGING_BYTES // most,
                sends=sends.get(layer, []),
                receives=receives.get(layer, []),
            )
        )
    return Migration(job.mesh.ep, layers)


def find_own_ends(
    network: LanguageModel,
    optimizer: Optimizer | None,
    moves: Moves,
    ends: tuple[np.ndarray, np.ndarray, np.ndarray],
    rank: int,
) -> dict[int, Ends]:
    """Find the moves that begin or end on this rank -> by layer.

    ends: (rank [n], its slot [n], the peer [n]) of each move, seen from the end in question.
    """
    own, slots, peers = ends
    found: dict[int, Ends] = {}
    for number in np.flatnonzero(own == rank).tolist():
        layer = int(moves.layer[number])
        tensors = expert_tensors(network, optimizer, layer, int(slots[number]))
        found.setdefault(layer, []).append((int(peers[number]), tensors))
    return found


def resize_slots(job: Job, layer: int, placement: Placement) -> None:
    """Allocate the slots of a layer that another placement fills, free those that it empties, and set its chooser."""
    block, mesh = job.stepper.network.layers[layer], job.mesh
    before, after = (p.experts_of_rank(layer, mesh.expert_index) == EMPTY for p in (job.placement, placement))
    for slot in np.flatnonzero(before & ~after).tolist():
        weights = make_empty_weights(make_expert_shape(job.spec), mesh.tensor_index, mesh.tensor_parallel)
        expert = make_expert_from(job.spec, weights)
        block.experts.local.replicas[slot] = expert.to(job.stepper.network.device.torch_device)
    for slot in np.flatnonzero(after & ~before).tolist():
        block.experts.local.replicas[slot] = nn.Identity()
    if (before != after).any():
        block.experts.local.stack_weights()
    block.experts.chooser = make_chooser(job.spec.model.num_experts, mesh, placement, layer)


def expert_tensors(network: LanguageModel, optimizer: Optimizer | None, layer: int, slot: int) -> list[torch.Tensor]:
    """List the tensors of an expert: its weights, and in training their moments; the same for every expert."""
    parameters = list(network.layers[layer].experts.local.replicas[slot].parameters())
    tensors = [parameter.data for parameter in parameters]
    if optimizer is not None:
        states = [optimizer.adamw.state[parameter] for parameter in parameters]
        tensors += [state[name] for state in states for name in MOMENTS.values()]
    return tensors
