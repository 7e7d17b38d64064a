"""The state of training as logical arrays: a checkpoint names experts, never the ranks that held them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from hpcmoe.config import ModelConfig
from hpcmoe.experts.shapes import make_expert_shape, split_axis, weight_shape
from hpcmoe.model.balance import read_biases, write_biases
from hpcmoe.run.job import Job
from hpcmoe.run.optimizer import MOMENTS, Optimizer, SteppedRows, make_zero_state

LOAD, BIAS = "balance/load", "balance/bias"  # the load that routers feel, and their biases, [L, E]
SharedArrays = dict[str, np.ndarray]  # by name, equal on all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySlice:
    """Part of a logical array."""

    name: str
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    keys: tuple[str, ...] = ()  # of the config, axis by axis
    owned: bool = False  # this rank, and no other, saves it


class TrainingState:
    """Names every array of this rank's training state, or of its parameters alone without an optimizer."""

    def __init__(self, job: Job, optimizer: Optimizer | None):
        self.job, self.network, self.optimizer = job, job.stepper.network, optimizer
        self.shared = make_shared_slices(job.config.model, owned=job.mesh.world.rank == 0)

    @property
    def slices(self) -> dict[nn.Parameter, ArraySlice]:
        """Return the slice of each parameter of this rank, the experts' by the present placement."""
        slices, job, optimizer = {}, self.job, self.optimizer
        for layer, block in enumerate(self.network.layers):
            experts = job.placement.experts_of_rank(layer, job.mesh.expert_index).tolist()
            for slot, (expert, replica) in enumerate(zip(experts, block.experts.local.replicas, strict=True)):
                owned = job.mesh.data_index == 0 and optimizer is not None and optimizer.shared.owns(layer, slot)
                for name, parameter in replica.named_parameters():
                    slices[parameter] = slice_of_expert(job, parameter, (layer, expert, name), owned)
        for name, parameter in self.network.named_parameters():
            if parameter not in slices:
                slices[parameter] = slice_of_dense(parameter, name, owned=job.mesh.world.rank == 0)
        return slices

    def arrays(self) -> Iterator[tuple[ArraySlice, torch.Tensor]]:
        """Yield every slice that this rank holds, with its tensor; those that are equal on all ranks are left out."""
        for parameter, part in self.slices.items():
            yield replace(part, name=f"{part.name}/value"), parameter.data
            if self.optimizer is None:
                continue
            for rows in self.optimizer.stepped_rows[parameter]:
                for kind, moment in moments_of(self.optimizer, rows.rows).items():
                    yield replace(slice_of_rows(part, parameter, rows), name=f"{part.name}/{kind}"), moment

    def collect(self, shared: SharedArrays) -> Iterator[tuple[ArraySlice, np.ndarray]]:
        """Yield what this rank saves; shared {name: array} is equal on all ranks."""
        for part, tensor in self.arrays():
            if part.owned:
                yield part, tensor.view(part.extent).cpu().numpy()
        for name, array in (shared | {BIAS: read_biases(self.network.layers)}).items():
            if self.shared[name].owned:
                yield self.shared[name], array

    def list_wanted(self) -> list[ArraySlice]:
        """List what this rank takes from a checkpoint."""
        return [*(part for part, _ in self.arrays()), *self.shared.values()]

    def restore(self, arrays: Mapping[tuple[str, tuple[int, ...]], np.ndarray], step: int) -> SharedArrays:
        """Set the state after a step from the wanted arrays, by (name, start) -> those equal on all ranks."""
        for part, tensor in self.arrays():
            values = torch.from_numpy(np.ascontiguousarray(arrays[part.name, part.start]))
            tensor.copy_(values.view(tensor.shape))
        shared = {name: arrays[name, part.start] for name, part in self.shared.items()}
        write_biases(self.network.layers, shared[BIAS])
        for block in self.network.layers:
            block.experts.local.refresh()
        if self.optimizer is not None:
            for state in self.optimizer.adamw.state.values():
                state["step"].fill_(float(step))
        return shared


def moments_of(optimizer: Optimizer, rows: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return AdamW's two moments of what it steps; before its first step they are zero."""
    state = optimizer.adamw.state[rows]
    if not state:
        state |= make_zero_state(rows, 0)
    return {kind: state[name] for kind, name in MOMENTS.items()}


def make_shared_slices(model: ModelConfig, owned: bool) -> dict[str, ArraySlice]:
    """Return the slices of the arrays that are equal on all ranks, by name."""
    shape, keys = (model.num_layers, model.num_experts), ("[model] num_layers", "[model] num_experts")
    names = (LOAD, BIAS)
    return {n: ArraySlice(name=n, shape=shape, start=(0, 0), extent=shape, keys=keys, owned=owned) for n in names}


def slice_of_rows(part: ArraySlice, parameter: nn.Parameter, rows: SteppedRows) -> ArraySlice:
    """Return the slice of what of a parameter is stepped here; rows of a share are on no other rank."""
    if rows.rows is parameter:
        return part
    start, extent = (rows.first, *part.start[1:]), (len(rows.rows), *part.extent[1:])
    return replace(part, start=start, extent=extent, owned=True)


def slice_of_dense(parameter: nn.Parameter, name: str, owned: bool) -> ArraySlice:
    """Return the slice of a parameter that every rank holds whole."""
    shape = tuple(parameter.shape)
    return ArraySlice(name=f"dense/{name}", shape=shape, start=(0,) * len(shape), extent=shape, owned=owned)


def slice_of_expert(job: Job, parameter: nn.Parameter, where: tuple[int, int, str], owned: bool) -> ArraySlice:
    """Return the slice of this rank's shard of one expert's weight; where = (layer, expert, name)."""
    layer, expert, name = where
    rows, columns = weight_shape(make_expert_shape(job.spec), name.removesuffix("_bias"))
    is_bias = name.endswith("_bias")
    shape = (job.config.model.num_experts, rows) if is_bias else (job.config.model.num_experts, rows, columns)

    # The bias of the output is whole on its one rank; all else is split over the tensor-parallel group.
    start = [expert] + [0] * parameter.dim()
    if name != "down_bias":
        axis = split_axis(name.removesuffix("_bias"))
        start[1 + axis] = job.mesh.tensor_index * parameter.shape[axis]
    sizes = ("[model] hidden", "[model] feed_forward")  # of "down"; of the others the other way round
    return ArraySlice(
        name=f"experts/layer{layer}/{name}",
        shape=shape,
        start=tuple(start),
        extent=(1, *parameter.shape),
        keys=("[model] num_experts", *(sizes if name.startswith("down") else sizes[::-1])),
        owned=owned,
    )
