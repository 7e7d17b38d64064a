"""Losses and all gradients on any number of ranks equal those of the dense oracle."""

import numpy as np
import oracle
import pytest
import torch
from against_oracle import check_against_oracle, whole_batches
from covering import cover, table, usually
from small import Notes, gather_logical, open_small_job

from hpcmoe.run.train import train

CASES = {
    "plain": {},
    "one expert": {"model__num_experts": 1, "model__top_k": 1},
    "fewer experts than ranks, k 1": {"model__num_experts": 3, "model__top_k": 1},
    "eight experts": {"model__num_experts": 8},
    "seventeen experts, all chosen": {"model__num_experts": 17, "model__top_k": 17},
    "sixteen experts, gated, biases": {"model__num_experts": 16, "experts__kind": "swiglu", "experts__bias": True},
    "relu without attention": {"experts__kind": "relu", "model__attention": False},
    "gates as they are, load on both": {"dispatch__renormalize": False, "dispatch__load_feedback_on": "both"},
    "capacity": {"dispatch__capacity_factor": 0.8},
    "ranks without tokens": {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "tiny batches": {"experts__gemm_rows": 3},
    "serial": {"pipeline__schedule": "serial"},
    "three in flight": {"pipeline__in_flight": 3},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1, "model__num_experts": 3},
    "contiguous": {"placement__method": "contiguous", "model__num_experts": 5},
    "biases, capacity": {"bias": 1.0, "dispatch__capacity_factor": 0.8},
}

# What evens the load; each alone, and all at once.
OFF_ALONE = {"dispatch__load_feedback": 0.0, "dispatch__aux_loss_weight": 0.0, "dispatch__z_loss_weight": 0.0}
OFF = OFF_ALONE | {"model__num_experts": 4}
MECHANISMS = {
    "none": {},
    "feedback on selection": {"dispatch__load_feedback": 0.3},
    "feedback on both": {"dispatch__load_feedback": 0.3, "dispatch__load_feedback_on": "both"},
    "auxiliary loss": {"dispatch__aux_loss_weight": 0.5},
    "z-loss": {"dispatch__z_loss_weight": 0.1},
    "bias": {"bias": 1.0},
    "all at once": {
        "bias": 1.0, "dispatch__load_feedback": 0.3, "dispatch__load_feedback_on": "both",
        "dispatch__aux_loss_weight": 0.5, "dispatch__z_loss_weight": 0.1,
    },
}  # fmt: skip

# How rows travel, and in which order they are worked on.
MESSAGES = {"comm__shared_memory": False}
DIRECT = {"num_nodes": 2, "comm__once_per_node": "off"}
ONCE = {"num_nodes": 2, "comm__once_per_node": "on"}
THREE = {"num_nodes": 3, "comm__once_per_node": "on"}
TIGHT = {"comm__message_rows": 3, "comm__pool_bytes": 3000}
WAYS = {"window": {}, "messages": MESSAGES, "nodes": DIRECT, "once a node": ONCE, "by itself": {"num_nodes": 2}}
ORDERS = {
    "serial": {"pipeline__schedule": "serial"},
    "overlap": {"experts__gemm_rows": 7},
    "overlap, any order": {"pipeline__deterministic": False, "experts__gemm_rows": 7},
    "arrival": {"pipeline__schedule": "arrival", "pipeline__deterministic": False},
}
MIXTURES = {
    "messages, hardly any room": MESSAGES | TIGHT,
    "nodes, hardly any room": DIRECT | TIGHT,
    "once a node, hardly any room": ONCE | TIGHT,
    "once a node, hardly any room, arrival": ONCE | TIGHT | ORDERS["arrival"],
    "messages, hardly any room, any order": MESSAGES | TIGHT | ORDERS["overlap, any order"],
    "three nodes": THREE | {"model__num_experts": 7, "model__top_k": 3},
    "three nodes, hardly any room": THREE | TIGHT | ORDERS["arrival"],
    "once a node, seven experts, top 3": ONCE | {"model__num_experts": 7, "model__top_k": 3},
    "once a node, every expert chosen": ONCE | {"model__top_k": 4, "comm__message_rows": 5},
    "once a node, fewer experts than ranks": ONCE | {"model__num_experts": 3, "model__top_k": 1},
    "once a node, sixteen experts, relu, biases": ONCE
    | {"model__num_experts": 16, "experts__kind": "relu", "experts__bias": True},
    "once a node, capacity": ONCE | {"dispatch__capacity_factor": 0.5, "pipeline__deterministic": False},
    "messages, capacity": MESSAGES | {"dispatch__capacity_factor": 0.5},
    "once a node, gated, no attention": ONCE
    | {"model__attention": False, "experts__kind": "swiglu", "experts__bias": True},
    "once a node, ranks without tokens": ONCE | {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "messages, ranks without tokens": MESSAGES | {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "once a node, replicas": ONCE | {"placement__replicate": True, "placement__spare_slots_per_rank": 2},
    "once a node, replicas, any order": ONCE
    | {"placement__replicate": True, "placement__spare_slots_per_rank": 2, "pipeline__deterministic": False},
}

# What else a run may be: with ways and orders, room and balancing the axes of a table.
ROOM = {"room": {}, "hardly any room": TIGHT}
NETWORKS = {
    "top 2 of 4": {},
    "1 expert": {"model__num_experts": 1, "model__top_k": 1},
    "top 1 of 3": {"model__num_experts": 3, "model__top_k": 1},
    "top 3 of 7": {"model__num_experts": 7, "model__top_k": 3},
    "all of 4": {"model__top_k": 4, "comm__message_rows": 5},
    "17 experts": {"model__num_experts": 17},
}
KINDS = {
    "gelu": {},
    "swiglu, biases": {"experts__kind": "swiglu", "experts__bias": True},
    "relu, biases, no attention": {"experts__kind": "relu", "experts__bias": True, "model__attention": False},
}
TOKENS = {
    "all tokens": {},
    "few tokens": {"data__batch_sequences": 2, "pipeline__micro_batches": 2},
    "capacity": {"dispatch__capacity_factor": 0.5},
}
REPLICAS = {
    "no replica": {},
    "spare slot": {"placement__replicate": True, "placement__spare_slots_per_rank": 1},
    "two spare": {"placement__replicate": True, "placement__spare_slots_per_rank": 2},
}
GATES = {"gates that sum to 1": {}, "gates as they are": {"dispatch__renormalize": False}}
BALANCE = {"usual balance": {}, **{name: OFF_ALONE | MECHANISMS[name] for name in ("none", "bias", "all at once")}}
AXES = (WAYS | {"three nodes": THREE}, ORDERS, ROOM, NETWORKS, KINDS, TOKENS, REPLICAS, GATES, BALANCE)
EVERY_TWO, EVERY_THREE = cover(*AXES), cover(*AXES, strength=3)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "row", [*EVERY_TWO, *(pytest.param(row, marks=pytest.mark.full) for row in EVERY_THREE)], ids=", ".join
)
def test_whatever_two_meet_equal_the_oracle(comm, shared, row):
    """Every two values of any two axes meet in a row; under --full every three."""
    changes = {}
    for axis, name in zip(AXES, row, strict=True):
        changes |= axis[name]
    check_against_oracle(comm, shared, **changes)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "case", usually(CASES, "plain", "seventeen experts, all chosen", "three in flight", "contiguous")
)
def test_step_equals_the_oracle(comm, shared, case):
    check_against_oracle(comm, shared, **CASES[case])


@pytest.mark.mpi
@pytest.mark.parametrize(("mechanism", "renormalize"), table(MECHANISMS, [True, False]))
def test_every_way_to_balance_equals_the_oracle(comm, shared, mechanism, renormalize):
    check_against_oracle(comm, shared, **OFF | MECHANISMS[mechanism], dispatch__renormalize=renormalize)


@pytest.mark.mpi
@pytest.mark.parametrize("mechanism", usually(MECHANISMS, "all at once", "bias"))
def test_training_balanced_in_every_way_equals_the_oracle(comm, shared, mechanism):
    """Four steps, each under the load and the biases that the steps before it have made, by their definitions."""
    changes = OFF | MECHANISMS[mechanism] | {"train__clip_norm": 0.0, "dispatch__load_window_steps": 2}
    speed = changes["dispatch__bias_update_speed"] = 0.3 * bool(changes.pop("bias", 0))
    notes = Notes()
    with open_small_job(comm, shared, run__steps=4, train__validate_every=0, **changes) as (job, optimizer, state):
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        whole = [whole_batches(job, step)[1:] for step in range(1, 5)]
        train(job, notes, optimizer, (0, np.ones((2, 4))), lambda *state: None)
    adamw = oracle_adamw(weights, job.config.train)
    load, bias = torch.ones(2, 4), torch.zeros(2, 4)
    for step, (batches, groups) in enumerate(whole, 1):
        adamw.zero_grad()
        total, entropy, _ = oracle.loss_of(weights, job.config, batches, load, groups, bias)
        total.backward()
        adamw.param_groups[0]["lr"] = adamw.param_groups[1]["lr"] = job.config.train.learning_rate * step / 20
        adamw.step()
        assert notes.values["train/loss"][step] == pytest.approx(entropy.item(), rel=1e-5)
        tokens = torch.tensor(notes.values["experts/utilisation"][step]) * 14 * 5 * 2 / 4
        load = (load + tokens / tokens.mean(dim=1, keepdim=True)).float() / 2
        bias = bias - speed * torch.sign(tokens - tokens.mean(dim=1, keepdim=True)).float()
    assert bool(bias.any()) == (mechanism in ("bias", "all at once"))


def oracle_adamw(weights, train):
    """Make torch's AdamW over the oracle's weights; norms are not decayed."""
    norms = [w for name, w in weights.items() if "norm" in name]
    others = [w for name, w in weights.items() if "norm" not in name]
    groups = [{"params": others, "weight_decay": train.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon)


@pytest.mark.mpi
@pytest.mark.parametrize(("way", "order"), table(WAYS, ORDERS))
def test_every_way_in_every_order_equals_the_oracle(comm, shared, way, order):
    check_against_oracle(comm, shared, **WAYS[way] | ORDERS[order])


@pytest.mark.mpi
@pytest.mark.parametrize("case", usually(MIXTURES, "once a node, hardly any room, arrival"))
def test_ways_with_other_shapes_equal_the_oracle(comm, shared, case):
    check_against_oracle(comm, shared, **MIXTURES[case])


@pytest.mark.mpi
@pytest.mark.parametrize(("num_experts", "top_k"), table([3, 4], [1, 0]))
def test_every_number_of_experts_and_choices(comm, shared, num_experts, top_k):
    top_k = min(top_k or num_experts, num_experts)
    check_against_oracle(comm, shared, model__num_experts=num_experts, model__top_k=top_k)


@pytest.mark.mpi
@pytest.mark.parametrize("shape", ["tensor", "data", "both", "tensor on nodes", "data on nodes"])
def test_parallel_shapes_equal_the_oracle(comm, shared, shape):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    changes = {
        "tensor": {"parallel__tensor": 2, "experts__bias": True},
        "data": {"parallel__data": 2},
        "both": {"parallel__tensor": 2, "parallel__data": comm.size // 2, "experts__kind": "swiglu"},
        "tensor on nodes": {"parallel__tensor": 2, "num_nodes": comm.size // 2, "comm__once_per_node": "on"},
        "data on nodes": {"parallel__data": 2, "num_nodes": comm.size, "comm__message_rows": 3},
    }[shape]
    check_against_oracle(comm, shared, **changes)


@pytest.mark.mpi
def test_capacity_drops_copies(comm, shared):
    assert check_against_oracle(comm, shared, dispatch__capacity_factor=0.5).stats.num_dropped > 0


@pytest.mark.mpi
@pytest.mark.parametrize("way", [{}, MESSAGES | TIGHT, ONCE | TIGHT], ids=["window", "messages", "once a node"])
def test_all_tokens_to_one_expert(comm, shared, way):
    """A load that repels from all experts but one sends everything there; the others' ranks receive nothing."""
    with open_small_job(comm, shared, model__top_k=1, dispatch__load_feedback=1.0, **way) as (job, optimizer, state):
        load = np.full((2, 4), 1e4)
        load[:, 2] = 0.0
        weights = {name: w.requires_grad_() for name, w in gather_logical(comm, state, lambda p: p.data).items()}
        starts, batches, groups = whole_batches(job, 1)
        outcome = job.stepper.run(job.training, starts, load, "train")
        optimizer.sums.finish()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        total, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        total.backward()
    assert outcome.stats.tokens_of_expert[:, 2].tolist() == [70, 70]
    assert outcome.loss == pytest.approx(entropy.item(), rel=2e-6)
    name = "experts/layer1/up"
    assert torch.allclose(gradients[name], weights[name].grad, rtol=1e-4, atol=1e-7)
    assert gradients[name][2].abs().max() > 0 and not gradients[name][[0, 1, 3]].any()


@pytest.mark.mpi
def test_training_equals_adamw_on_the_oracle(comm, shared):
    """Five steps, clipped and warmed up, give the losses and weights of torch's AdamW on the oracle."""
    changes = {"train__clip_norm": 0.5, "train__learning_rate_warmup_steps": 3, "placement__replicate": True}
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
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_near_the_oracle(comm, shared, way):
    with open_small_job(comm, shared, model__dtype="bfloat16", **WAYS[way]) as (job, optimizer, state):
        load = np.ones((2, 4))
        weights = gather_logical(comm, state, lambda p: p.data)
        starts, batches, groups = whole_batches(job, 1)
        outcome = job.stepper.run(job.training, starts, load, "train")
        _, entropy, _ = oracle.loss_of(weights, job.config, batches, torch.tensor(load).float(), groups)
        assert outcome.loss == pytest.approx(entropy.item(), rel=1e-2)
        assert optimizer.step(1) > 0
