"""A spread model is used as any other: moved in mid-training, copied, cast, beside another, called with odd rows."""

import copy

import pytest
import torch
from spreading import assert_close, call, compare_gradients, draw_ids, open_group, place_unevenly, skip_unless_here
from tiny_families import make_model
from torch import nn

import hpcmoe
from hpcmoe.model.hf.adapters import AdaptedExperts, adapt_model
from hpcmoe.model.hf.spread import list_fused

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")


def step(optimizer, model, ids, all_ids, group=None):
    """Take a step -> the loss."""
    loss = call(model, ids, all_ids).loss
    loss.backward()
    if group is not None:
        group.sum_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def logits_of(comm, model, whole):
    """Compute this rank's logits by both models."""
    ids = draw_ids(comm)[1]
    return model(input_ids=ids).logits, whole(input_ids=ids).logits


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
def test_experts_that_move_between_two_steps_learn_as_plain_ones(comm, family):
    skip_unless_here(family)
    with open_group(comm) as group:
        all_ids, ids = draw_ids(comm)
        whole, model = (
            make_model(family),
            hpcmoe.hf.spread(make_model(family), group, placement=place_unevenly(comm.size)),
        )
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (whole, model)]
        for _ in range(2):
            step(optimizers[0], whole, all_ids, all_ids)
            step(optimizers[1], model, ids, all_ids, group)
            before = [layer.expert_of_slot.tolist() for layer in group.layers]
            assert group.rebalance(model, optimizers[1]) > 0 or comm.size == 1
        assert comm.size == 1 or comm.allreduce(before != [layer.expert_of_slot.tolist() for layer in group.layers])
        for m, own in ((whole, all_ids), (model, ids)):
            call(m, own, all_ids).loss.backward()
        group.sum_gradients(model)
        compare_gradients(comm, model, whole, 1e-5)  # of two steps before


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["gpt_oss", "longcat_flash"])
def test_an_expert_that_is_chosen_twice_counts_twice(comm, family):
    with open_group(comm) as group:
        whole, model = make_model(family), hpcmoe.hf.spread(make_model(family), group)
        adapt_model(whole)
        experts = [list_fused(m)[0] for m in (whole, model)]
        num_rows = 0 if comm.rank == 1 else 3  # and a rank without rows
        x = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(comm.rank))
        index = torch.tensor([[1, 1], [7, 0], [4, 4]])[:num_rows]
        weights = torch.tensor([[0.5, 0.25], [1.0, -2.0], [0.0, 3.0]])[:num_rows]
        inputs = [(x.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in experts]
        wanted, found = (m(own, index, gates) for m, (own, gates) in zip(experts, inputs, strict=True))
        assert_close(found, wanted, "output")
        (found * torch.arange(32)).sum().backward()
        (wanted * torch.arange(32)).sum().backward()
        for name, given, exact in zip(("x", "weights"), inputs[1], inputs[0], strict=True):
            assert_close(given.grad, exact.grad, name)


@pytest.mark.mpi
def test_choices_of_no_expert_are_not_counted(comm):
    with open_group(comm) as group:
        experts = list_fused(hpcmoe.hf.spread(make_model("longcat_flash"), group))[0]
        x = torch.randn(3, 32)
        y = experts(x, torch.tensor([[8, 9], [0, 8], [2, 0]]), torch.tensor([[0.5, 0.25], [0.0, 2.0], [0.0, 0.0]]))
        assert_close(y, torch.stack([0.75 * x[0], 2 * x[1], 0 * x[2]]), "output")
        assert group.loads()[0].tolist() == [2 * comm.size, 0, comm.size, 0, 0, 0, 0, 0]


@pytest.mark.mpi
@pytest.mark.parametrize("before", [True, False])
def test_bfloat16_is_as_near_to_float32_as_on_one_process(comm, before):
    with open_group(comm) as group:
        exact, coarse = make_model("mixtral"), make_model("mixtral").to(torch.bfloat16)
        coarse.set_experts_implementation("eager")
        model = make_model("mixtral").to(torch.bfloat16 if before else torch.float32)
        model = hpcmoe.hf.spread(model, group).to(torch.bfloat16)
        found, wanted = logits_of(comm, model, exact)
        rounding = find_median_error(logits_of(comm, coarse, exact)[0], wanted)
        assert found.dtype == torch.bfloat16 and find_median_error(found, wanted) <= 2 * rounding
        assert group.rebalance(model) > 0 or comm.size == 1
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert find_median_error(logits_of(comm, model, exact)[0], wanted) <= 2 * rounding


def find_median_error(found, wanted):
    """Find the largest error of a token's logits, median over tokens: a few are routed elsewhere in low precision."""
    return float((found - wanted).detach().abs().amax(dim=-1).median())


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_an_experts_implementation_set_later_changes_nothing(comm, name):
    with open_group(comm) as group:
        whole, model = make_model("qwen3_moe"), hpcmoe.hf.spread(make_model("qwen3_moe"), group)
        assert model.config._experts_implementation == "hpcmoe"
        model.set_experts_implementation(name)
        assert_close(*logits_of(comm, model, whole), "logits")
        assert sum(group.loads()[0]) == 2 * sum(map(len, draw_ids(comm)[0]))


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "jetmoe"])
def test_a_deep_copy_has_weights_of_its_own(comm, family):
    with open_group(comm) as group:
        whole, model = make_model(family), hpcmoe.hf.spread(make_model(family), group)
        copied = copy.deepcopy(model)
        assert not set(map(id, model.parameters())) & set(map(id, copied.parameters()))
        all_ids, ids = draw_ids(comm)
        step(torch.optim.SGD(model.parameters(), lr=0.1), model, ids, all_ids, group)
        assert_close(*logits_of(comm, copied, whole), "copy")
        step(torch.optim.SGD(whole.parameters(), lr=0.1), whole, all_ids, all_ids)
        assert_close(*logits_of(comm, model, whole), "original", 1e-5)


@pytest.mark.mpi
def test_a_student_learns_beside_its_teacher_and_one_model_after_the_other(comm):
    teacher_of_whole, all_ids, ids = make_model("olmoe").eval(), *draw_ids(comm)

    def distil(student, teacher, ids):
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
        (student(input_ids=ids).logits - wanted).square().sum().backward()

    whole = make_model("mixtral")
    distil(whole, teacher_of_whole, all_ids)
    for _ in range(2):  # the second group as the first
        with open_group(comm) as group:
            student = hpcmoe.hf.spread(make_model("mixtral"), group)
            teacher = hpcmoe.hf.spread(make_model("olmoe"), group, placement=place_unevenly(comm.size)).eval()
            distil(student, teacher, ids)
            group.sum_gradients(student)
            compare_gradients(comm, student, whole)
            assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.mpi
def test_sampled_tokens_are_the_same(comm):
    with open_group(comm) as group:
        whole, model = make_model("jetmoe").eval(), hpcmoe.hf.spread(make_model("jetmoe"), group).eval()
        prompts = draw_ids(comm, (1,))[1][:, : 4 + comm.rank]
        found = []
        for m in (whole, model):
            torch.manual_seed(comm.rank)
            length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True, "top_k": 5}
            found.append(m.generate(prompts, attention_mask=torch.ones_like(prompts), **length).tolist())
        assert found[0] == found[1]


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe", "longcat_flash"])
def test_an_adapted_model_computes_what_it_did(family):
    skip_unless_here(family)
    plain, model = make_model(family), make_model(family)
    adapt_model(model)
    adapt_model(model)  # the second time nothing changes
    assert sum(isinstance(m, AdaptedExperts) for m in model.modules()) == 2
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    for m in (plain, model):
        outputs.append(call(m, ids, ids))
        outputs[-1].loss.backward()
    assert_close(outputs[1].logits, outputs[0].logits, "logits")
    norms = [float(nn.utils.clip_grad_norm_(m.parameters(), 1.0)) for m in (plain, model)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
