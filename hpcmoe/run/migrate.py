"""Experts on their way: weights and the optimizer's moments travel piece by piece, while the next step begins.

A move is a permutation of slots, the same for every number of an expert. So experts change places within the slots,
a piece of each at a time, and beside these no rank holds more than STAGING_BYTES.
"""

import time

import numpy as np
import torch
from torch import nn

from hpcmoe.experts.feed_forward import make_empty_weights
from hpcmoe.model.language import make_chooser, make_expert_from
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.prepare.memory import STAGING_BYTES
from hpcmoe.run.optimizer import MOMENTS
from hpcmoe.wait import until_done

MIGRATION_TAG = 0  # of all moves: both ranks take them in one order, and MPI keeps to it. Gradients have the others


class Migration:
    """The experts that go to other ranks and come from them; an exchange pokes it as it does a receiver."""

    def __init__(self, comm, layers):
        """layers: (LocalExperts, piece bytes, sends, receives) of each that changes; sends and receives list
        (peer, tensors)."""
        self.comm, self.done = comm, False
        self.begun = time.perf_counter()
        self.seconds, self.staged_bytes = 0.0, 0  # what it took, and the most that was held
        for experts, _, _, receives in layers:
            experts.awaits_weights = bool(receives)
        self.course = self.go(layers)

    def poke(self):
        """Let it progress, without waiting -> whether anything moved."""
        return next(self.course, False)

    def go(self, layers):
        """Bring one layer's experts after the other, so that a step may begin with the first; yields as poke() does."""
        while layers:  # what has left is let go of
            experts, piece_bytes, sends, receives = layers.pop(0)
            for pieces in zip(*(cut(tensors, piece_bytes) for _, tensors in [*sends, *receives]), strict=True):
                yield from self.exchange(sends, receives, pieces)
            if receives:
                experts.refresh()
            experts.awaits_weights = False
            yield True
        self.done, self.seconds = True, time.perf_counter() - self.begun

    def exchange(self, sends, receives, pieces):
        """Send a piece of each expert that goes, and lay down one of each that comes, when the old one has left."""
        requests, staged = [], []
        for (peer, _), piece in zip(receives, pieces[len(sends) :], strict=True):
            staged.append(torch.empty(piece.shape, dtype=piece.dtype))
            requests.append(self.comm.Irecv(bytes_of(staged[-1]), peer, MIGRATION_TAG))
        leaving = [piece.cpu() for piece in pieces[: len(sends)]]
        requests += [
            self.comm.Isend(bytes_of(piece), peer, MIGRATION_TAG)
            for (peer, _), piece in zip(sends, leaving, strict=True)
        ]
        copies = [piece for own, piece in zip(pieces, leaving, strict=False) if own.device != piece.device]
        self.staged_bytes = max(self.staged_bytes, sum(piece.nbytes for piece in staged + copies))
        yield from until_done(requests)
        for piece, arrived in zip(pieces[len(sends) :], staged, strict=True):
            piece.copy_(arrived)
        yield True


def cut(tensors, piece_bytes):
    """Cut tensors, one after the other, into flat pieces of so many bytes at most."""
    for tensor in tensors:
        yield from tensor.view(-1).split(max(piece_bytes // tensor.element_size(), 1))


def bytes_of(tensor):
    """See a flat tensor on the host as bytes."""
    return tensor.view(torch.uint8).numpy()


def start_migration(job, optimizer, layout, moves, step):
    """Seat the experts as another layout has them after a step, and begin to bring those that come -> Migration.

    Choosers and the optimizer follow at once; each layer's experts wait for their weights. Collective over ep.
    """
    network, rank = job.stepper.network, job.mesh.expert_index

    # What leaves is taken hold of before a slot, or the optimizer, may let go of it.
    job.meter.batches.credit_experts(job.placement, rank)
    sends = find_ends(network, optimizer, moves, (moves.source, moves.source_slot, moves.target), rank)
    for layer in range(len(network.layers)):
        resize_slots(job, layer, layout.placement)
    job.run_placement = layout
    if optimizer is not None:
        optimizer.follow_placement(layout.placement, step)
    receives = find_ends(network, optimizer, moves, (moves.target, moves.target_slot, moves.source), rank)

    entries = []
    for layer in np.unique(moves.layer).tolist():
        here = moves.layer == layer
        most = max(int(np.bincount(ranks[here]).max()) for ranks in (moves.source, moves.target))  # all cut alike
        experts = network.layers[layer].experts
        entries.append((experts, STAGING_BYTES // most, sends.get(layer, []), receives.get(layer, [])))
    return Migration(job.mesh.ep, entries)


def find_ends(network, optimizer, moves, ends, rank):
    """Find the moves that begin or end on this rank -> {layer: list of (peer, tensors)}.

    ends: (rank [n], its slot [n], the peer [n]) of each move, as seen from the end in question.
    """
    own, slots, peers = ends
    found = {}
    for number in np.flatnonzero(own == rank).tolist():
        layer = int(moves.layer[number])
        tensors = expert_tensors(network, optimizer, layer, int(slots[number]))
        found.setdefault(layer, []).append((int(peers[number]), tensors))
    return found


def resize_slots(job, layer, placement):
    """Make room for a layer's experts of another placement: slots that fill get arrays, slots that empty lose them."""
    block, mesh = job.stepper.network.layers[layer], job.mesh
    held = [p.experts_of_rank(layer, mesh.expert_index).tolist() for p in (job.placement, placement)]
    for slot, (before, after) in enumerate(zip(*held, strict=True)):
        if before == EMPTY != after:
            expert = make_expert_from(
                job.config.spec, make_empty_weights(job.config.spec, mesh.tensor_index, mesh.tensor_parallel)
            )
            block.experts.replicas[slot] = expert.to(job.stepper.network.device.torch_device)
        elif after == EMPTY != before:
            block.experts.replicas[slot] = nn.Identity()
    if any((before == EMPTY) != (after == EMPTY) for before, after in zip(*held, strict=True)):
        block.experts.stack_weights()
    block.chooser = make_chooser(job.config.model.num_experts, mesh, placement, layer)


def expert_tensors(network, optimizer, layer, slot):
    """List all that an expert is: its weights, and in training their moments -> tensors, the same for every expert."""
    parameters = list(network.layers[layer].experts.replicas[slot].parameters())
    tensors = [parameter.data for parameter in parameters]
    if optimizer is not None:
        states = [optimizer.adamw.state[parameter] for parameter in parameters]
        tensors += [state[name] for state in states for name in MOMENTS.values()]
    return tensors
