"""A Hugging Face model with its experts on many ranks is the same model on one, by transformers' own loop."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from spreading import (
    CLOSE,
    assert_close,
    call,
    compare_gradients,
    compare_step,
    draw_ids,
    gather_expert_grads,
    measure_rounding,
    open_group,
    place_unevenly,
    run_whole,
    skip_unless_here,
)
from tiny_families import OTHERS, make_model
from torch import nn
from twins import sum_over

import hpcmoe
from hpcmoe.errors import ConfigError
from hpcmoe.experts import fused
from hpcmoe.model.hf.spread import TESTED, find_top_k

# Families whose own float32 is 3e-6 to 3e-5 from a float64 twin on one process, and why.
ROUNDS_MORE = {
    "qwen3_next": "decays of its linear attention are exponentials of sums",
    "qwen3_5_moe_text": "as qwen3_next",
    "bailing_hybrid": "as qwen3_next, in eight layers",
    "deepseek_v4": "hyper-connections are normed by rows and columns in turn, 20 times",
    "longcat_flash": "the gates' gradients nearly cancel",
    "gemma4_text": "six layers whose outputs are normed four times each",
}

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")


@pytest.mark.mpi
@pytest.mark.parametrize("family", [*TESTED, *(pytest.param(other, marks=pytest.mark.full) for other in OTHERS)])
def test_a_family_on_many_ranks_is_the_same_on_one(comm, family):
    skip_unless_here(family)
    close = max(CLOSE, 3 * measure_rounding(family, draw_ids(comm)[0])) if family in ROUNDS_MORE else CLOSE
    with open_group(comm, num_nodes=2) as group:
        compare_step(comm, group, family, close)
        if family in OTHERS:
            compare_step(comm, group, family, close, placement=place_unevenly(comm.size))


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("num_nodes", [1, 4])
def test_uneven_and_replicated_experts_are_the_same(comm, family, num_nodes):
    with open_group(comm, num_nodes) as group:
        model = compare_step(comm, group, family, placement=place_unevenly(comm.size))
        held = [p for layer in group.layers for p in layer.local.parameters()]
        own = sum(e >= 0 for e in group.layers[0].expert_of_slot)
        assert len(held) == own * len(group.layers) * len(list(group.layers[0].template[0].parameters()))
        assert all(len(p) == 1 for p in held) and set(held) <= set(model.parameters())
        assert len(group.dispatchers.opened) == 1  # one window for all layers


@pytest.mark.mpi
def test_the_norm_that_is_clipped_counts_each_expert_once(comm):
    with open_group(comm) as group:
        model = compare_step(comm, group, "mixtral", placement=place_unevenly(comm.size))
        whole, _ = run_whole("mixtral", draw_ids(comm)[0])
        norm = group.clip_grad_norm_(model, 0.5)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(whole.parameters(), 0.5)), rel=1e-5)
        compare_gradients(comm, model, whole)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_steps_in_lanes_learn_as_one_process_does(comm, family):
    with open_group(comm, schedule="arrival", deterministic=False) as group:
        all_ids, ids = draw_ids(comm, (3,))
        whole, model = make_model(family), hpcmoe.hf.spread(make_model(family), group)
        whole.set_experts_implementation("eager")
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (whole, model)]

        def step(micro_batch):
            loss = call(model, micro_batch, all_ids).loss
            loss.backward()
            return loss.detach()

        for _ in range(3):
            wanted = call(whole, all_ids, all_ids).loss
            wanted.backward()
            loss = sum(group.lanes(step, ids.split(1)))
            group.sum_gradients(model)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert comm.allreduce(float(loss)) == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_checkpoint_drops_what_the_experts_keep_and_changes_nothing(comm, checkpoints, monkeypatch):
    keep, forward = [], fused.forward

    def note(expert, x, kept):
        y = forward(expert, x, kept)
        keep.append(weakref.ref(kept[-1][1]))
        return y

    monkeypatch.setattr(fused, "forward", note)
    with open_group(comm) as group:
        all_ids, ids = draw_ids(comm)
        whole, _ = run_whole("qwen3_moe", all_ids)
        model = hpcmoe.hf.spread(make_model("qwen3_moe"), group)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = call(model, ids, all_ids).loss
        in_forward = len(keep)
        assert in_forward > 0 and sum(kept() is not None for kept in keep) == (0 if checkpoints else in_forward)
        loss.backward()
        assert (len(keep) > in_forward) == checkpoints
        group.sum_gradients(model)
        compare_gradients(comm, model, whole)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "llama4_text"])
def test_greedy_generation_gives_the_same_tokens(comm, family):
    with open_group(comm) as group:
        whole, model = make_model(family).eval(), hpcmoe.hf.spread(make_model(family), group).eval()
        prompts = draw_ids(comm, (1,))[1][:, : 4 + comm.rank]
        length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        wanted, found = (m.generate(prompts, attention_mask=torch.ones_like(prompts), **length) for m in (whole, model))
        assert found.tolist() == wanted.tolist()


@pytest.mark.mpi
def test_a_rank_without_tokens_serves_the_others(comm):
    with open_group(comm) as group:
        whole, model = make_model("mixtral"), hpcmoe.hf.spread(make_model("mixtral"), group)
        blocks = [m.model.layers[1].mlp for m in (whole, model)]
        x = torch.randn(1, 0 if comm.rank == comm.size - 1 else 5, 32)
        wanted, found = (block(x) for block in blocks)
        assert_close(found, wanted, "output")
        found.sum().backward()
        if len(x[0]):
            wanted.sum().backward()
        group.sum_gradients(model)
        path = "model.layers.1.mlp.experts"
        for name, grad in gather_expert_grads(comm, whole, path, group.layers[1]).items():
            of_rank = whole.get_parameter(name).grad
            assert_close(grad, sum_over(comm, torch.zeros_like(grad) if of_rank is None else of_rank), name)


@pytest.mark.mpi
def test_what_cannot_be_spread_is_one_line(comm):
    with open_group(comm) as group:
        with pytest.raises(ConfigError, match=r"model type 'Linear': its experts are not in .*; works with mixtral,"):
            hpcmoe.hf.spread(nn.Linear(2, 2), group)
        model = hpcmoe.hf.spread(make_model("mixtral"), group)
        with pytest.raises(ConfigError, match="the experts of this model are spread already"):
            hpcmoe.hf.spread(model, group)
        other = make_model("mixtral")
        other.lm_head.weight.data += comm.rank
        if comm.size > 1:
            with pytest.raises(ConfigError, match=r"weights = '\w+', '\w+' on rank 0: must be alike on all ranks"):
                hpcmoe.hf.spread(other, group)
        alone = make_model("mixtral")
        alone.set_experts_implementation("hpcmoe")
        with pytest.raises(ConfigError, match="its experts are not spread"):
            alone(input_ids=torch.ones(1, 2, dtype=torch.int64))


def test_the_most_experts_of_a_token_are_found_or_missed_in_one_line():
    fused = nn.Module()
    fused.config = SimpleNamespace(moe_topk=(2, 4))
    assert find_top_k(fused) == 4
    fused.config = SimpleNamespace()
    with pytest.raises(ConfigError, match="SimpleNamespace has none of num_experts_per_tok, moe_k"):
        find_top_k(fused)


@pytest.mark.mpi
def test_checkpoints_and_moved_experts_keep_the_model(comm, shared):
    with open_group(comm) as group:
        ids = draw_ids(comm)[1]
        model = hpcmoe.hf.spread(make_model("gpt_oss"), group).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        call(model, ids, ids).loss.backward()
        group.sum_gradients(model)
        optimizer.step()
        group.save(shared / "saved", model, optimizer)
        wanted = model(input_ids=ids).logits.detach()
        assert group.rebalance(model, optimizer) > 0 or comm.size == 1
        assert_close(model(input_ids=ids).logits, wanted, "moved")
        other = make_model("gpt_oss").eval()
        hpcmoe.hf.spread(other, group, placement=place_unevenly(comm.size))
        group.load(shared / "saved", other)
        assert_close(other(input_ids=ids).logits, wanted, "loaded")
