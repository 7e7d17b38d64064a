"""The whole state of training as logical arrays: a checkpoint names experts, never the ranks that held them."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from hpcmoe.experts.shapes import split_axis, weight_shape
from hpcmoe.model.balance import read_biases, write_biases
from hpcmoe.run.optimizer import MOMENTS, make_zero_state

LOAD, BIAS = "balance/load", "balance/bias"  # what the routers feel, and what it has made of their biases, [L, E]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySlice:
    """Which part of which logical array a parameter of this rank is."""

    name: str
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    keys: tuple[str, ...]  # of the config, axis by axis
    owned: bool  # this rank, and no other, saves it


class TrainingState:
    """Names every array of this rank's training state, or of its parameters alone when there is no optimizer."""

    def __init__(self, job, optimizer):
        self.job, self.network, self.optimizer = job, job.stepper.network, optimizer
        self.shared = shared_arrays(job.config.model)
        self.rank = job.mesh.world.rank

    @property
    def slices(self):
        """Map every parameter of this rank, the experts' as they lie now -> dict parameter: ArraySlice."""
        places, job, optimizer = {}, self.job, self.optimizer
        for layer, block in enumerate(self.network.layers):
            experts = job.placement.experts_of_rank(layer, job.mesh.expert_index).tolist()
            for slot, (expert, replica) in enumerate(zip(experts, block.experts.replicas, strict=True)):
                owned = job.mesh.data_index == 0 and optimizer is not None and optimizer.shared.owns(layer, slot)
                for name, parameter in replica.named_parameters():
                    places[parameter] = slice_of_expert(job, parameter, (layer, expert, name), owned)
        for name, parameter in self.network.named_parameters():
            if parameter not in places:
                places[parameter] = slice_of_dense(parameter, name, owned=self.rank == 0)
        return places

    def arrays(self):
        """Yield every array of which this rank holds a part -> (ArraySlice of the part, logical name, tensor)."""
        for parameter, place in self.slices.items():
            yield place, f"{place.name}/value", parameter.data
            for piece in self.optimizer.stepped_rows[parameter] if self.optimizer is not None else ():
                for kind, moment in self.moments_of(piece.rows).items():
                    yield slice_of_piece(place, parameter, piece), f"{place.name}/{kind}", moment

    def moments_of(self, rows):
        """Return AdamW's two moments of what it steps; before its first step they are zero."""
        state = self.optimizer.adamw.state[rows]
        if not state:
            state |= make_zero_state(rows, 0)
        return {kind: state[name] for kind, name in MOMENTS.items()}

    def collect(self, shared):
        """Yield what this rank saves -> (name, logical shape, start, array); shared {name: array} is alike on all."""
        for place, name, tensor in self.arrays():
            if place.owned:
                yield name, place.shape, place.start, tensor.view(place.extent).cpu().numpy()
        if self.rank == 0:
            for name, array in (shared | {BIAS: read_biases(self.network.layers)}).items():
                yield name, array.shape, (0,) * array.ndim, array

    def list_wanted(self):
        """List what this rank takes from a checkpoint -> list of (name, logical shape, start, extent, keys)."""
        held = [(name, place.shape, place.start, place.extent, place.keys) for place, name, _ in self.arrays()]
        alike = [(name, shape, (0,) * len(shape), shape, keys) for name, (shape, keys) in self.shared.items()]
        return held + alike

    def restore(self, arrays, step):
        """Take what list_wanted() lists, by (name, start), after so many steps -> the shared {name: array}."""
        for place, name, tensor in self.arrays():
            values = torch.from_numpy(np.ascontiguousarray(arrays[name, place.start]))
            tensor.copy_(values.view(tensor.shape))
        write_biases(self.network.layers, arrays[BIAS, (0, 0)])
        for block in self.network.layers:
            block.experts.refresh()
        if self.optimizer is not None:
            for state in self.optimizer.adamw.state.values():
                state["step"].fill_(float(step))
        return {name: arrays[name, (0,) * len(shape)] for name, (shape, _) in self.shared.items()}


def shared_arrays(model):
    """List the arrays that steps hand on, alike on all ranks -> {name: (shape, keys of the config, axis by axis)}."""
    of_experts = ((model.num_layers, model.num_experts), ("[model] num_layers", "[model] num_experts"))
    return {LOAD: of_experts, BIAS: of_experts}


def slice_of_piece(place, parameter, piece):
    """Return what of a parameter is stepped here: rows of it that are a share's are on no other rank."""
    if piece.rows is parameter:
        return place
    start, extent = (piece.first, *place.start[1:]), (len(piece.rows), *place.extent[1:])
    return dataclasses.replace(place, start=start, extent=extent, owned=True)


def slice_of_dense(parameter, name, owned):
    """Return the slice of a parameter that every rank holds whole."""
    shape = tuple(parameter.shape)
    return ArraySlice(name=f"dense/{name}", shape=shape, start=(0,) * len(shape), extent=shape, keys=(), owned=owned)


def slice_of_expert(job, parameter, where, owned):
    """Return the slice of this rank's shard of one expert's weight; where = (layer, expert, name)."""
    layer, expert, name = where
    rows, columns = weight_shape(job.config.model, name.removesuffix("_bias"))
    is_bias = name.endswith("_bias")
    shape = (job.config.model.num_experts, rows) if is_bias else (job.config.model.num_experts, rows, columns)

    # A bias of the output is whole on its one rank; all else is split over the tensor-parallel group.
    start = [expert] + [0] * parameter.dim()
    if name != "down_bias":
        axis = split_axis(name.removesuffix("_bias"))
        start[1 + axis] = job.mesh.tensor_index * parameter.shape[axis]
    sizes = ("[model] hidden", "[model] feed_forward")  # of an output's rows; of the others the other way round
    return ArraySlice(
        name=f"experts/layer{layer}/{name}",
        shape=shape,
        start=tuple(start),
        extent=(1, *parameter.shape),
        keys=("[model] num_experts", *(sizes if name.startswith("down") else sizes[::-1])),
        owned=owned,
    )
