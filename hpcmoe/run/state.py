"""The state of training as logical arrays: a checkpoint names experts, never the ranks that held them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from hpcmoe.config import ModelConfig
from hpcmoe.experts.shapes import view_own_weight
from hpcmoe.model.balance import read_biases, write_biases
from hpcmoe.run.job import Job
from hpcmoe.run.optimizer import MOMENTS, Optimizer, SteppedRows, make_zero_state
from hpcmoe.run.slices import ArraySlice, cut_slice, slice_of_weight, slice_of_whole

LOAD, BIAS = "balance/load", "balance/bias"  # the load that routers feel, and their biases, [L, E]
SharedArrays = dict[str, np.ndarray]  # by name, equal on all ranks


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
                    path, num_experts = f"experts/layer{layer}/{name}", job.config.model.num_experts
                    view = view_own_weight(name, parameter.shape)
                    part = slice_of_weight(path, view, job.mesh, expert, num_experts)
                    keys = tuple(f"[model] {key}" for key in part.keys)
                    slices[parameter] = replace(part, keys=keys, owned=owned)
        for name, parameter in self.network.named_parameters():
            if parameter not in slices:
                slices[parameter] = slice_of_whole(f"dense/{name}", parameter.shape, owned=job.mesh.world.rank == 0)
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
    return part if rows.rows is parameter else cut_slice(part, rows.first, len(rows.rows))
