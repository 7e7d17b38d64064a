"""Experts by their logical number: a state_dict names no slot, and a deep copy shares what the ranks share."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.dispatch.router import count_assignments
from hpcmoe.experts.feed_forward import LocalExperts
from hpcmoe.experts.shapes import ShardView, view_own_weight
from hpcmoe.experts.slots import ExpertSlots

# Attributes of a module of a group that its copies share: they hold communicators and memory of several ranks.
SHARED_ATTRIBUTES = ("group", "mesh", "dispatcher", "chooser", "turns", "sums")
_LOGICAL = re.compile(r"(?:experts\.)?(\d+)\.(.+)")


class GroupModule(nn.Module):
    """A module of a group. A deep copy has parameters of its own and shares dispatcher, lanes and group."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy parameters and buffers; what SHARED_ATTRIBUTES name, here or in modules below, is not copied."""
        # Note what is not to be copied; the stack of the weights is built anew.
        for module in self.modules():
            shared = (vars(module)[name] for name in SHARED_ATTRIBUTES if name in vars(module))
            memo |= {id(value): value for value in shared if not isinstance(value, nn.Module)}
            if isinstance(module, LocalExperts):
                module.refresh()
                memo |= {id(vars(module)[name]): {} for name in ("stacked",) if name in vars(module)}

        # Copy the rest, then stack the copied weights.
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        for module in copied.modules():
            if isinstance(module, LocalExperts):
                module.stack_weights()
        return copied


class LayerModule(GroupModule):
    """A layer of a group: which experts this rank has of it, and how many tokens each has had."""

    group: Any  # hpcmoe.group.Group
    placement: ExpertSlots  # of this layer alone
    number: int  # among the group's layers
    tokens_of_expert: Tensor  # [E] int64, assignments of this rank since the group last summed them

    @property
    def name(self) -> str:
        """Return what errors call this layer."""
        return f"hpcmoe layer {self.number}"

    @property
    def expert_of_slot(self) -> np.ndarray:
        """Return the experts in this rank's slots -> int64 [s], -1 in an empty one."""
        return self.placement.experts_of_rank(0, self.group.mesh.expert_index)

    def start_counting(self, num_experts: int) -> None:
        """Set the tokens of all experts to 0."""
        self.register_buffer("tokens_of_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def count(self, experts: Tensor) -> None:
        """Count assignments [T, K]; not those of a checkpoint's second forward pass, which comes within a backward."""
        if torch._C._current_graph_task_id() == -1:
            self.tokens_of_expert += count_assignments(experts, len(self.tokens_of_expert))


class LogicalExperts(LayerModule):
    """A module whose state_dict names this rank's experts logically: `experts.5.up`, whichever slot holds expert 5.

    A module that is itself called `experts` adds no second one: `moe.experts.5.up`. load_state_dict takes the experts
    that this rank holds from a dict of all, or of these alone. Weights are this rank's tensor-parallel shards.
    """

    local: LocalExperts
    num_experts: int

    def view_shard(self, name: str, weight: Tensor) -> ShardView:
        """Return how checkpoints keep a weight of one expert, of which this rank has the whole or a shard."""
        return view_own_weight(name, weight.shape)

    def list_slots(self) -> Iterator[tuple[int, int]]:
        """Yield (expert, slot) of each slot that holds one."""
        slots = enumerate(np.asarray(self.expert_of_slot).tolist())
        return ((expert, slot) for slot, expert in slots if expert >= 0)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what nn.Module.state_dict does, with the experts' logical names. Not collective."""
        found = super().state_dict(*args, **kwargs)
        prefix, expert_of_slot = kwargs.get("prefix", ""), {slot: expert for expert, slot in self.list_slots()}
        own = f"{prefix}local.replicas."
        for key in [key for key in found if key.startswith(own)]:
            slot, _, name = key.removeprefix(own).partition(".")
            found[f"{name_experts(prefix)}{expert_of_slot[int(slot)]}.{name}"] = found.pop(key)
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Name the experts by their slots again, before the modules below look for theirs; torch calls this."""
        if local_metadata.get("assign_to_params_buffers", False):
            raise RuntimeError(
                f"{prefix or 'experts'}: load_state_dict(assign=True): experts keep their memory; omit it"
            )

        # Take the experts away, those of other ranks too; a number or a weight that none has stays, and is unexpected.
        given: dict[tuple[int, str], Any] = {}
        names = {name for replica in self.local.local_replicas() for name, _ in replica.named_parameters()}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            match = _LOGICAL.fullmatch(key.removeprefix(prefix))
            if match and int(match[1]) < self.num_experts and (match[2] in names or not names):
                given[int(match[1]), match[2]] = state_dict.pop(key)

        # Give each slot its own; one that is missing or of another shape keeps its values, and is named logically.
        for expert, slot in self.list_slots():
            for name, parameter in self.local.replicas[slot].named_parameters():
                key, values = f"{name_experts(prefix)}{expert}.{name}", given.get((expert, name))
                if values is None:
                    missing_keys.append(key)
                elif values.shape != parameter.shape:
                    found, wanted = list(values.shape), list(parameter.shape)
                    error_msgs.append(f"size mismatch for {key}: {found} given, this rank holds {wanted}")
                fits = values is not None and values.shape == parameter.shape
                state_dict[f"{prefix}local.replicas.{slot}.{name}"] = values if fits else parameter.detach()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.local.refresh()  # the modules below copy later, and nothing computes in between


def name_experts(prefix: str) -> str:
    """Return what the names of a module's experts begin with, from the module's own prefix: `layers.0.moe.`."""
    return prefix if prefix.split(".")[-2:] == ["experts", ""] else f"{prefix}experts."
