"""Experts worked on at once give what they give one by one: outputs and gradients."""

import pytest
import torch
from kinks import draw_off_kinks
from torch import nn

from hpcmoe.experts import products
from hpcmoe.experts.feed_forward import Expert, GroupedExperts, backward
from hpcmoe.experts.products import LARGE_MATRIX, LONG_PRODUCT, can_group, is_long
from hpcmoe.gemm import TorchGemm

HIDDEN, FEED_FORWARD = 8, 16
ROWS = {0: 50, 2: 0, 3: 90}  # slot 1 is empty
NUM_ROWS = sum(ROWS.values())


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_replicas(kind, bias):
    """Three experts and an empty slot."""

    def expert(seed):
        weights = {"up": draw(FEED_FORWARD, HIDDEN, seed=seed), "down": draw(HIDDEN, FEED_FORWARD, seed=seed + 10)}
        if kind == "swiglu":
            weights["gate"] = draw(FEED_FORWARD, HIDDEN, seed=seed + 20)
        if bias:
            weights |= {f"{name}_bias": draw(len(weights[name]), seed=seed + 30) for name in list(weights)}
        return Expert(kind, weights)

    return [expert(0), nn.Identity(), expert(2), expert(3)]


def relative(a, b):
    """Return the norm of the difference over the norm: it grows with no single row's luck in rounding."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu"])
def test_all_at_once_is_one_by_one(kind, bias, dtype):
    alone, together = make_replicas(kind, bias), GroupedExperts(make_replicas(kind, bias))
    together.stack_weights()
    generator = torch.Generator().manual_seed(7)
    of_slots = [
        draw_off_kinks(rows, alone[slot].up.data, getattr(alone[slot], "up_bias", None), generator)
        for slot, rows in ROWS.items() if rows
    ]  # fmt: skip
    x, grad_y = torch.cat(of_slots).to(dtype), draw(NUM_ROWS, HIDDEN, seed=8).to(dtype)
    gates, kept = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(9)), []
    slots = tuple(ROWS.items())
    y = together(slots, x, kept)
    assert torch.equal(together(slots, x, None), y)
    grad_x, grad_gate = together.backward(slots, grad_y, gates, kept)
    assert kept == []

    begin, within = 0, 1e-6 if dtype == torch.float32 else 2e-2  # one adds a bias after rounding, one before
    for slot, rows in ROWS.items():
        part = slice(begin, begin + rows)
        begin += rows
        if rows == 0:
            assert all(p.grad is None for p in together.replicas[slot].parameters())
            continue
        expected = alone[slot](x[part], kept)
        by_x, by_gate = backward(kind, alone[slot].matrices, kept.pop(), grad_y[part], gates[part])
        for ours, theirs in ((y[part], expected), (grad_x[part], by_x), (grad_gate[part], by_gate)):
            assert ours.dtype == theirs.dtype and relative(ours, theirs) < within
        for (name, ours), (_, theirs) in zip(
            together.replicas[slot].named_parameters(), alone[slot].named_parameters(), strict=True
        ):
            assert relative(ours.grad, theirs.grad) < within, name


@pytest.mark.parametrize("has", [True, False])
def test_a_grouped_gemm_is_used_where_there_is_one(monkeypatch, has):
    calls = []
    real = products.find_grouped_gemm()
    monkeypatch.setattr(
        products, "find_grouped_gemm", lambda: (lambda *a, **k: calls.append(1) or real(*a, **k)) if has else None
    )
    together = GroupedExperts(make_replicas("gelu", False))
    together.stack_weights()
    together(tuple(ROWS.items()), draw(NUM_ROWS, HIDDEN, seed=7).bfloat16(), None)
    assert len(calls) == (2 if has and real else 0)


@pytest.mark.parametrize(
    ("experts", "width", "dtype", "fits"),
    [(2, 8, torch.bfloat16, True), (1, 8, torch.bfloat16, False), (2, 6, torch.bfloat16, False),
     (2, 8, torch.float32, False)],
)  # fmt: skip
def test_only_what_the_kernel_takes_goes_to_it(experts, width, dtype, fits):
    assert can_group(torch.zeros(3, width, dtype=dtype), torch.zeros(experts, width, 8, dtype=dtype)) == fits


@pytest.mark.parametrize(
    ("rows", "experts", "numbers", "long"),
    [(1, 8, LARGE_MATRIX, True), (8, 8, LARGE_MATRIX // 2, False), (8 * 4096, 8, LONG_PRODUCT // 4096, True),
     (8 * 4096 - 1, 8, LONG_PRODUCT // 4096, False)],
)  # fmt: skip
def test_products_that_outlast_the_next_ones_start_take_turns(rows, experts, numbers, long):
    x, weights = (torch.empty(*shape, device="meta") for shape in ((rows, 1), (experts, 1, numbers)))
    assert is_long(x, weights) == long


def test_experts_of_long_products_take_turns_and_give_the_same(monkeypatch):
    calls, real = [], products.find_grouped_gemm()
    if real is None:
        pytest.skip("this torch has no grouped GEMM")
    monkeypatch.setattr(products, "find_grouped_gemm", lambda: lambda *a, **k: calls.append(1) or real(*a, **k))
    together, x, results = GroupedExperts(make_replicas("gelu", False)), draw(NUM_ROWS, HIDDEN, seed=7).bfloat16(), []
    together.stack_weights()
    for large_weight in (LARGE_MATRIX, 1):
        monkeypatch.setattr(products, "LARGE_MATRIX", large_weight)
        results.append(together(tuple(ROWS.items()), x, None))
        assert len(calls) == 2
    assert relative(*results) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_gradient_on_a_gpu_is_not_rounded_on_its_way(monkeypatch, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr("hpcmoe.gemm._LARGE_GRADIENT", 1)
    grad_y, x, begun = (draw(*shape, seed=1).cuda() for shape in ((70, 24), (70, 40), (24, 40)))
    grad_y, x = grad_y.to(dtype), x.to(dtype)
    expected = begun.double() + grad_y.double().t() @ x.double()
    TorchGemm().add_product(begun, grad_y, x)
    assert relative(begun, expected) < 1e-5


def test_the_joined_matrices_are_the_parameters_and_casts_follow_them():
    together = GroupedExperts(make_replicas("gelu", False))
    together.stack_weights()
    up = together.replicas[3].up
    with torch.no_grad():
        up.fill_(2.0)
    assert (together.stacked["up"].cast(torch.float32)[2] == 2).all() and together.cast_bytes == 0
    assert (together.stacked["up"].cast(torch.bfloat16)[2] == 2).all()
    assert together.cast_bytes == 3 * 2 * HIDDEN * FEED_FORWARD
    with torch.no_grad():
        up.fill_(3.0)
    together.refresh()
    assert (together.stacked["up"].cast(torch.bfloat16)[2] == 3).all()
