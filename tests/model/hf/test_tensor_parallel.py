"""A family's experts, each over several ranks, are the same as whole ones; what cannot be cut is one line."""

from types import SimpleNamespace

import pytest
import torch
from spreading import (
    assert_close,
    call,
    compare_gradients,
    compare_step,
    draw_ids,
    find_rows,
    open_group,
    place_unevenly,
    run_whole,
    skip_unless_here,
)
from tiny_families import OTHERS, make_model
from torch import nn

import hpcmoe
from hpcmoe.errors import ConfigError
from hpcmoe.experts.family_shards import cut_shard
from hpcmoe.model.hf.adapters import adapt_model
from hpcmoe.model.hf.spread import TESTED, check_experts, list_fused

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

LAYOUTS = ("mixtral", "gpt_oss", "aria_text", "nemotron_h", "dbrx")  # one of each


def choose_shards(comm):
    return 2 if comm.size % 2 == 0 else comm.size


@pytest.mark.mpi
@pytest.mark.parametrize(
    "family",
    [*LAYOUTS, *(pytest.param(f, marks=pytest.mark.full) for f in (*TESTED, *OTHERS) if f not in LAYOUTS)],
)
def test_experts_cut_over_ranks_are_the_same(comm, family):
    skip_unless_here(family)
    with open_group(comm, tensor_parallel=choose_shards(comm)) as group:
        close = 1e-4 if family in OTHERS else 2e-6  # test_spread.py: some round more
        model = compare_step(comm, group, family, close)
        fused = list_fused(model)[0]
        whole = sum(p.numel() for p in list_fused(adapted(family))[0].parameters() if p.dim() > 2)
        own = sum(p.numel() for p in fused.hpcmoe.local.parameters() if p.dim() > 2)
        assert comm.allreduce(own) == whole


def adapted(family):
    model = make_model(family)
    adapt_model(model)
    return model


@pytest.mark.mpi
def test_norms_replicas_and_nodes_count_shards_once(comm):
    shards = choose_shards(comm)
    with open_group(comm, num_nodes=2, tensor_parallel=shards) as group:
        model = compare_step(comm, group, "gpt_oss", placement=place_unevenly(comm.size // shards))
        whole, _ = run_whole("gpt_oss", draw_ids(comm)[0])
        norm = group.clip_grad_norm_(model, 0.5)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(whole.parameters(), 0.5)), rel=1e-5)
        compare_gradients(comm, model, whole)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("mixtral", marks=pytest.mark.full)])
def test_checkpoints_go_from_shards_to_whole_experts_and_back(comm, shared, family):
    def train(group, model, optimizer):
        call(model, ids, all_ids).loss.backward()
        group.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()

    def open_model(group):
        model = hpcmoe.hf.spread(make_model(family), group)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    all_ids, ids = draw_ids(comm)
    logits = []
    shards = (choose_shards(comm), 1, choose_shards(comm))
    for number, tensor_parallel in enumerate(shards):
        with open_group(comm, tensor_parallel=tensor_parallel) as group:
            model, optimizer = open_model(group)
            if number:
                group.load(shared / f"{number - 1}", model, optimizer)
                assert_close(model(input_ids=ids).logits, logits[-1], "loaded")
            train(group, model, optimizer)
            if number == 1 and group.mesh.expert_parallel > 1:
                assert group.rebalance(model, optimizer) > 0
            group.save(shared / f"{number}", model, optimizer)
            logits.append(model(input_ids=ids).logits.detach())
    with open_group(comm) as group:
        model, optimizer = open_model(group)
        for _ in shards:
            train(group, model, optimizer)
        assert_close(logits[-1], model(input_ids=ids).logits.detach(), "trained", 2e-5)


@pytest.mark.mpi
def test_cut_experts_move_between_steps(comm):
    shards = choose_shards(comm)
    with open_group(comm, tensor_parallel=shards) as group:
        all_ids, ids = draw_ids(comm)
        whole, _ = run_whole("gpt_oss", all_ids)
        model = hpcmoe.hf.spread(make_model("gpt_oss"), group)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (whole, model)]
        call(model, ids, all_ids).loss.backward()
        group.sum_gradients(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert (group.rebalance(model, optimizers[1]) > 0) == (comm.size > shards)
        for m, own in ((whole, all_ids), (model, ids)):
            call(m, own, all_ids).loss.backward()
        group.sum_gradients(model)
        compare_gradients(comm, model, whole, 5e-6)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_the_rows_that_they_should_be(family, shards):
    skip_unless_here(family)
    fused = list_fused(adapted(family))[0]
    for name, weight in fused.named_parameters():
        for index in range(shards):
            shard = cut_shard(fused, name, weight[3:5], index, shards)
            place = SimpleNamespace(tensor_index=index, tensor_parallel=shards)
            axis, rows = find_rows(fused, name, shard, place)
            assert torch.equal(shard, weight[3:5].index_select(axis, rows))


def test_experts_that_cannot_be_cut_are_one_line():
    def make_fused():
        return list_fused(make_model("mixtral"))[0]

    with pytest.raises(ConfigError, match=r"parallel = 5: MixtralExperts: a feed-forward size of 12 leaves 2 over"):
        check_experts("here", make_fused(), 5)
    normed = make_fused()
    normed.has_post_expert_norm = True
    check_experts("here", normed, 1)
    with pytest.raises(ConfigError, match="norms what comes of a whole expert: must be 1"):
        check_experts("here", normed, 2)
    scaled = make_fused()
    scaled.scale = nn.Parameter(torch.ones(8, 1))
    check_experts("here", scaled, 1)
    with pytest.raises(ConfigError, match="where to cut scale is not known: must be 1"):
        check_experts("here", scaled, 2)
    sharing = make_fused()
    sharing.norm = nn.LayerNorm(32)
    with pytest.raises(ConfigError, match="its experts share norm.weight, which no rank can have alone"):
        check_experts("here", sharing, 1)
