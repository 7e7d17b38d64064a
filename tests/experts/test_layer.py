"""A layer of experts, called as any module is, computes what one dense formula and autograd do."""

import gc
import weakref

import numpy as np
import pytest
import torch
from small import make_dispatcher
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcmoe.clock import Stage
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.experts.layer import ExpertLayer
from hpcmoe.pipeline.lanes import SCHEDULES, Lanes

HIDDEN, FEED_FORWARD, NUM_EXPERTS, TOP_K, TOKENS = 4, 6, 3, 2, 11
EXPERT_OF_SLOT, SLOT_OF_EXPERT = np.array([2, -1, 0, 1]), (2, 3, 0)
SLOTS = np.arange(4)[:, None]  # of a replica's only shard
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(kind="serial", in_flight=1, **sizes):
    """A layer on one rank without MPI; one slot is empty, and the others are not in the experts' order."""
    replicas = [
        nn.Identity() if expert < 0 else Expert(
            "gelu", {"up": draw(FEED_FORWARD, HIDDEN, seed=expert), "down": draw(HIDDEN, FEED_FORWARD, seed=expert + 9)}
        )
        for expert in EXPERT_OF_SLOT.tolist()
    ]  # fmt: skip
    chooser = SlotChooser(EXPERT_OF_SLOT, (EXPERT_OF_SLOT >= 0).astype(float), SLOTS, NUM_EXPERTS, 0)
    dispatcher = make_dispatcher(HIDDEN, slots=4, batch_rows=4, num_in_flight=in_flight, **sizes)
    return ExpertLayer(LocalExperts(replicas), dispatcher, chooser, Lanes([dispatcher], dispatcher.clock, kind), 0)


def draw_inputs(tokens=TOKENS, drops=False, residual=True, seed=7):
    """Draw what a layer is called with; x, gates and residual want gradients, as leaves."""
    experts = torch.stack([torch.randperm(NUM_EXPERTS, generator=torch.Generator().manual_seed(t + seed))[:TOP_K]
                           for t in range(tokens)]) if tokens else torch.zeros(0, TOP_K, dtype=torch.int64)  # fmt: skip
    return {
        "x": draw(tokens, HIDDEN, seed=seed).requires_grad_(),
        "experts": experts,
        "gates": draw(tokens, TOP_K, seed=seed + 1).requires_grad_(),
        "kept": draw(tokens, TOP_K, seed=seed + 2) > -0.5 if drops else None,
        "residual": draw(tokens, HIDDEN, seed=seed + 3).requires_grad_() if residual else None,
    }


def by_formula(layer, x, experts, gates, kept, residual):
    """The residual plus the gated sum of every expert's output."""
    y = torch.zeros_like(x) if residual is None else residual
    gates = gates if kept is None else gates * kept
    for expert, slot in enumerate(SLOT_OF_EXPERT):
        gate = (gates * (experts == expert)).sum(dim=1, keepdim=True)
        replica = layer.local.replicas[slot]
        y = y + gate * (nn.functional.gelu(x @ replica.up.T) @ replica.down.T)
    return y


def gradients(layer, inputs, call, grad):
    """Go forward and backward by a call -> (output, gradient of each leaf and parameter that has one)."""
    leaves = {name: value for name, value in inputs.items() if value is not None and value.is_floating_point()}
    leaves |= dict(layer.named_parameters())
    for leaf in leaves.values():
        leaf.grad = None
    y = call(**inputs)
    y.backward(grad)
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_close(found, expected):
    """Compare outputs and gradients by name; an expert that no row reached has none."""
    assert torch.allclose(found[0], expected[0], **NEAR)
    assert found[1].keys() <= expected[1].keys()
    for name, grad in expected[1].items():
        if name in found[1]:
            assert torch.allclose(found[1][name], grad, **NEAR), name
        else:
            assert name.startswith("local.replicas.") and not grad.any(), name


@pytest.mark.parametrize("tokens", [TOKENS, 1, 20])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(tokens, drops, residual):
    layer, inputs, grad = make_layer(), draw_inputs(tokens, drops, residual), draw(tokens, HIDDEN, seed=8)
    found = gradients(layer, inputs, layer, grad)
    expected = gradients(layer, inputs, lambda **inputs: by_formula(layer, **inputs), grad)
    assert_close(found, expected)
    assert {"x", "gates"} < found[1].keys() and ("residual" in found[1]) == residual
    if drops:
        assert (found[1]["gates"][~inputs["kept"]] == 0).all() and inputs["kept"].all() == (tokens == 1)


def test_a_micro_batch_without_tokens_passes():
    layer, inputs = make_layer(), draw_inputs(0)
    y, grads = gradients(layer, inputs, layer, torch.zeros(0, HIDDEN))
    assert y.shape == grads["x"].shape == (0, HIDDEN) and grads["gates"].shape == (0, TOP_K)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_the_experts_work_comes_in_pieces():
    """Eleven tokens' twenty-two assignments, about four rows at once, and no slot's rows with another's."""
    layer, inputs = make_layer(), draw_inputs()
    pieces_of = watch_pieces(layer)
    layer(**inputs).sum().backward()
    counts = [(inputs["experts"] == expert).sum().item() for expert in range(NUM_EXPERTS)]
    pieces = sum(max(round(rows / 4), 1) for rows in counts)
    assert pieces_of[Stage.COMPUTE] == pieces_of[Stage.COMPUTE_BACKWARD] == pieces > 3
    assert list(pieces_of) == [stage for stage in Stage if stage not in (Stage.DENSE, Stage.ROUTE)]


def watch_pieces(layer):
    """Count the pieces of each stage from now on -> {stage: pieces}, in the order of the stages."""
    pieces_of, run_stages = {}, layer.turns.run_stages

    def count(stage, pieces):
        pieces_of.setdefault(stage, 0)
        for worked in pieces:
            pieces_of[stage] += worked
            yield worked

    layer.turns.run_stages = lambda number, stages: run_stages(
        number, [(stage, count(stage, p)) for stage, p in stages]
    )
    return pieces_of


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    layer, inputs, seen = make_layer(), draw_inputs(), []
    expected = by_formula(layer, **inputs).detach()
    layer.turns.observe = lambda contexts: seen.extend((len(c.batches), len(c.kept)) for c in contexts)
    with mode():
        y = layer(**inputs)
    assert torch.allclose(y, expected, **NEAR) and not y.requires_grad
    assert seen == [(0, 0)] * 3 and not layer.turns.contexts


def test_a_context_lasts_as_long_as_the_graph():
    layer, inputs = make_layer(), draw_inputs()
    y = layer(**inputs)
    assert [context.micro_batch for context in layer.turns.contexts] == [0]
    del y
    gc.collect()
    assert not layer.turns.contexts  # a forward pass whose result nobody wanted
    layer(**inputs).sum().backward()
    assert not layer.turns.contexts


def test_backward_may_come_twice_where_the_graph_is_retained():
    layer, inputs, grad = make_layer(), draw_inputs(), draw(TOKENS, HIDDEN, seed=8)
    once = gradients(layer, inputs, layer, grad)

    def twice(**inputs):
        y = layer(**inputs)
        y.backward(grad, retain_graph=True)
        return y

    _, grads = gradients(layer, inputs, twice, grad)
    assert all(torch.allclose(grads[name], 2 * value, **NEAR) for name, value in once[1].items())


def test_backward_twice_is_refused_where_the_graph_is_not_retained():
    layer, inputs = make_layer(), draw_inputs()
    y = layer(**inputs).sum()
    y.backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), before, strict=True))
    layer(**inputs).sum().backward()  # and the layer goes on


def test_a_gradient_of_a_gradient_is_refused():
    layer, inputs = make_layer(), draw_inputs()
    (grad,) = torch.autograd.grad(layer(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_a_checkpointed_layer_has_the_same_gradients(reentrant, drops):
    layer, inputs, grad = make_layer(), draw_inputs(drops=drops), draw(TOKENS, HIDDEN, seed=8)
    plain = gradients(layer, inputs, layer, grad)

    def call(x, experts, gates, kept, residual):
        return checkpoint(layer, x, experts, gates, kept, residual, use_reentrant=reentrant)

    found = gradients(layer, inputs, call, grad)
    assert torch.equal(found[0], plain[0]) and found[1].keys() == plain[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in plain[1].items())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_checkpointed_layer_keeps_nothing_of_its_experts_between_forward_and_backward(reentrant):
    """Without a checkpoint it does: each row of x, and what goes into the activation."""
    layer, inputs = make_layer(), draw_inputs()
    kept = []
    forward = layer.local.forward
    layer.local.forward = lambda slots, rows, of_chunk: watch_kept(forward, slots, rows, of_chunk, kept)
    call = layer if reentrant is None else lambda *args: checkpoint(layer, *args, use_reentrant=reentrant)
    y = call(*inputs.values())
    gc.collect()
    alive = [reference() is not None for reference in kept]
    assert all(alive) if reentrant is None else not any(alive)
    assert kept or reentrant  # the reentrant kind goes forward without gradients
    assert all(context.kept == [] for context in layer.turns.contexts)
    before = len(kept)
    y.sum().backward()
    assert (len(kept) > before) == (reentrant is not None)  # and computes them again


def watch_kept(forward, slots, rows, of_chunk, kept):
    """Call experts and refer weakly to the memory of what they keep; x may be a view of what others see."""
    y = forward(slots, rows, of_chunk)
    for tensors in of_chunk or ():
        kept.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors[1:])
    return y


@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_a_checkpointed_rank_exchanges_again_even_where_its_experts_kept_nothing(tokens):
    """Other ranks wait for it: no rank may leave the recomputation out, or end it early."""
    layer, inputs = make_layer(), draw_inputs(tokens)
    started, dispatch = [], layer.dispatcher.dispatch

    def count(plan, rows, gates, exchange):
        started.append(exchange.direction)
        return dispatch(plan, rows, gates, exchange)

    layer.dispatcher.dispatch = count
    checkpoint(layer, *inputs.values(), use_reentrant=False).sum().backward()
    assert [direction.name for direction in started] == ["DISPATCH", "DISPATCH", "COMBINE_BACKWARD"]


@pytest.mark.parametrize("frozen", ["all", "up", "one expert"])
def test_frozen_parameters_get_no_gradient(frozen):
    layer, inputs, grad = make_layer(), draw_inputs(), draw(TOKENS, HIDDEN, seed=8)
    for name, parameter in layer.named_parameters():
        hit = {"all": True, "up": name.endswith("up"), "one expert": ".replicas.2." in name}[frozen]
        parameter.requires_grad_(not hit)
    found = gradients(layer, inputs, layer, grad)
    expected = gradients(layer, inputs, lambda **inputs: by_formula(layer, **inputs), grad)
    assert_close(found, expected)
    assert len(found[1]) == 3 + {"all": 0, "up": 3, "one expert": 4}[frozen]


def test_experts_are_trained_where_nothing_before_them_is():
    layer, inputs, grad = make_layer(), draw_inputs(residual=False), draw(TOKENS, HIDDEN, seed=8)
    inputs = {name: value.detach() if torch.is_tensor(value) else value for name, value in inputs.items()}
    y, grads = gradients(layer, inputs, layer, grad)
    assert y.requires_grad is False and len(grads) == len(list(layer.parameters()))
    expected = gradients(layer, inputs, lambda **inputs: by_formula(layer, **inputs), grad)
    assert_close((y, grads), expected)


def test_gradients_add_up_and_listeners_hear_of_each_backward_pass():
    layer, inputs, grad = make_layer(), draw_inputs(), draw(TOKENS, HIDDEN, seed=8)
    once, heard = gradients(layer, inputs, layer, grad), []
    layer.local.listeners.append(lambda: heard.append([p.grad is not None for p in layer.parameters()]))
    for leaf in (*layer.parameters(), *(inputs[name] for name in ("x", "gates", "residual"))):
        leaf.grad = None
    for _ in range(3):
        layer(**inputs).backward(grad)
    assert torch.allclose(inputs["x"].grad, 3 * once[1]["x"], **NEAR) and heard == [[True] * 6] * 3
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.grad, 3 * once[1][name], **NEAR), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_travel_in_the_dispatchers_precision_and_come_back_in_that_of_x(dtype):
    """A float32 x over bfloat16 rows, as under autocast, and a bfloat16 x alone; gates are float32."""
    layer, inputs, grad = make_layer(dtype=torch.bfloat16), draw_inputs(residual=False), draw(TOKENS, HIDDEN, seed=8)
    inputs["x"] = inputs["x"].detach().to(dtype).requires_grad_()
    y, grads = gradients(layer, inputs, layer, grad.to(dtype))
    assert y.dtype == grads["x"].dtype == dtype and grads["gates"].dtype == torch.float32
    inputs["x"] = inputs["x"].detach().float().requires_grad_()
    expected = gradients(layer, inputs, lambda **inputs: by_formula(layer, **inputs), grad)
    for name, value in expected[1].items() | {("output", expected[0])}:
        found = y if name == "output" else grads[name]
        assert (found.float() - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.parametrize("kind", SCHEDULES)
def test_micro_batches_in_lanes_give_what_each_gives_alone(kind):
    """Four of them, of different sizes, two in flight; what they add to the experts is the sum."""
    layer = make_layer(kind, in_flight=2, num_micro_batches=4)
    batches = [draw_inputs(tokens, seed=30 + tokens) for tokens in (5, 0, 11, 3)]
    grads = [draw(len(batch["x"]), HIDDEN, seed=8) for batch in batches]

    def step(micro_batch):
        y = layer(**batches[micro_batch])
        y.backward(grads[micro_batch])
        return y.detach()

    outputs = layer.turns.run(step, 4, 2)
    layer.turns.close()
    assert not layer.dispatcher.table.requires_grad  # whoever's thread it was that wrote rows
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    total = dict.fromkeys(found, 0.0)
    for batch, grad, y in zip(batches, grads, outputs, strict=True):
        own = {name: batch[name].grad for name in ("x", "gates", "residual")}
        expected = gradients(layer, batch, lambda **batch: by_formula(layer, **batch), grad)
        assert_close((y, own), (expected[0], {name: expected[1][name] for name in own}))
        total = {name: total[name] + expected[1].get(name, 0.0) for name in total}
    assert all(torch.allclose(found[name], total[name], **NEAR) for name in found)
