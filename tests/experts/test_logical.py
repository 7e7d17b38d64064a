"""A state_dict names experts, not slots; a rank takes its own from a dict of all; copies share what ranks share."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hpcmoe.experts.feed_forward import Expert, GroupedExperts, LocalExperts
from hpcmoe.experts.logical import GroupModule, LogicalExperts

NUM_EXPERTS, HIDDEN, INNER = 6, 3, 4
WEIGHTS = {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER), "up_bias": (INNER,)}


class Shared:
    """What stands for a dispatcher, with a communicator that nothing copies."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class Experts(LogicalExperts):
    """Experts in the slots of one rank."""

    def __init__(self, expert_of_slot, kind=LocalExperts):
        super().__init__()
        self.num_experts, self.slots = NUM_EXPERTS, np.array(expert_of_slot)
        self.local = kind([nn.Identity() if expert < 0 else make_expert(expert) for expert in expert_of_slot])
        self.local.stack_weights()
        self.local.listeners.append(Shared())
        self.dispatcher = Shared()
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def expert_of_slot(self):
        return self.slots


class Block(GroupModule):
    """A module around them that shares, too."""

    def __init__(self, experts):
        super().__init__()
        self.dispatcher, self.experts = experts.dispatcher, experts


def make_expert(expert, kind="gelu"):
    generator = torch.Generator().manual_seed(expert)
    return Expert(kind, {name: torch.randn(shape, generator=generator) for name, shape in WEIGHTS.items()})


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def zero(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def all_experts():
    """The dict of one rank that holds all, under the name of a model's attribute."""
    return {f"moe.{name}": values for name, values in weights_of(Experts(range(NUM_EXPERTS))).items()}


@pytest.mark.parametrize("kind", [LocalExperts, GroupedExperts])
def test_a_state_dict_names_experts_and_loads_into_other_slots(kind):
    module = nn.ModuleDict({"moe": Experts([5, -1, 2], kind)})
    saved = weights_of(module)
    assert set(saved) == {"moe.scale"} | {f"moe.experts.{e}.{name}" for e in (5, 2) for name in WEIGHTS}
    assert torch.equal(saved["moe.experts.5.up"], make_expert(5).up)

    other = zero(nn.ModuleDict({"moe": Experts([2, 5], kind)}))
    assert not any(other.load_state_dict(saved))
    assert torch.equal(other["moe"].local.replicas[1].down, make_expert(5).down)
    assert all(torch.equal(values, saved[name]) for name, values in weights_of(other).items())


def test_a_rank_takes_its_own_from_a_dict_of_all_experts():
    module = zero(nn.ModuleDict({"moe": Experts([3, 0])}))
    given = all_experts()
    assert not any(module.load_state_dict(given)) and len(given) == 1 + NUM_EXPERTS * len(WEIGHTS)
    assert all(torch.equal(values, given[name]) for name, values in weights_of(module).items())
    assert not any(nn.ModuleDict({"moe": Experts([-1])}).load_state_dict(given))


def test_a_module_called_experts_adds_no_second_one():
    module = nn.ModuleDict({"experts": Experts([3])})
    saved = weights_of(module)
    assert set(saved) == {"experts.scale"} | {f"experts.3.{name}" for name in WEIGHTS}
    assert not any(zero(module).load_state_dict(saved))
    own = {name.removeprefix("experts."): values for name, values in saved.items()}
    assert not any(zero(module)["experts"].load_state_dict(own))
    assert torch.equal(module["experts"].local.replicas[0].up, make_expert(3).up)


def test_two_slots_of_one_expert_are_one_entry():
    module = zero(Experts([4, 4]))
    module.load_state_dict({name.removeprefix("moe."): values for name, values in all_experts().items()})
    assert all(torch.equal(replica.up, make_expert(4).up) for replica in module.local.replicas)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.pop("moe.experts.3.up"), "Missing key(s) in state_dict: \"moe.experts.3.up\""),
        (lambda given: given.update({"moe.experts.9.up": 0}), "Unexpected key(s) in state_dict: \"moe.experts.9.up\""),
        (lambda given: given.update({"moe.experts.0.gate": 0}), "Unexpected key(s)"),
        (
            lambda given: given.update({"moe.experts.3.up": torch.ones(2, 2)}),
            "size mismatch for moe.experts.3.up: [2, 2] given, this rank holds [4, 3]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_logically(change, said):
    module, given = nn.ModuleDict({"moe": Experts([3, 0])}), all_experts()
    change(given)
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(given)
    assert said in str(error.value) and "local.replicas" not in str(error.value)


def test_memory_of_experts_is_not_replaced():
    with pytest.raises(RuntimeError, match=r"moe\.: load_state_dict\(assign=True\): experts keep their memory"):
        nn.ModuleDict({"moe": Experts([3])}).load_state_dict(all_experts(), assign=True)


def test_loaded_weights_replace_casts_of_the_old():
    module, x = Experts([3]), torch.ones(2, HIDDEN, dtype=torch.bfloat16)
    zero(module).local.replicas[0](x)
    module.load_state_dict(weights_of(Experts([3])))
    assert torch.equal(module.local.replicas[0](x), make_expert(3)(x))


@pytest.mark.parametrize("kind", [LocalExperts, GroupedExperts])
def test_a_deep_copy_computes_alike_with_weights_of_its_own(kind):
    block = Block(Experts([5, 2], kind))
    copied = copy.deepcopy(nn.Sequential(block))[0]
    assert copied.dispatcher is block.dispatcher and copied.experts.dispatcher is block.dispatcher
    assert copied.experts.local.listeners == [] and len(block.experts.local.listeners) == 1

    rows, slots = torch.randn(5, HIDDEN), [(0, 2), (1, 3)]
    expected = block.experts.local(slots, rows, None)
    zero(block)
    assert torch.equal(copied.experts.local(slots, rows, None), expected)
    with torch.no_grad():
        copied.experts.local.replicas[0].down.zero_()
        copied.experts.local.replicas[0].up_bias.zero_()
    assert not copied.experts.local(slots, rows, None)[:2].any()
