"""Losses and all gradients on any number of ranks equal those of the dense oracle."""

import numpy as np
import oracle
import pytest
import torch
from against_oracle import check_against_oracle, whole_batches
from small import gather_logical, open_small_job

CASES = {
    "plain": {},
    "one expert": {"model__num_experts": 1, "model__top_k": 1},
    "fewer experts than ranks, k 1": {"model__num_experts": 3, "model__top_k": 1},
    "every expert chosen": {"model__num_experts": 3, "model__top_k": 3},
    "eight experts": {"model__num_experts": 8},
    "seventeen experts, all chosen": {"model__num_experts": 17, "model__top_k": 17},
    "sixteen experts, gated, biases": {"model__num_experts": 16, "experts__kind": "swiglu", "experts__bias": True},
    "relu without attention": {"experts__kind": "relu", "model__attention": False},
    "gates as they are, load on both": {"dispatch__renormalize": False, "dispatch__load_feedback_on": "both"},
    "capacity": {"dispatch__capacity_factor": 0.8},
    "ranks without tokens": {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "tiny messages and batches": {"experts__max_batch_rows": 3},
    "serial": {"pipeline__schedule": "serial"},
    "three in flight": {"pipeline__in_flight": 3},
    "as rows arrive": {"pipeline__deterministic": False, "experts__max_batch_rows": 7},
    "replicas": {"cluster__replicate": True, "cluster__spare_slots_per_rank": 1, "model__num_experts": 3},
    "contiguous": {"cluster__placement": "contiguous", "model__num_experts": 5},
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_oracle(comm, shared, case):
    check_against_oracle(comm, shared, **CASES[case])


@pytest.mark.mpi
@pytest.mark.parametrize("num_experts", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("top_k", [1, 2, 0])
def test_every_number_of_experts_and_choices(comm, shared, num_experts, top_k):
    top_k = min(top_k or num_experts, num_experts)
    check_against_oracle(comm, shared, model__num_experts=num_experts, model__top_k=top_k)


@pytest.mark.mpi
@pytest.mark.parametrize("shape", ["tensor", "data", "both", "replicas on two nodes"])
def test_parallel_shapes_equal_the_oracle(comm, shared, shape):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    changes = {
        "tensor": {"cluster__tensor_parallel": 2, "experts__bias": True},
        "data": {"cluster__data_parallel": 2},
        "both": {"cluster__tensor_parallel": 2, "cluster__data_parallel": comm.size // 2, "experts__kind": "swiglu"},
        "replicas on two nodes": {"cluster__replicate": True, "cluster__spare_slots_per_rank": 2, "num_nodes": 2},
    }[shape]
    check_against_oracle(comm, shared, **changes)


@pytest.mark.mpi
def test_capacity_drops_copies(comm, shared):
    assert check_against_oracle(comm, shared, dispatch__capacity_factor=0.5).census.num_dropped > 0


@pytest.mark.mpi
def test_all_tokens_to_one_expert(comm, shared):
    """A load that repels from all experts but one sends everything there; the others' ranks receive nothing."""
    with open_small_job(comm, shared, model__top_k=1, dispatch__load_feedback=1.0) as (job, optimizer, state):
        load = np.full((2, 4), 1e4)
        load[:, 2] = 0.0
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        starts, batches, groups = whole_batches(job, 1)
        outcome = job.stepper.run(job.training, starts, load, "train")
        optimizer.sum_gradients()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        total, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        total.backward()
    assert outcome.census.tokens_of_expert[:, 2].tolist() == [70, 70]
    assert outcome.loss == pytest.approx(entropy.item(), rel=2e-6)
    name = "experts/layer1/up"
    assert torch.allclose(gradients[name], weights[name].grad, rtol=1e-4, atol=1e-7)
    assert gradients[name][2].abs().max() > 0 and not gradients[name][[0, 1, 3]].any()


@pytest.mark.mpi
def test_training_equals_adamw_on_the_oracle(comm, shared):
    """Five steps, clipped and warmed up, give the losses and weights of torch's AdamW on the oracle."""
    changes = {"train__clip_norm": 0.5, "train__learning_rate_warmup_steps": 3, "cluster__replicate": True}
    with open_small_job(comm, shared, model__num_experts=3, **changes) as (job, optimizer, state):
        train, load = job.config.train, np.ones((2, 3))
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        decay = {name: 0.0 if "norm" in name else train.weight_decay for name in weights}
        adamw = torch.optim.AdamW(
            [{"params": [w], "weight_decay": decay[name]} for name, w in weights.items()],
            betas=(train.beta1, train.beta2), eps=train.epsilon,
        )  # fmt: skip
        for step in range(1, 6):
            starts, batches, groups = whole_batches(job, step)
            optimizer.zero_gradients()
            outcome = job.stepper.run(job.training, starts, load, "train")
            optimizer.step(step)

            adamw.zero_grad()
            total, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
            total.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), train.clip_norm)
            for group in adamw.param_groups:
                group["lr"] = train.learning_rate * min(1, step / 3)
            adamw.step()
            assert outcome.loss == pytest.approx(entropy.item(), rel=1e-5)
        after = gather_logical(comm, state, lambda p: p.data)
    for name, weight in weights.items():
        assert torch.allclose(after[name], weight, atol=2e-4), name


@pytest.mark.mpi
def test_bfloat16_is_near_the_oracle(comm, shared):
    with open_small_job(comm, shared, model__dtype="bfloat16") as (job, optimizer, state):
        load = np.ones((2, 4))
        weights = gather_logical(comm, state, lambda p: p.data)
        starts, batches, groups = whole_batches(job, 1)
        outcome = job.stepper.run(job.training, starts, load, "train")
        _, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        assert outcome.loss == pytest.approx(entropy.item(), rel=1e-2)
        assert optimizer.step(1) > 0
