"""Where a token has one expert its gate is p, so the task alone trains the router, as it trains the dense oracle's."""

import numpy as np
import oracle
import pytest
import torch
from against_oracle import check_against_oracle, whole_batches
from small import BY_BACKEND, gather_logical, open_small_job
from standin import watch_job

from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.gate import renormalizes
from hpcmoe.dispatch.router import Router, Softmax

TASK_ALONE = {"model__top_k": 1, "dispatch__aux_loss_weight": 0.0, "dispatch__z_loss_weight": 0.0}
CASES = {
    "renormalized": {},
    "as the softmax gives it": {"dispatch__renormalize": False},
    "load on both": {"dispatch__load_feedback_on": "both", "dispatch__load_feedback": 0.7},
    "load on selection": {"dispatch__load_feedback": 0.7},
    "tokens that lose their one expert": {"dispatch__capacity_factor": 0.5},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 3},
    "gated, biases": {"experts__kind": "swiglu", "experts__bias": True, "bias": 0.3},
}


def step_both(comm, folder, **changes):
    """Take a step on the ranks and in the oracle -> (gradients by name, the oracle's, assignments dropped)."""
    with open_small_job(comm, folder, **TASK_ALONE | changes) as (job, optimizer, state):
        load = np.random.default_rng(3).uniform(0, 2, (2, job.config.model.num_experts))
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        starts, batches, groups = whole_batches(job, 1)
        optimizer.zero_gradients()
        dropped = job.stepper.run(job.training, starts, load, "train").stats.num_dropped
        optimizer.sums.finish()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        total, _, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        total.backward()
    return gradients, {name: weight.grad for name, weight in weights.items()}, dropped


def routers(gradients):
    """Pick the routers' gradients -> list of [E, H]."""
    found = [gradient for name, gradient in gradients.items() if name.endswith("router.weight")]
    assert len(found) == 2
    return found


def test_one_expert_is_weighed_by_its_probability_and_several_as_asked():
    assert [renormalizes(DispatchConfig(renormalize=True), top_k) for top_k in (1, 2, 5)] == [False, True, True]
    assert not any(renormalizes(DispatchConfig(renormalize=False), top_k) for top_k in (1, 2, 5))


@pytest.mark.parametrize("on", ["selection", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_one_choice_has_the_gradient_of_a_plain_softmax(on, dtype):
    random = torch.Generator().manual_seed(0)
    weight, x, load = (torch.randn(shape, generator=random) for shape in ((5, 4), (23, 4), (5,)))
    router, grad = Router(weight.clone(), 1, DispatchConfig(load_feedback=0.7, load_feedback_on=on)), torch.arange(23.0)
    routing = router(x.to(dtype), load)
    (routing.gates[:, 0] @ grad).backward()

    plain = weight.clone().requires_grad_()
    logits = x.to(dtype).float() @ plain.t()
    chosen = (logits - 0.7 * load).argmax(dim=1, keepdim=True)
    (((logits - 0.7 * load) if on == "both" else logits).softmax(dim=1).gather(1, chosen)[:, 0] @ grad).backward()
    assert torch.equal(routing.experts, chosen)
    assert torch.allclose(router.weight.grad, plain.grad, rtol=1e-4, atol=1e-4) and plain.grad.abs().max() > 1


@pytest.mark.parametrize("on", ["selection", "both"])
def test_the_gradient_of_one_choice_is_that_of_finite_differences(on):
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 5, generator=random, dtype=torch.float64).requires_grad_()
    pressure = torch.randn(5, generator=random, dtype=torch.float64)
    experts = (logits.detach() - pressure).argmax(dim=1, keepdim=True)
    felt = pressure if on == "both" else None
    assert torch.autograd.gradcheck(lambda logits: Softmax.apply(logits, felt, experts, False), logits)


def test_a_token_that_lost_its_one_expert_teaches_nothing():
    random = torch.Generator().manual_seed(2)
    weight, x = torch.randn(5, 4, generator=random), torch.randn(23, 4, generator=random).requires_grad_()
    routing = Router(weight, 1, DispatchConfig(capacity_factor=0.5))(x, torch.ones(5))
    routing.gates.sum().backward()
    lost = ~routing.kept[:, 0]
    assert 0 < lost.sum() < 23 and not routing.gates[lost].any() and not x.grad[lost].any()
    assert x.grad[~lost].any(dim=1).all()


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_a_step_from_the_task_alone_equals_the_oracle(comm, shared, case):
    check_against_oracle(comm, shared, **TASK_ALONE | CASES[case])


@pytest.mark.mpi
@pytest.mark.parametrize("way", BY_BACKEND)
@pytest.mark.parametrize("case", ["renormalized", "load on both", "tokens that lose their one expert"])
def test_a_step_between_devices_equals_the_oracle(comm, shared, monkeypatch, way, case):
    gpu, nccl = (f"gpu{comm.rank}", comm) if way == "nccl" else (None, None)
    with watch_job(monkeypatch, gpu, nccl):
        check_against_oracle(comm, shared, **BY_BACKEND[way] | TASK_ALONE | CASES[case])


@pytest.mark.mpi
@pytest.mark.parametrize("case", ["renormalized", "load on both", "tokens that lose their one expert", "replicas"])
def test_the_task_alone_trains_the_router(comm, shared, case):
    gradients, expected, dropped = step_both(comm, shared, **CASES[case])
    assert (dropped > 0) == ("capacity_factor" in str(CASES[case]))
    for own, oracles in zip(routers(gradients), routers(expected), strict=True):
        assert own.abs().max() > 1e-5 and torch.allclose(own, oracles, rtol=1e-4, atol=1e-8)


@pytest.mark.mpi
def test_in_bfloat16_it_does_so_to_rounding(comm, shared):
    gradients, expected, _ = step_both(comm, shared, model__dtype="bfloat16", model__hidden=32)
    for own, oracles in zip(routers(gradients), routers(expected), strict=True):
        assert torch.cosine_similarity(own.flatten(), oracles.flatten(), dim=0) > 0.98
