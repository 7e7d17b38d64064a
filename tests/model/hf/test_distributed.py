"""transformers' own expert parallelism over a group's dispatchers: the same loss and gradients, parameters its own."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from spreading import assert_close, call, draw_ids, make_whole, open_group, skip_unless_pair, split_by_rank

import hpcmoe
from hpcmoe.errors import ConfigError
from hpcmoe.model.hf.distributed import check_meshes
from hpcmoe.wait import barrier

pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers >= 5.24")
pytest.importorskip("accelerate", reason="transformers wants it to place a model on several devices")


@pytest.fixture
def torch_ranks(comm, shared):
    """Number torch's ranks as MPI does."""
    skip_unless_pair(comm)
    where = f"file://{shared}/meeting"
    torch.distributed.init_process_group("gloo", init_method=where, rank=comm.rank, world_size=comm.size)
    yield
    torch.distributed.destroy_process_group()


def save_whole(comm, whole, folder):
    """Save a model that all ranks have, once."""
    if comm.rank == 0:
        whole.save_pretrained(folder)
    barrier(comm)


def load_distributed(folder, **sizes):
    """Load a model as transformers distributes it, its experts' rows carried by what is registered."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes, ep_implementation="hpcmoe")
    arguments = {"distributed_config": config, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).train()


def compare_sharded(comm, model, whole, close=2e-6):
    """Compare every gradient, which FSDP has averaged over the ranks, with that of the whole batch."""
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            assert_close(found[name].full_tensor() * comm.size, grad, name, close)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_transformers_expert_parallelism_is_the_same_with_our_rows(comm, shared, torch_ranks, family):
    with open_group(comm) as group:
        hpcmoe.hf.register(group)
        all_ids, ids = draw_ids(comm)
        whole = make_whole(family)
        save_whole(comm, whole, shared / "whole")
        model = load_distributed(shared / "whole", fsdp_size=comm.size, ep_size=comm.size)
        assert [layer.num_experts for layer in model.modules() if hasattr(layer, "is_transposed")][0] == 8 // comm.size
        wanted, output = call(whole, all_ids, all_ids), call(model, ids, all_ids)
        assert_close(output.logits, split_by_rank(comm, wanted.logits), "logits")
        for each in (wanted, output):
            each.loss.backward()
        compare_sharded(comm, model, whole)
        assert sum(int(loads.sum()) for loads in group.loads()) == all_ids.numel() * 2 * len(group.layers) > 0


@pytest.mark.mpi
def test_a_model_in_bfloat16_and_a_rank_without_rows_take_a_step(comm, shared, torch_ranks):
    with open_group(comm) as group:
        hpcmoe.hf.register(group)
        whole = make_whole("mixtral").bfloat16()
        for layer in whole.model.layers:  # the first four experts have the two largest logits, whatever the token
            gate = layer.mlp.gate.weight.data
            gate[1], gate[2], gate[3], gate[4:] = -gate[0], gate[0] / 2, -gate[0] / 2, 0
        save_whole(comm, whole, shared / "whole")
        model = load_distributed(shared / "whole", fsdp_size=comm.size, ep_size=comm.size)
        model.set_experts_implementation("eager")  # whose loop over no expert has no graph
        all_ids, ids = draw_ids(comm)
        wanted, output = call(whole, all_ids, all_ids), call(model, ids, all_ids)
        for each in (wanted, output):
            each.loss.backward()
        assert output.logits.dtype == torch.bfloat16 and all(loads[4:].sum() == 0 for loads in group.loads())
        compare_sharded(comm, model, whole, close=0.1)


@pytest.mark.mpi
def test_what_does_not_fit_the_group_is_one_line(comm, torch_ranks):
    alone = [torch.distributed.new_group([rank]) for rank in range(comm.size)][comm.rank]
    meshes = [SimpleNamespace(size=g.size, get_group=lambda g=g: g) for g in (torch.distributed.group.WORLD, alone)]
    with open_group(comm) as group:
        check_meshes(group, *meshes)
        if comm.size > 1:
            with pytest.raises(ConfigError, match=r"tp_size = \d, the group's tensor_parallel = 1: both must be 1"):
                check_meshes(group, meshes[0], meshes[0])
            with pytest.raises(ConfigError, match=r"ep_size: experts are shared by ranks \[\d\], in the group by"):
                check_meshes(group, meshes[1], meshes[1])
    with open_group(comm, tensor_parallel=comm.size) as group:
        if comm.size > 1:
            with pytest.raises(ConfigError, match=r"tp_size = 1, the group's tensor_parallel = \d: both must be 1"):
                check_meshes(group, *meshes)
    backwards = comm.Split(0, -comm.rank)
    with open_group(backwards) as group:
        if backwards.rank != comm.rank:
            with pytest.raises(ConfigError, match=r"rank \d of \d in torch.distributed, rank \d of \d here"):
                check_meshes(group, *meshes)
    backwards.Free()
