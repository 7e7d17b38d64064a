"""The auxiliary loss of a spread model: that of the tokens of all ranks, each rank's loss its own share of it.

A family's loss of the whole batch is E * sum over e of (C_e / R) * (P_e / R): over all MoE layers together, C_e tokens
choose expert e, P_e is the sum of its probabilities, and R counts rows, all but those that the attention mask drops.
C and R have no gradient, so once they are summed over ranks the loss is linear in what is left: the share of a rank is
the same with its own P_e. The shares sum to the whole, and the gradient of each is the whole loss's.

    loss of a rank = its cross-entropies / num_items_in_batch + router_aux_loss_coef * its share

The sum is of one micro-batch over ranks, as for hpcmoe.MoE: micro-batches in lanes have a loss each.
"""

import functools
import inspect
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from hpcmoe.clock import Stage
from hpcmoe.dispatch.router import load_balancing_grad
from hpcmoe.errors import ConfigError
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.experts.layer import Turns
from hpcmoe.experts.losses import LaneSums
from hpcmoe.experts.moe import LayerGroup

_FUNCTION = "load_balancing_loss_func"  # of each modeling module of transformers whose family has the loss
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of it


class AuxLoss:
    """What a spread model calls in place of its family's loss: this rank's share of that of all ranks."""

    def __init__(self, sums: LaneSums, turns: Turns, layer: int) -> None:
        """layer: by which errors say where, the model's last."""
        self.sums, self.turns, self.layer = sums, turns, layer

    def __call__(
        self, gate_logits: Any, num_experts: int, top_k: int, attention_mask: Tensor | None = None
    ) -> Tensor | int:
        """Compute this rank's share of the loss from its logits [T, E] of each layer -> float32 [].

        attention_mask [sequences, length]: 1 for a token that counts. Collective over the group, as the model's
        forward pass: while it waits for the other ranks' counts, other micro-batches go on.
        """
        if not isinstance(gate_logits, tuple):
            return 0
        kept = None if attention_mask is None else attention_mask.flatten().to(gate_logits[0].device)
        counts, probability_sum = add_up_layers(gate_logits, num_experts, top_k, kept)
        sums = self.sums.start(self.turns, counts)
        self.turns.run_stages(self.layer, [(Stage.ROUTE, sums.until_done())])
        grad = load_balancing_grad(sums.counts[:-1], int(sums.counts[-1]))
        return top_k * (self.sums.device.copy_from_host(grad.numpy()) * probability_sum).sum()


def add_up_layers(
    gate_logits: Sequence[Tensor], num_experts: int, top_k: int, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over layers' logits [T, E] -> (tokens of each expert, and rows, float64 [E + 1]; probabilities [E]).

    kept [T]: 1 for a row that counts; none: all do. Choices are the largest probabilities, as in transformers.
    """
    counts = gate_logits[0].new_zeros(num_experts + 1, dtype=torch.float64)
    probability_sum = gate_logits[0].new_zeros(num_experts, dtype=torch.float32)
    for logits in gate_logits:
        probability = logits.to(counts.device).softmax(-1)
        chosen = probability.detach().topk(top_k).indices
        weight = counts.new_ones(len(chosen)) if kept is None else kept.to(counts.dtype)
        counts.scatter_add_(0, chosen.flatten(), weight.repeat_interleave(top_k))
        counts[-1] += weight.sum()
        probability = probability.float()
        probability_sum = probability_sum + (probability if kept is None else probability * kept[:, None]).sum(0)
    return counts, probability_sum


def share_aux_loss(model: nn.Module, group: LayerGroup) -> None:
    """Install the auxiliary loss of all ranks' tokens in a spread model, where its family has one.

    A module that computes it becomes one of a subclass whose forward() is its class's own, but for that function; no
    other model notices. Collective over the group. Raises ConfigError on all ranks.
    """
    modules = list_balanced(model)
    layers = [layer for layer in model.modules() if isinstance(layer, FamilyExperts)]
    if modules and layers:
        loss = AuxLoss(group.open_sums(), layers[-1].turns, layers[-1].number)
        for module in modules:
            module.__class__ = bind_class(type(module), loss)


def check_forwards(where: str, model: nn.Module) -> None:
    """Raise ConfigError, which begins with `where`, where share_aux_loss() could not give a model its loss."""
    for module in list_balanced(model):
        if "forward" in vars(module):
            raise ConfigError(f"{where}: {type(module).__name__}.forward is replaced: spread the model before")
        try:
            bind_class(type(module), None)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def list_balanced(model: nn.Module) -> list[nn.Module]:
    """List the modules that compute the auxiliary loss in their forward()."""
    owners = {cls: find_owner(cls) for cls in {type(module) for module in model.modules()}}
    return [module for module in model.modules() if owners[type(module)] is not None]


def find_owner(cls: type) -> type | None:
    """Find the class of a class's bases whose forward() computes the auxiliary loss."""
    return next((base for base in cls.__mro__ if "forward" in vars(base) and calls_loss(vars(base)["forward"])), None)


def calls_loss(forward: Any) -> bool:
    """Return True if a forward() computes the auxiliary loss by the function that all families have alike."""
    innermost = inspect.unwrap(forward)
    if _FUNCTION not in getattr(getattr(innermost, "__code__", None), "co_names", ()):
        return False
    return list(inspect.signature(innermost.__globals__[_FUNCTION]).parameters) == _ARGUMENTS


def bind_class(cls: type, loss: AuxLoss | None) -> type:
    """Derive a class whose forward() is its own but for the auxiliary loss; its name stays. Raises ConfigError."""
    owner = find_owner(cls)
    assert owner is not None  # the caller has looked
    bound = derive(owner, owner, forward=bind_function(vars(owner)["forward"], {_FUNCTION: loss}))
    return bound if owner is cls else derive(cls, cls, bound)


def derive(cls: type, *bases: type, **members: Any) -> type:
    """Derive a class of bases, named as cls: transformers goes by the names of classes."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, bases, named | members)


def bind_function(function: Any, names: dict[str, Any]) -> Any:
    """Copy a function, and those that it wraps, so that the innermost finds these globals. Raises ConfigError."""
    inner, known, cells = vars(function).get("__wrapped__"), function.__globals__, function.__closure__ or ()
    if inner is None:
        return copy_function(function, known | names, cells)
    if not any(cell.cell_contents is inner for cell in cells):
        raise ConfigError(f"{function.__qualname__} wraps a forward() in a way that is not known")
    bound_inner = bind_function(inner, names)
    cells = tuple(CellType(bound_inner) if cell.cell_contents is inner else cell for cell in cells)
    bound = copy_function(function, known, cells)
    vars(bound)["__wrapped__"] = bound_inner
    return bound


def copy_function(function: Any, known: dict[str, Any], cells: tuple[CellType, ...]) -> FunctionType:
    """Copy a function, with other globals and cells of its closure."""
    copied = FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function)
    del vars(copied)["__wrapped__"]
    return copied
