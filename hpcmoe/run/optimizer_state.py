"""Any torch optimizer's state as arrays beside its parameters, and its groups' hyper-parameters as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from hpcmoe.errors import CheckpointError

# Entries of a param_group that are no hyper-parameters, or choose how this machine computes: each run keeps its own.
_OWN_OF_GROUP = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
_NUMBERS: dict[str, type] = {"int": int, "float": float, "bool": bool}  # Python's, in which an optimizer may count

States = dict[nn.Parameter, dict[str, Tensor]]  # by parameter and name; of no axis for one number


@dataclass(frozen=True, slots=True, kw_only=True)
class StateKind:
    """What one entry of an optimizer's state is; as JSON in a checkpoint."""

    dtype: str  # torch's name, or int, float, bool of Python
    shape: list[int] | None  # None: the parameter's


def describe_entry(value: Any, parameter: nn.Parameter, what: str) -> StateKind:
    """Describe an entry of a parameter's state. Raises CheckpointError for one that is neither tensor nor number."""
    if isinstance(value, Tensor):
        like = value.dim() > 0 and value.shape == parameter.shape
        return StateKind(dtype=name_dtype(value), shape=None if like else list(value.shape))
    if (name := type(value).__name__) in _NUMBERS:
        return StateKind(dtype=name, shape=[])
    raise CheckpointError(f"{what} is a {name}: only tensors and numbers of an optimizer's state can be saved")


def name_dtype(tensor: Tensor) -> str:
    """Return a tensor's dtype as torch names it: float32."""
    return str(tensor.dtype).removeprefix("torch.")


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype of a StateKind, a Python number's too."""
    of_number = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}
    return of_number[name] if name in of_number else getattr(torch, name)


def list_entries(optimizer: TorchOptimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """List what an optimizer keeps of a parameter, in alphabetical order; entries of None are nothing."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in sorted(state) if state[name] is not None}


def allocate_entry(kind: StateKind, parameter: nn.Parameter, saved_dtype: str) -> Tensor:
    """Allocate an entry of zeros beside a parameter; what had the parameter's dtype when it was saved has it again."""
    dtype = parameter.dtype if kind.dtype == saved_dtype and kind.shape != [] else find_dtype(kind.dtype)
    shape = parameter.shape if kind.shape is None else kind.shape
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def restore_entries(
    optimizer: TorchOptimizer, parameter: nn.Parameter, kinds: Mapping[str, StateKind], entries: Mapping[str, Tensor]
) -> None:
    """Replace an optimizer's state of a parameter by other entries.

    As in Optimizer.load_state_dict of torch, `step` stays on the host unless the optimizer is fused or capturable.
    """
    group = optimizer.param_groups[find_groups(optimizer)[parameter]]
    on_device = group.get("fused") or group.get("capturable")
    state = {}
    for name, entry in entries.items():
        if kinds[name].dtype in _NUMBERS:
            state[name] = _NUMBERS[kinds[name].dtype](entry.item())
        else:
            state[name] = entry.cpu() if name == "step" and not on_device else entry
    optimizer.state.pop(parameter, None)
    if state:
        optimizer.state[parameter] = state


def find_groups(optimizer: TorchOptimizer) -> dict[nn.Parameter, int]:
    """Find the index of each parameter's group."""
    return {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}


def list_hyperparameters(optimizer: TorchOptimizer) -> list[dict[str, Any]]:
    """List each group's hyper-parameters as plain values; tensors of one number become numbers."""
    return [
        {name: make_plain(value) for name, value in group.items() if name not in _OWN_OF_GROUP}
        for group in optimizer.param_groups
    ]


def make_plain(value: Any) -> Any:
    """Convert tensors of one number to numbers, in lists and tuples too."""
    if isinstance(value, (list, tuple)):
        return [make_plain(entry) for entry in value]
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def restore_hyperparameters(optimizer: TorchOptimizer, groups: list[dict[str, Any]]) -> None:
    """Set each group's hyper-parameters; a tensor is filled, a tuple stays one."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for name, value in saved.items():
            group[name] = restore_value(group.get(name), value)


def restore_value(present: Any, value: Any) -> Any:
    """Return a saved plain value in the form of the present one."""
    if isinstance(present, Tensor):
        return present.fill_(value)
    if isinstance(present, tuple) and len(present) == len(value):
        return tuple(restore_value(own, entry) for own, entry in zip(present, value, strict=True))
    return value
