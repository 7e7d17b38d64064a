"""Fill a model's memory from a checkpoint: each rank its experts, each node the dense parts once for all its ranks.

The dense tensors go around: of a node's n ranks, rank i reads each n-th and broadcasts it to the others.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hpcmoe.errors import HpcmoeError, attempt, on_all, raise_or_return
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.messages import format_size
from hpcmoe.model.hf.mapping import ParameterShapes, Recipe
from hpcmoe.model.hf.sources import Source
from hpcmoe.model.hf.tensor_files import PIECE_BYTES, TensorReader
from hpcmoe.wait import wait_all

log = logging.getLogger(__name__)
_PROGRESS_SECONDS = 5.0
_BROADCAST_BYTES = 2**26  # in one message


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEstimate:
    """Bytes of a load, known before it begins: of this rank, and of its node's ranks together."""

    expert_read: int  # of this rank's experts, from its files
    dense_read: int  # of the dense parts, from its files: this rank's share of what its node reads
    kept: int  # parameters and buffers
    passing: int  # at most at a time beside them, while numbers are converted
    node_read: int
    node_kept: int

    @property
    def read(self) -> int:
        """Return the bytes that this rank reads."""
        return self.expert_read + self.dense_read


@dataclass(frozen=True, slots=True, kw_only=True)
class FillTask:
    """Some of a model's memory and what fills it."""

    recipe: Recipe
    targets: dict[str, Tensor]
    cut: Callable[[Tensor], Tensor] | None = None  # of what is made, where the one target is a shard of it

    @property
    def num_bytes(self) -> int:
        """Return the bytes to read."""
        return sum(source.num_bytes for source in self.recipe.list_sources())

    @property
    def position(self) -> tuple[str, int]:
        """Return where the first of them is: tasks are read in the order of the files."""
        stored = self.recipe.list_sources()[0].stored
        return stored.path, stored.offset

    @property
    def passing_bytes(self) -> int:
        """Return the bytes that are held beside the target at a time, at most."""
        sources, (target, *_) = self.recipe.list_sources(), self.targets.values()
        if self.cut is not None:
            return 3 * sum(count_bytes(source, target) for source in sources)
        if self.recipe.list_views(target) is None:  # the sources whole, and what is made of them
            return 2 * sum(count_bytes(source, target) for source in sources)
        is_plain = all(source.dtype == target.dtype for source in sources) and target.device.type == "cpu"
        return 0 if is_plain else 3 * PIECE_BYTES

    @torch.no_grad()
    def fill(self, reader: TensorReader, shapes: ParameterShapes, config: Any) -> None:
        """Read what the targets are to hold. Raises CheckpointError."""
        name, first = next(iter(self.targets.items()))
        if self.cut is not None:
            whole = torch.empty(shapes.tensors[name].shape, dtype=first.dtype)
            FillTask(recipe=self.recipe, targets={name: whole}).fill(reader, shapes, config)
            first.copy_(self.cut(whole))
            return
        views = self.recipe.list_views(first)
        if views is not None:
            for source, view in views:
                source.fill(reader, view)
            return

        def read(source: Source) -> Tensor:
            """Read a source whole."""
            tensor = torch.empty(source.shape, dtype=source.dtype or first.dtype)
            source.fill(reader, tensor)
            return tensor

        made = self.recipe.make(read, shapes, config)
        for name, target in self.targets.items():
            target.copy_(made[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedLoad:
    """A model in its final form whose weights are still to be read, and what that takes."""

    model: Any
    group: Any  # hpcmoe.group.Group
    folder: str
    dense: list[FillTask]  # alike on all ranks
    experts: list[FillTask]  # this rank's
    shapes: ParameterShapes
    tied: Mapping[str, str]  # what the family ties and the checkpoint has twice: {name: the other}
    estimate: LoadEstimate

    def read(self) -> Any:
        """Read the weights -> the model, in evaluation mode. Collective over the group.

        Raises CheckpointError on all ranks where a file cannot be read.
        """
        started, world = time.monotonic(), self.group.mesh.world
        node = world.Split(int(self.group.topology.node_of_rank[world.rank]), world.rank)
        reader = TensorReader(LoadProgress(self.folder, self.estimate.read, world.rank == 0).show)
        errors = [self.fill_dense(task, index % node.size, node, reader) for index, task in enumerate(self.dense)]
        errors += [self.attempt_fill(task, reader) for task in self.experts if not any(errors)]
        reader.close()
        node.Free()
        on_all(world, lambda: raise_or_return(None, next(filter(None, errors), None)))
        self.finish()
        if world.rank == 0:
            seconds = max(time.monotonic() - started, 1e-9)
            rate = f"{format_size(round(reader.num_bytes / seconds))}/s"
            log.info("%s: %s read in %.1f s (%s)", self.folder, format_size(reader.num_bytes), seconds, rate)
        return self.model

    def fill_dense(self, task: FillTask, root: int, node: MPI.Comm, reader: TensorReader) -> HpcmoeError | None:
        """Fill a dense task on all ranks of a node, of which root reads it -> its error. Collective over the node.

        The broadcast follows a failed read too: the others wait in it.
        """
        on_host = {name: torch.empty_like(t, device="cpu") if t.is_cuda else t for name, t in task.targets.items()}
        error = None
        if node.rank == root:
            error = self.attempt_fill(FillTask(recipe=task.recipe, targets=on_host), reader)
        for name, tensor in on_host.items():
            broadcast_tensor(node, tensor, root)
            if task.targets[name].is_cuda:
                task.targets[name].data.copy_(tensor)
        return error

    def attempt_fill(self, task: FillTask, reader: TensorReader) -> HpcmoeError | None:
        """Fill a task -> its error."""
        return attempt(lambda: task.fill(reader, self.shapes, self.model.config))[1]

    def finish(self) -> None:
        """Replace what is one parameter twice by one, where the numbers are alike; drop what layers keep of weights."""
        for name, other in self.tied.items():
            own, parameter = self.model.get_parameter(name), self.model.get_parameter(other)
            if torch.equal(own, parameter):
                path, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(path), last, parameter)
        for module in self.model.modules():
            if isinstance(module, FamilyExperts):
                module.refresh()


class LoadProgress:
    """What is logged of a load while it goes on."""

    def __init__(self, folder: str, total: int, shows: bool) -> None:
        """total: bytes that this rank reads."""
        self.folder, self.total, self.shows = folder, total, shows
        self.started = self.shown = time.monotonic()

    def show(self, num_bytes: int) -> None:
        """Log the bytes read so far, at most every few seconds."""
        now = time.monotonic()
        if self.shows and now - self.shown > _PROGRESS_SECONDS:
            self.shown = now
            rate = format_size(round(num_bytes / (now - self.started)))
            done = f"{format_size(num_bytes)} of {format_size(self.total)}"
            log.info("%s: rank 0 has read %s, %s/s", self.folder, done, rate)


def count_bytes(source: Source, target: Tensor) -> int:
    """Count the bytes of a source that is read whole for a target."""
    return torch.Size(source.shape).numel() * (source.dtype or target.dtype).itemsize


def broadcast_tensor(comm: MPI.Comm, tensor: Tensor, root: int) -> None:
    """Send a contiguous tensor of the host from root to all ranks, into its own memory. Collective over comm."""
    if comm.size == 1:
        return
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    for begin in range(0, len(flat), _BROADCAST_BYTES):
        wait_all([comm.Ibcast(flat[begin : begin + _BROADCAST_BYTES], root)])
