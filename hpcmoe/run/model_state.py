"""The state of any torch model as logical arrays: what is dense by its name, experts by their number.

dense/NAME/value                     a parameter, or a buffer that state_dict() keeps; tied weights once
experts/PATH.experts.WEIGHT/value    [E, ...] a weight of all experts of a layer, as state_dict() names it
.../state.ENTRY                      beside either: the optimizer's state, of the same shape
                                     or else one number, [1] or [E], or of a shape of its own
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.errors import CheckpointError, on_all, on_root
from hpcmoe.experts.logical import LogicalExperts, name_experts
from hpcmoe.run.optimizer_state import (
    StateKind,
    States,
    allocate_entry,
    describe_entry,
    find_groups,
    list_entries,
    name_dtype,
)
from hpcmoe.run.slices import ArraySlice, cut_rows, cut_slice, slice_of_weight, slice_of_whole
from hpcmoe.wait import gather_to_all

Held = list[tuple[ArraySlice, Tensor]]


@dataclass(slots=True, kw_only=True)
class ArrayInfo:
    """What a checkpoint knows of a parameter or buffer besides its values; as JSON there."""

    dtype: str  # torch's name
    group: int | None = None  # of the optimizer, where it has the parameter
    state: dict[str, StateKind] = field(default_factory=dict)
    absent: dict[str, list[int]] = field(default_factory=dict)  # by entry: experts of which the optimizer has none


class ModelState:
    """Names what a model's parameters, its buffers and an optimizer hold on this rank as slices of logical arrays."""

    def __init__(self, mesh: Mesh, model: nn.Module, optimizer: TorchOptimizer | None):
        """Collective over mesh.world. Raises CheckpointError on all ranks."""
        self.mesh, self.model, self.optimizer = mesh, model, optimizer
        self.layers = {path: m for path, m in model.named_modules() if isinstance(m, LogicalExperts)}
        experts = slice_experts(mesh, self.layers)
        self.slices: dict[nn.Parameter, ArraySlice] = experts | {
            parameter: slice_of_whole(name_dense(name), parameter.shape, owned=mesh.world.rank == 0)
            for name, parameter in model.named_parameters()
            if parameter not in experts
        }
        self.buffers = list_buffers(model)
        self.group_of_parameter = find_groups(optimizer) if optimizer else {}
        on_all(mesh.world, self.check_optimizer)

    def check_optimizer(self) -> None:
        """Check that the optimizer's parameters are the model's."""
        for parameter in self.group_of_parameter:
            if parameter not in self.slices:
                shape = list(parameter.shape)
                raise CheckpointError(f"the optimizer has a parameter {shape} that is not among the model's")

    def describe(self) -> dict[str, ArrayInfo]:
        """Describe every array, those of other ranks' experts too -> {name: ArrayInfo}. Collective over mesh.world."""
        own = on_all(self.mesh.world, lambda: [*self.describe_own()])
        gathered = self.mesh.world.gather(own)
        return on_root(self.mesh.world, lambda: merge([of for ranks in gathered or [] for of in ranks]))

    def describe_own(self) -> Iterator[tuple[str, int | None, ArrayInfo]]:
        """Yield (name, expert, description) of what this rank answers for; dense arrays have no expert."""
        for parameter, part in self.slices.items():
            if part.owned:
                info = ArrayInfo(dtype=name_dtype(parameter), group=self.group_of_parameter.get(parameter))
                for entry, value in (list_entries(self.optimizer, parameter) if self.optimizer else {}).items():
                    what = f"{type(self.optimizer).__name__}: state of {part.name}, {entry}"
                    info.state[entry] = describe_entry(value, parameter, what)
                yield part.name, part.start[0] if is_expert(part) else None, info
        if self.mesh.world.rank == 0:
            yield from ((name, None, ArrayInfo(dtype=name_dtype(buffer))) for name, buffer in self.buffers.items())

    def list_states(self, described: dict[str, ArrayInfo], fill: bool) -> States:
        """List the optimizer's state as described: its values, or zeros where there are none or with fill=False."""
        states: States = {}
        for parameter in self.group_of_parameter:
            info = described.get(self.slices[parameter].name)
            if info is None:
                continue
            found = list_entries(self.optimizer, parameter) if fill and self.optimizer else {}
            states[parameter] = {}
            for entry, kind in info.state.items():
                tensor = allocate_entry(kind, parameter, info.dtype)
                if entry in found:
                    value = found[entry]
                    tensor = value.detach() if isinstance(value, Tensor) else tensor.fill_(value)
                states[parameter][entry] = tensor
        return states

    def list_held(self, states: States) -> Held:
        """List every slice that this rank holds with its tensor, which has as many elements."""
        held: Held = []
        for parameter, part in self.slices.items():
            held.append((dataclasses.replace(part, name=f"{part.name}/value"), parameter.detach()))
            for entry, tensor in states.get(parameter, {}).items():
                held.append((self.slice_of_entry(part, entry, tensor, parameter), tensor))
        for name, buffer in self.buffers.items():
            owned = self.mesh.world.rank == 0
            held.append((slice_of_whole(f"{name}/value", buffer.shape, owned=owned), buffer))
        return held

    def slice_of_entry(self, part: ArraySlice, entry: str, tensor: Tensor, parameter: nn.Parameter) -> ArraySlice:
        """Return the slice of an entry of the optimizer's state beside its parameter's."""
        name = f"{part.name}/state.{escape(entry)}"
        if tensor.shape == parameter.shape and tensor.dim() > 0:
            return dataclasses.replace(part, name=name)
        if not is_expert(part):
            return slice_of_whole(name, tensor.shape, owned=part.owned)
        if tensor.dim() > 0 and self.mesh.tensor_parallel > 1:
            optimizer, shape = type(self.optimizer).__name__, list(tensor.shape)
            raise CheckpointError(
                f"{optimizer} keeps {entry} {shape} of the {list(parameter.shape)} of {part.name}: of experts that "
                f"{self.mesh.tensor_parallel} tensor-parallel ranks share, only state of their own shape can be saved"
            )

        # One number is the same on all shards.
        (expert, *_), (num_experts, *_) = part.start, part.shape
        return ArraySlice(
            name=name,
            shape=(num_experts, *tensor.shape),
            start=(expert, *[0] * tensor.dim()),
            extent=(1, *tensor.shape),
            keys=("num_experts",),
            owned=part.owned and self.mesh.tensor_index == 0,
        )

    def list_owned(self, states: States) -> Held:
        """List what this rank saves. All ranks hold the dense arrays, and each saves a share of their rows.

        Buffers, such as a batch norm's averages, may differ among ranks: rank 0 saves its own.
        """
        held = self.list_held(states)
        buffers = {id(buffer) for buffer in self.buffers.values()}
        shared = {tensor: part for part, tensor in held if not is_expert(part) and id(tensor) not in buffers}
        owned = [
            (part, tensor) for part, tensor in held if part.owned and (tensor not in shared or tensor.numel() == 0)
        ]
        rows = {tensor.reshape(part.extent): part for tensor, part in shared.items() if tensor.numel() > 0}
        shares = cut_rows([*rows], self.mesh.world.rank, self.mesh.world.size)
        return owned + [(cut_slice(rows[t], first, end - first), t[first:end]) for t, first, end in shares]

    def refresh(self) -> None:
        """Drop what experts keep of weights that have changed."""
        for layer in self.layers.values():
            layer.local.refresh()


def slice_experts(mesh: Mesh, layers: dict[str, LogicalExperts]) -> dict[nn.Parameter, ArraySlice]:
    """Cut experts' weights into slices; of replicas the one in the lowest slot is saved. Collective over mesh.ep."""
    slices: dict[nn.Parameter, ArraySlice] = {}
    slots_of_rank = gather_to_all(mesh.ep, [[int(e) for e in layer.expert_of_slot] for layer in layers.values()])
    for number, (path, layer) in enumerate(layers.items()):
        experts = [expert for slots in slots_of_rank for expert in slots[number]]
        before = sum(len(slots[number]) for slots in slots_of_rank[: mesh.ep.rank])
        for expert, slot in layer.list_slots():
            owned = mesh.data_index == 0 and experts.index(expert) == before + slot
            for weight, parameter in layer.local.replicas[slot].named_parameters():
                name = f"experts/{name_weights(path)}{weight}"
                part = slice_of_weight(name, layer.view_shard(weight, parameter), mesh, expert, layer.num_experts)
                slices[parameter] = dataclasses.replace(part, owned=owned)
    return slices


def list_buffers(model: nn.Module) -> dict[str, Tensor]:
    """List the buffers that state_dict() keeps, by the names of their arrays."""
    kept = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                kept[name_dense(f"{path}.{name}" if path else name)] = buffer
    return kept


def name_weights(path: str) -> str:
    """Return what the names of the weights of the layer at a path begin with."""
    return escape(name_experts(f"{path}." if path else ""))


def name_dense(name: str) -> str:
    """Return the name of the arrays of a dense parameter or buffer."""
    return f"dense/{escape(name)}"


def escape(name: str) -> str:
    """Escape what HDF5 takes for a group, or a format of numbers, as JSON pointers do (RFC 6901), % besides."""
    return name.replace("~", "~0").replace("/", "~1").replace("%", "~2")


def is_expert(part: ArraySlice) -> bool:
    """Return True if an array has one entry an expert."""
    return part.name.startswith("experts/")


def merge(described: Iterable[tuple[str, int | None, ArrayInfo]]) -> dict[str, ArrayInfo]:
    """Merge the descriptions of all ranks' arrays: an entry of the state is absent where another expert has it."""
    merged: dict[str, ArrayInfo] = {}
    infos_of_array: dict[str, dict[int | None, ArrayInfo]] = {}
    for name, expert, info in described:
        infos_of_array.setdefault(name, {})[expert] = info
        own = merged.setdefault(name, ArrayInfo(dtype=info.dtype, group=info.group))
        for entry, kind in info.state.items():
            if own.state.setdefault(entry, kind) != kind:
                raise CheckpointError(f"{name}: {entry} of the optimizer's state differs among experts")
        if (own.dtype, own.group) != (info.dtype, info.group):
            raise CheckpointError(f"{name}: dtype or group in the optimizer differ among experts")
    for name, info in merged.items():
        for entry in info.state:
            lacking = [e for e, own in infos_of_array[name].items() if entry not in own.state and e is not None]
            if lacking:
                info.absent[entry] = sorted(lacking)
    return merged
