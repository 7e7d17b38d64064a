"""Experts of many ranks on their way to those that write them: one expert a writer at a time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.model.hf.names import CheckpointPart, describe_shards, restore_expert
from hpcmoe.wait import gather_to_all, wait_all

_TAG = 0  # all ranks take the experts in one order, which MPI keeps
_MOST_SENT = 2**30  # bytes of one message
Round = list[tuple[int, CheckpointPart | None]]  # what each writing rank wants, if anything
Description = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of a shard's parameters


class ExpertGatherer:
    """Brings experts to the ranks that want them; of replicas the one in the lowest slot is sent."""

    def __init__(self, mesh: Mesh, layers: Mapping[str, FamilyExperts]) -> None:
        """Collective over mesh.world: what an expert is in each layer is told by who holds the first."""
        self.mesh, self.layers = mesh, layers
        self.slots = {path: find_first_slots(layer) for path, layer in layers.items()}
        own = {
            (path, shard): describe_shards(layer, slot)
            for path, layer in layers.items()
            for shard in range(mesh.tensor_parallel)
            for rank, slot in [self.find_owner(path, 0, shard)]
            if rank == mesh.world.rank
        }
        self.descriptions: dict[tuple[str, int], Description] = {}
        for of_rank in gather_to_all(mesh.world, own):
            self.descriptions |= of_rank

    def find_owner(self, path: str, expert: int, shard: int) -> tuple[int, int]:
        """Find who sends a tensor-parallel shard of an expert -> (rank of the world, its slot)."""
        placement, slot = self.layers[path].placement, self.slots[path][expert]
        rank = int(placement.rank_of_replica[slot]) * self.mesh.tensor_parallel + shard
        return rank, slot % placement.slots_per_rank

    def make_first_experts(self) -> dict[str, dict[str, Tensor]]:
        """Make one expert of each layer as the family's model has it, without memory -> by path."""
        return {
            path: restore_expert(layer, path, self.make_shards(path, "meta")) for path, layer in self.layers.items()
        }

    def make_shards(self, path: str, device: str) -> list[dict[str, Tensor]]:
        """Allocate the tensor-parallel shards of an expert of a layer."""
        return [
            {
                name: torch.empty(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in self.descriptions[path, shard].items()
            }
            for shard in range(self.mesh.tensor_parallel)
        ]

    def fetch(self, wanted: Round) -> dict[str, Tensor]:
        """Send to each rank the expert it wants, none or one each -> this rank's as the family's model has it.

        wanted: (rank, expert), alike on all ranks. Collective over mesh.world.
        """
        requests: list[MPI.Request] = []
        staged: list[Any] = []  # what must outlive the requests
        own: tuple[str, list[dict[str, Tensor]]] | None = None
        for rank, part in wanted:
            if part is None or not part.layer:
                continue
            coming = self.make_shards(part.layer, "cpu") if rank == self.mesh.world.rank else None
            if coming is not None:
                own = part.layer, coming
            for shard in range(self.mesh.tensor_parallel):
                requests += self.start(part, shard, rank, coming[shard] if coming else None, staged)
        wait_all(requests)
        return {} if own is None else restore_expert(self.layers[own[0]], *own)

    def start(
        self, part: CheckpointPart, shard: int, target: int, coming: dict[str, Tensor] | None, staged: list[Any]
    ) -> list[MPI.Request]:
        """Start to send or receive a shard of an expert, or copy it where both ends are here."""
        comm, (source, slot) = self.mesh.world, self.find_owner(part.layer, part.expert, shard)
        requests = []
        for name in self.descriptions[part.layer, shard]:
            if source == comm.rank:
                held = self.layers[part.layer].local.replicas[slot].get_parameter(name).detach()
                if coming is not None:
                    coming[name].copy_(held)
                    continue
                pieces = cut_bytes(held.cpu().contiguous())
                staged.append(pieces)
                requests += [comm.Isend(piece.numpy(), target, _TAG) for piece in pieces]
            elif coming is not None:
                requests += [comm.Irecv(piece.numpy(), source, _TAG) for piece in cut_bytes(coming[name])]
        return requests


def find_first_slots(layer: FamilyExperts) -> dict[int, int]:
    """Find the lowest slot of each expert, among those of all ranks."""
    experts = layer.placement.expert_of_replica[0].tolist()
    return {expert: slot for slot, expert in reversed([*enumerate(experts)]) if expert >= 0}


def cut_bytes(tensor: Tensor) -> Sequence[Tensor]:
    """Cut the bytes of a tensor on the host into views that one message each can carry."""
    return tensor.reshape(-1).view(torch.uint8).split(_MOST_SENT)


def list_rounds(
    parts_of_rank: Mapping[int, Sequence[CheckpointPart]],
) -> Iterable[Round]:
    """List what each writing rank converts at a time: [(rank, part)], a part less where a rank has no more."""
    for parts in zip_longest(*parts_of_rank.values()):
        yield [*zip(parts_of_rank, parts, strict=True)]
