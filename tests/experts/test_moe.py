"""The library's layers compute what their dense twins do, on any number of ranks, and so do their gradients."""

import contextlib

import numpy as np
import pytest
import torch
from small import make_topology
from torch.utils.checkpoint import checkpoint
from twins import DenseExperts, compare, draw, gather_expert_grads, set_biases, sum_over

import hpcmoe
from hpcmoe.dispatch.router import Router, load_balancing_loss
from hpcmoe.errors import ClusterError, ConfigError, HpcmoeError

H, F, E, K = 8, 12, 6, 2
TOKENS = (7, 0, 12, 5)  # of the ranks
CASES = {  # arguments of a layer, and of its group
    "gelu": ({"kind": "gelu"}, {}),
    "relu with biases": ({"kind": "relu", "bias": True}, {}),
    "swiglu": ({"kind": "swiglu"}, {}),
    "swiglu with biases": ({"kind": "swiglu", "bias": True}, {}),
    "fewer experts than ranks": ({"num_experts": 2}, {}),
    "one expert": ({"num_experts": 1, "top_k": 1}, {}),
    "all experts": ({"top_k": E}, {}),
    "spare slots": ({"spare_slots_per_rank": 2}, {}),
    "replicas": ({"spare_slots_per_rank": 1, "replicate": True}, {}),
    "two nodes": ({}, {"num_nodes": 2}),
    "replicas on two nodes": ({"spare_slots_per_rank": 2, "replicate": True, "bias": True}, {"num_nodes": 2}),
    "tensor parallel": ({"bias": True}, {"tensor_parallel": 2}),
    "tensor parallel on two nodes": ({"kind": "gelu"}, {"tensor_parallel": 2, "num_nodes": 2}),
    "data parallel": ({"bias": True}, {"data_parallel": 2}),
    "not deterministic": ({}, {"deterministic": False, "schedule": "arrival"}),
    "serial": ({}, {"schedule": "serial"}),
}


@contextlib.contextmanager
def open_group(comm, num_nodes=1, **options):
    """Open a group on some virtual nodes; what several ranks share is left to those where it divides the ranks."""
    for name in ("tensor_parallel", "data_parallel"):
        if comm.size % options.get(name, 1):
            options.pop(name)
    with hpcmoe.open(comm, links=make_topology(comm.size, min(num_nodes, comm.size)), threads=1, **options) as group:
        yield group


def make_experts(group, **arguments):
    layer = hpcmoe.Experts(**{"hidden": H, "feed_forward": F, "num_experts": E, "top_k": K, "group": group} | arguments)
    set_biases(layer)
    return layer


def draw_call(rank, layer, tokens=TOKENS, seed=0, top_k=None):
    """Draw a rank's tokens, its choices, each expert once a token at most, and their weights."""
    num_tokens, top_k = tokens[rank % len(tokens)], top_k or layer.top_k
    order = draw(num_tokens, layer.num_experts, seed=seed + 100 * rank).argsort(dim=1)
    x = draw(num_tokens, layer.hidden, seed=seed + 100 * rank + 1).requires_grad_()
    gates = draw(num_tokens, top_k, seed=seed + 100 * rank + 2).sigmoid().requires_grad_()
    return x, order[:, :top_k].contiguous(), gates


def check_against_twin(comm, layer, call, twin=None, atol=1e-6):
    """Run forward and backward on all ranks, and by the twin, and compare outputs and gradients."""
    twin, (x, choices, gates) = twin or DenseExperts(layer), call
    (y := layer(x, choices, gates)).sin().sum().backward()
    grads = x.grad.clone(), gates.grad.clone()
    x.grad = gates.grad = None
    (wanted := twin(x, choices, gates)).sin().sum().backward()
    compare(y, wanted, atol)
    compare(grads[0], x.grad, atol)
    compare(grads[1], gates.grad, atol)
    for name, grad in gather_expert_grads(comm, layer).items():
        compare(grad, sum_over(comm, twin.weights[name].grad), atol)


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_dense_twins(comm, case):
    arguments, options = CASES[case]
    with open_group(comm, **options) as group:
        layer = make_experts(group, **arguments)
        check_against_twin(comm, layer, draw_call(comm.rank, layer))


@pytest.mark.mpi
@pytest.mark.parametrize("tokens", [(0,), (0, 3), (1,), (16, 1)])
def test_any_number_of_tokens_passes(comm, tokens):
    with open_group(comm, num_nodes=2) as group:
        layer = make_experts(group, max_tokens=16)
        check_against_twin(comm, layer, draw_call(comm.rank, layer, tokens))


@pytest.mark.mpi
def test_the_number_of_tokens_and_of_choices_may_differ_from_call_to_call(comm):
    with open_group(comm) as group:
        layer = make_experts(group, top_k=3)
        twin = DenseExperts(layer)
        for number, top_k in enumerate((3, 1, 2)):
            tokens = tuple(np.roll(TOKENS, number).tolist())
            check_against_twin(comm, layer, draw_call(comm.rank, layer, tokens, seed=number, top_k=top_k), twin)


@pytest.mark.mpi
@pytest.mark.parametrize("tokens", [(17, 0, 5), (4,), (1, 9, 12)])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_more_tokens_than_an_exchange_takes_go_in_several(comm, tokens, num_nodes):
    with open_group(comm, num_nodes, max_tokens=4) as group:
        layer = make_experts(group, bias=True)
        check_against_twin(comm, layer, draw_call(comm.rank, layer, tokens))
        with torch.no_grad():
            assert len(layer(*draw_call(comm.rank, layer, tokens))) == tokens[comm.rank % len(tokens)]


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["overlap", "arrival"])
def test_several_exchanges_in_lanes(comm, schedule):
    with open_group(comm, max_tokens=3, schedule=schedule) as group:
        layer = make_experts(group)
        twin = DenseExperts(layer)
        calls = [draw_call(comm.rank, layer, tokens, seed=n) for n, tokens in enumerate([(7, 2), (1, 10), (0, 4)])]
        for y, call in zip(group.lanes(lambda call: layer(*call), calls), calls, strict=True):
            compare(y, twin(*call), 1e-6)


@pytest.mark.mpi
def test_more_tokens_may_be_refused_on_all_ranks(comm):
    with open_group(comm, max_tokens=4, reject_more=True) as group:
        layer = make_experts(group)
        check_against_twin(comm, layer, draw_call(comm.rank, layer, (4, 2)))
        line = "rank 0 calls layer 0 top-2 forward with more tokens than a call may have: 3 calls would do"
        with pytest.raises(ClusterError, match=line):
            layer(*draw_call(comm.rank, layer, (9, 1, 2, 3)))


@pytest.mark.mpi
def test_rows_in_bfloat16_are_near_the_twin(comm):
    with open_group(comm, num_nodes=2) as group:
        layer = make_experts(group, dtype=torch.bfloat16, bias=True)
        assert layer.local.replicas is not None and layer.dispatcher.sizes.dtype == torch.bfloat16
        check_against_twin(comm, layer, draw_call(comm.rank, layer), atol=1e-2)


@pytest.mark.mpi
def test_parameters_in_bfloat16_have_gradients_in_bfloat16(comm):
    with open_group(comm) as group:
        layer = make_experts(group, dtype=torch.bfloat16).to(torch.bfloat16)
        assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
        check_against_twin(comm, layer, draw_call(comm.rank, layer), atol=1e-2)
        assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.mpi
def test_the_output_has_the_inputs_shape_and_precision(comm):
    with open_group(comm) as group:
        layer = make_experts(group)
        x, choices, gates = draw_call(comm.rank, layer, (6,))
        flat = layer(x, choices, gates)
        assert torch.equal(layer(x.view(2, 3, H), choices.view(2, 3, K), gates.view(2, 3, K)), flat.view(2, 3, H))
        assert torch.equal(layer(x, choices.int(), gates), flat)
        for dtype in (torch.float64, torch.bfloat16):
            y = layer(x.to(dtype), choices, gates.to(dtype))
            assert y.dtype == dtype and torch.allclose(y.float(), flat, atol=3e-2)


@pytest.mark.mpi
def test_a_placement_may_be_given(comm):
    slots = -(-E // comm.size) + 1
    given = np.full((comm.size, slots), -1)
    for number, expert in enumerate(reversed(range(E))):
        given[number % comm.size, number // comm.size + (number % comm.size == 0)] = expert
    with open_group(comm) as group:
        layer = make_experts(group, placement=given)
        assert layer.expert_of_slot.tolist() == given[comm.rank].tolist()
        check_against_twin(comm, layer, draw_call(comm.rank, layer))


@pytest.mark.mpi
def test_layers_of_different_size_and_kind_share_a_group(comm):
    with open_group(comm) as group:
        layers = [
            make_experts(group), make_experts(group, feed_forward=20, kind="gelu", num_experts=3),
            make_experts(group, hidden=4, top_k=3, bias=True), make_experts(group),
        ]  # fmt: skip
        assert layers[0].dispatcher is layers[3].dispatcher and layers[0].dispatcher is not layers[2].dispatcher
        assert [layer.number for layer in layers] == [0, 1, 2, 3]
        for layer in layers:
            check_against_twin(comm, layer, draw_call(comm.rank, layer))
        assert not torch.equal(DenseExperts(layers[0]).weights["up"], DenseExperts(layers[3]).weights["up"])


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["serial", "overlap", "arrival"])
@pytest.mark.parametrize("in_flight", [2, 3])
def test_lanes_give_what_plain_calls_give(comm, schedule, in_flight):
    with open_group(comm, num_nodes=2, schedule=schedule, in_flight=in_flight) as group:
        first, second = make_experts(group), make_experts(group, kind="gelu", bias=True)
        calls = [draw_call(comm.rank, first, seed=number) for number in range(5)]

        def step(call):
            x, choices, gates = call
            loss = second(first(x, choices, gates).tanh(), choices.flip(1), gates).sin().sum()
            loss.backward()
            return loss.item()

        plain = [step(call) for call in calls]
        wanted = [gather_expert_grads(comm, layer) for layer in (first, second)]
        first.zero_grad()
        second.zero_grad()
        assert list(group.lanes(step, calls)) == pytest.approx(plain, rel=1e-6)
        for layer, grads in zip((first, second), wanted, strict=True):
            for name, grad in gather_expert_grads(comm, layer).items():
                compare(grad, grads[name], 1e-6)


@pytest.mark.mpi
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(comm, reentrant):
    with open_group(comm, num_nodes=2) as group:
        layer = make_experts(group)

        class Checkpointed:
            """The layer, its forward pass repeated in the backward pass."""

            options, number, local, expert_of_slot = layer.options, layer.number, layer.local, layer.expert_of_slot

            def __call__(self, *call):
                return checkpoint(layer, *call, use_reentrant=reentrant)

        Checkpointed.group = group
        x, choices, gates = draw_call(comm.rank, layer)
        check_against_twin(comm, Checkpointed(), (x, choices, gates))
        assert sum(group.loads()[0]) == sum(TOKENS[r % 4] for r in range(comm.size)) * K  # counted once


@pytest.mark.mpi
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(comm, mode):
    with open_group(comm) as group:
        layer = make_experts(group)
        call = draw_call(comm.rank, layer)
        wanted = layer(*call)
        with mode():
            y = layer(*call)
        assert not y.requires_grad and torch.equal(y, wanted)


@pytest.mark.mpi
def test_autocast_leaves_the_layers_precision(comm):
    with open_group(comm) as group:
        layer, moe = make_experts(group), hpcmoe.MoE(H, F, E, group=group)
        x, choices, gates = draw_call(comm.rank, layer)
        wanted = layer(x, choices, gates), moe(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x, choices, gates), wanted[0]) and torch.equal(moe(x), wanted[1])


@pytest.mark.mpi
def test_frozen_experts_pass_gradients_on_and_gather_none(comm):
    with open_group(comm) as group:
        layer = make_experts(group)
        twin, (x, choices, gates) = DenseExperts(layer), draw_call(comm.rank, layer)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        (grad,) = torch.autograd.grad(layer(x, choices, gates).sin().sum(), x)
        (wanted,) = torch.autograd.grad(twin(x, choices, gates).sin().sum(), x)
        compare(grad, wanted, 1e-6)
        assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.mpi
def test_a_second_derivative_is_refused(comm):
    with open_group(comm) as group:
        layer = make_experts(group)
        x, choices, gates = draw_call(comm.rank, layer, (4,))
        (grad,) = torch.autograd.grad(layer(x, choices, gates).sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, "fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_experts_follow_any_optimizer(comm, optimizer, dtype):
    with open_group(comm) as group:
        layer = make_experts(group, dtype=dtype)
        call = draw_call(comm.rank, layer)
        before = layer(*call)
        before.sum().backward()
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        words = {} if not isinstance(optimizer, str) else {optimizer: True}
        kind = torch.optim.AdamW if isinstance(optimizer, str) else optimizer
        kind(layer.parameters(), lr=0.5, **words).step()
        with torch.no_grad():
            after = layer(*call)
            layer.refresh()
            assert torch.equal(after, layer(*call))
        assert after.numel() == 0 or not torch.equal(before, after)


class DenseMoE:
    """A router and its losses without ranks."""

    def __init__(self, moe):
        self.moe, self.experts = moe, DenseExperts(moe.experts)
        self.weight = moe.router.weight.detach().clone().requires_grad_()

    def __call__(self, xs):
        """Compute all ranks' outputs from their inputs, and the routing losses of all together."""
        settings = self.moe.settings
        router = Router(self.weight, self.moe.experts.top_k, settings)
        router.weight = torch.nn.Parameter(self.weight.detach().clone())
        self.router = router
        routings = [router(x, torch.ones(self.moe.experts.num_experts)) for x in xs]
        ys = [self.experts(x, r.experts, r.gates) for x, r in zip(xs, routings, strict=True)]
        tokens = sum(len(x) for x in xs)
        counts = sum(r.tokens_of_expert for r in routings)
        aux = load_balancing_loss(counts, sum(r.probability_sum for r in routings), tokens)
        z = sum(r.z_sum for r in routings) / max(tokens, 1)
        return ys, settings.aux_loss_weight * aux + settings.z_loss_weight * z


ROUTERS = {
    "plain": {},
    "not scaled": {"renormalize": False, "top_k": 3},
    "one choice": {"top_k": 1},
    "losses": {"aux_loss_weight": 0.7, "z_loss_weight": 0.3},
    "capacity": {"capacity_factor": 0.6},
    "frozen": {"aux_loss_weight": 0.7},
}


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["overlap", "arrival"])
@pytest.mark.parametrize("case", ROUTERS)
def test_a_moe_is_its_dense_twin(comm, case, schedule):
    with open_group(comm, num_nodes=2, schedule=schedule) as group:
        moe = hpcmoe.MoE(H, F, E, group=group, **ROUTERS[case])
        moe.router.weight.requires_grad_(case != "frozen")
        twin = DenseMoE(moe)
        steps = [[draw_call(rank, moe.experts, seed=number)[0] for rank in range(comm.size)] for number in range(3)]

        # Run a step of three micro-batches in lanes, then the twin's.
        def step(xs):
            y = moe(xs[comm.rank])
            y.sin().sum().backward()
            return y.detach()

        found = list(group.lanes(step, steps))
        grads = [xs[comm.rank].grad.clone() for xs in steps]
        router_grad, wanted_router = moe.router.weight.grad, torch.zeros(E, H)
        for xs, y, grad in zip(steps, found, grads, strict=True):
            for x in xs:
                x.grad = None
            ys, losses = twin(xs)
            (sum(each.sin().sum() for each in ys) + losses).backward()
            compare(y, ys[comm.rank], 1e-6)
            compare(grad, xs[comm.rank].grad, 1e-6)
            wanted_router += twin.router.weight.grad
        if case == "frozen":
            assert router_grad is None
        else:
            compare(sum_over(comm, router_grad), wanted_router, 1e-6)
        for name, grad in gather_expert_grads(comm, moe.experts).items():
            compare(grad, twin.experts.weights[name].grad, 1e-6)


@pytest.mark.mpi
def test_the_same_input_gives_the_same_output_until_the_routers_are_told(comm):
    with open_group(comm) as group:
        moe = hpcmoe.MoE(H, F, E, group=group, load_feedback=0.9, bias_update_speed=0.5)
        x = draw(40, H, seed=3)
        first = moe(x)
        assert torch.equal(moe(x), first)
        group.update_routers()
        assert sorted(set(moe.router.bias.tolist())) in ([-0.5, 0.5], [-0.5, 0.0, 0.5])
        assert moe.load.mean().item() == pytest.approx(1.0) and moe.load.std() > 0
        assert not torch.equal(moe(x), first)


@pytest.mark.mpi
def test_loads_are_those_of_all_ranks_since_they_were_asked_for(comm):
    with open_group(comm) as group:
        layer, moe = make_experts(group), hpcmoe.MoE(H, F, 3, group=group)
        x, choices, gates = draw_call(comm.rank, layer)
        layer(x, choices, gates)
        moe(x)
        wanted = sum_over(comm, torch.bincount(choices.flatten(), minlength=E))
        loads = group.loads()
        assert loads[0].tolist() == wanted.tolist() and loads[1].sum() == wanted.sum()
        group.update_routers()
        layer(x, choices, gates)
        loads = group.loads()
        assert loads[0].tolist() == wanted.tolist() and loads[1].sum() == 0


@pytest.mark.mpi
def test_experts_move_to_the_nodes_whose_tokens_want_them(comm):
    with open_group(comm, num_nodes=comm.size) as group:
        layer = hpcmoe.Experts(H, F, 2 * comm.size, group=group)
        first = 2 * ((comm.rank + 1) % comm.size)  # dealt evenly, they are on the next node
        wanted = torch.tensor([first, first + 1]).expand(5, 2)
        layer(torch.ones(5, H), wanted, torch.ones(5, 2))
        loads = 5 * np.roll(np.eye(comm.size, dtype=int).repeat(2, axis=1), 2, axis=1)
        assert group.loads(by_node=True)[0].tolist() == loads.tolist()
        layer(torch.ones(5, H), wanted, torch.ones(5, 2))
        assert group.loads()[0].tolist() == [5] * 2 * comm.size  # all alike: no reason to move
        assert (group.rebalance(layer) > 0) == (comm.size > 1)
        assert sorted(layer.expert_of_slot) == wanted[0].tolist()


WRONG = [
    ({"hidden": 0}, "hidden = 0: must be greater than or equal to 1"),
    ({"kind": "tanh"}, "kind = 'tanh': must be 'gelu', 'relu' or 'swiglu'"),
    ({"top_k": 7}, "top_k = 7: must be at most num_experts = 6"),
    ({"dtype": torch.float16}, "dtype = torch.float16: must be torch.float32 or torch.bfloat16"),
    ({"num_experts": 2.5}, "num_experts = 2.5: must be a valid integer"),
    ({"bias": "yes"}, "bias = 'yes': must be a valid boolean"),
    ({"seed": -1}, "seed = -1: must be greater than or equal to 0"),
    ({"placement": np.arange(12) % 5}, r"placement: expert_of_slot\[0\] has no expert 5"),
    ({"placement": np.arange(12)}, r"placement: expert_of_slot\[0\]\[6\] = 6: must be -1 to 5"),
    ({"placement": [0.5] * 12}, r"placement\[0\] = 0.5: must be a valid integer"),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_a_wrong_argument_is_one_line_on_all_ranks(comm, arguments, line):
    with open_group(comm) as group:
        with pytest.raises(HpcmoeError, match=line) as caught:
            make_experts(group, **arguments)
        assert "\n" not in str(caught.value) and "hpcmoe.Experts, layer 0: " in str(caught.value)
        check_against_twin(comm, layer := make_experts(group), draw_call(comm.rank, layer))  # and the group goes on


@pytest.mark.mpi
def test_a_layer_that_differs_between_ranks_is_an_error_on_all(comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    with open_group(comm) as group:
        with pytest.raises(ConfigError, match=r"\[rank 1 of .\] hpcmoe.Experts, layer 0: hidden = 9, 8 on rank 0"):
            make_experts(group, hidden=H + (comm.rank == 1))
        with pytest.raises(ConfigError, match="hpcmoe.MoE, layer 0: z_loss_weight = 0.5, 0.0 on rank 0"):
            hpcmoe.MoE(H, F, E, group=group, z_loss_weight=0.5 * (comm.rank > 0))


CALLS = [
    (lambda x, i, g: (x[:, :3], i, g), r"x has shape \[4, 3\] of torch.float32: must be \[..., 8\]"),
    (lambda x, i, g: (x, i[:2], g), r"top_k_index has shape \[2, 2\]: must be \[4\] \+ \[K\], K 1 to 2"),
    (lambda x, i, g: (x, i, g[:, :1]), r"top_k_weights has shape \[4, 1\]"),
    (lambda x, i, g: (x, i.repeat(1, 2), g.repeat(1, 2)), r"top_k_index has shape \[4, 4\]"),
    (lambda x, i, g: (x, i + 3, g), "must be from 0 to 5"),
    (lambda x, i, g: (x, i - 6, g), "must be from 0 to 5"),
    (lambda x, i, g: (x, g, g), "must be integers and floats"),
    (lambda x, i, g: (x.long(), i, g), "must be .*, floating-point"),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("change", "line"), CALLS)
def test_a_call_that_does_not_fit_is_one_line(comm, change, line):
    with open_group(comm) as group:
        layer = make_experts(group)
        with pytest.raises(ConfigError, match=line) as caught:
            layer(*change(*draw_call(comm.rank, layer, (4,))))
        assert "\n" not in str(caught.value) and "hpcmoe layer 0" in str(caught.value)
