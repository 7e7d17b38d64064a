"""A model of transformers is read from its files, each rank its experts alone, as transformers itself reads it."""

import ctypes
import dataclasses
import gc
import logging
import os
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from spreading import open_group
from stored_models import assert_same, list_held, place_unevenly, read_whole, save, save_tiny
from tiny_families import REGISTERED, make_model

import hpcmoe
from hpcmoe.errors import ConfigError, PlacementError
from hpcmoe.model.hf.adapters import ADAPTED
from hpcmoe.model.hf.compare import compare_step
from hpcmoe.model.hf.spread import TESTED
from hpcmoe.wait import barrier

CLOSE = 2e-6  # of the largest number of a tensor
LENGTH = 12
SHARD = "20KB"  # several files a model


def draw_ids(comm):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (1 + rank % 3, LENGTH), generator=generator) for rank in range(comm.size)]


@pytest.mark.mpi
@pytest.mark.parametrize("family", TESTED)
def test_a_family_is_loaded_as_transformers_loads_it(comm, shared, family):
    model = make_model(family)
    one, many = save(comm, shared / "one", model), save(comm, shared / "many", model, SHARD)
    assert len(list(many.glob("*.safetensors"))) > 3 > len(list(one.glob("*.safetensors")))
    with open_group(comm) as group:
        model = hpcmoe.hf.load(one, group)
        again = hpcmoe.hf.load(many, group, placement=place_unevenly(comm.size))
        wanted = read_whole(one)
        assert assert_same(again, wanted) >= assert_same(model, wanted) >= dict(wanted.named_buffers()).keys()
        assert not model.training and all(p.requires_grad for p in model.parameters())

        model.set_attn_implementation("eager")
        found = compare_step(model, lambda: wanted, group, draw_ids(comm))
        furthest = max(found, key=lambda each: each.ratio)
        assert furthest.ratio <= CLOSE, furthest
        assert {each.name for each in found} >= {"logits", "loss", *(name for name, _ in wanted.named_parameters())}


@pytest.mark.mpi
@pytest.mark.parametrize("family", [*ADAPTED, *(pytest.param(family, marks=pytest.mark.full) for family in REGISTERED)])
def test_other_families_are_loaded_as_transformers_loads_them(comm, shared, family):
    folder = save(comm, shared / "saved", make_model(family))
    with open_group(comm) as group:
        model, ids = hpcmoe.hf.load(folder, group), draw_ids(comm)[comm.rank]
        with torch.no_grad():
            found, wanted = (m(input_ids=ids, use_cache=False).logits for m in (model, read_whole(folder)))
        assert float((found - wanted).abs().max()) <= 2 * CLOSE * float(wanted.abs().max())


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx"])
def test_a_tensor_parallel_rank_keeps_its_shard_of_each_expert(comm, shared, family):
    folder = save(comm, shared / "saved", make_model(family))
    num_shards = 1 if comm.size % 2 else 2
    with open_group(comm, tensor_parallel=num_shards) as group:
        whole = hpcmoe.hf.spread(read_whole(folder), group)
        prepared = hpcmoe.hf.prepare_load(folder, group)
        wanted, found = (list(m.named_parameters()) for m in (whole, prepared.read()))
        assert [name for name, _ in wanted] == [name for name, _ in found]
        assert all(torch.equal(p, own) for (_, p), (_, own) in zip(wanted, found, strict=True))
        assert (prepared.estimate.passing > 0) == (num_shards > 1)


@pytest.mark.mpi
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_node_reads_the_dense_parts_once_and_each_rank_its_experts(comm, shared, monkeypatch, family, num_nodes):
    reads, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(preadv(*arguments)) or reads[-1])
    folder = save(comm, shared / "saved", make_model(family), SHARD)
    with open_group(comm, num_nodes) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group, placement=place_unevenly(comm.size))
        assert not reads
        estimate, model = prepared.estimate, prepared.read()
        assert sum(reads) == estimate.read == estimate.expert_read + estimate.dense_read
        assert_same(model, read_whole(folder))

        held = list(list_held(model))
        experts = sum(tensor.nbytes for _, expert, tensor in held if expert is not None)
        dense = sum(tensor.nbytes for _, expert, tensor in held if expert is None)
        computed = sum(
            b.nbytes for m in model.modules() for n, b in m._buffers.items() if n in m._non_persistent_buffers_set
        )
        counted = sum(layer.tokens_of_expert.nbytes for layer in group.layers)
        assert estimate.expert_read == experts and estimate.kept == experts + dense + counted and estimate.passing == 0
        of_rank = comm.allgather((estimate.dense_read, estimate.read, estimate.kept))
        node = group.topology.ranks_of_node(group.topology.node_of_rank[comm.rank])
        of_node = [sum(of_rank[rank][i] for rank in node) for i in range(3)]
        assert of_node == [dense + counted - computed, estimate.node_read, estimate.node_kept]


@pytest.mark.mpi
def test_what_is_trained_is_chosen(comm, shared):
    folder = save(comm, shared / "saved", make_model("qwen2_moe"))
    with open_group(comm) as group:
        for trains, part in (("experts", ".experts."), ("router", ".mlp.gate.")):
            model = hpcmoe.hf.load(folder, group, trains=trains)
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert trained == {name for name, _ in model.named_parameters() if part in name} != set()
            assert all(p.requires_grad == (trains == "experts") for p in group.layers[-1].template[0].parameters())
            found = compare_step(model, lambda: read_whole(folder), group, draw_ids(comm))
            assert max(each.ratio for each in found if each.name in ("logits", "loss")) <= CLOSE
            moved = [p.grad is not None for name, p in model.named_parameters() if name in trained]
            assert any(moved) or comm.size > 1


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_numbers_are_converted_to_the_precision_that_is_asked_for(comm, shared, family):
    model = make_model(family)
    single, half = save(comm, shared / "single", model), save(comm, shared / "half", model.to(torch.bfloat16))
    with open_group(comm) as group:
        assert_same(hpcmoe.hf.load(single, group, dtype="bfloat16"), read_whole(single, dtype=torch.bfloat16))
        assert_same(hpcmoe.hf.load(half, group, dtype=torch.float32), read_whole(half, dtype=torch.float32))
        prepared = hpcmoe.hf.prepare_load(half, group)
        assert_same(prepared.read(), read_whole(half))
        assert prepared.estimate.kept < 0.6 * hpcmoe.hf.prepare_load(single, group).estimate.kept


@pytest.mark.mpi
@pytest.mark.parametrize("stored", ["once", "twice", "unlike"])
def test_tied_parameters_are_one_unless_the_checkpoint_has_others(comm, shared, stored):
    folder = save_tiny(comm, shared / "saved", "olmoe", tie_word_embeddings=True)
    file, name = folder / "model.safetensors", "lm_head.weight"
    if comm.rank == 0 and stored != "once":
        tensors = load_file(file)
        tensors[name] = tensors["model.embed_tokens.weight"] + (stored == "unlike")
        save_file(tensors, file, {"format": "pt"})
    barrier(comm)
    with open_group(comm) as group:
        model = hpcmoe.hf.load(folder, group)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "unlike")
        assert name in assert_same(model, read_whole(folder))


@pytest.mark.mpi
def test_what_a_family_stores_in_another_order_is_converted_by_its_own_operations(comm, shared, monkeypatch):
    from transformers import conversion_mapping, core_model_loading

    if not hasattr(core_model_loading, "Interleave"):
        pytest.skip("this version of transformers has no such operation")
    from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

    loading = []

    def map_names(_):
        turn = Transpose(1, 2, check_dims=bool(loading))  # which transformers can load, and not save
        return [
            WeightConverter("mlp.experts.both", "mlp.experts.gate_up_proj", [Transpose(1, 2), Interleave(dim=1)]),
            WeightConverter("mlp.experts.turned", "mlp.experts.down_proj", [turn]),
            WeightConverter("self_attn.qkv.weight", [f"self_attn.{p}_proj.weight" for p in "qkv"], [Chunk(dim=0)]),
        ]

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", map_names)
    config = {"hidden_size": 32, "moe_intermediate_size": 16, "num_key_value_heads": 4}
    folder = save_tiny(comm, shared / "saved", "qwen3_moe", **config)
    stored = load_file(folder / "model.safetensors") if comm.rank == 0 else {}
    assert comm.rank > 0 or {"model.layers.0.mlp.experts.both", "model.layers.1.self_attn.qkv.weight"} <= stored.keys()
    loading.append(True)
    with open_group(comm) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group)
        assert_same(prepared.read(), read_whole(folder))
        assert prepared.estimate.passing > 0


@pytest.mark.mpi
def test_the_estimate_and_the_progress_are_logged_on_rank_0(comm, shared, monkeypatch, caplog):
    monkeypatch.setattr("hpcmoe.model.hf.fill._PROGRESS_SECONDS", 0.0)
    folder = save(comm, shared / "saved", make_model("mixtral"))
    with caplog.at_level(logging.INFO), open_group(comm) as group:
        hpcmoe.hf.load(folder, group)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("hpcmoe.model.hf")]
    assert len(lines) > 2 if comm.rank == 0 else not lines
    if comm.rank == 0:
        assert "mixtral: rank 0 reads" in lines[0] and "its node reads" in lines[0] and " kB read in " in lines[-1]
        assert "rank 0 has read" in lines[1] and "B/s" in lines[1]


@pytest.mark.mpi
def test_weights_that_do_not_fit_a_node_are_refused_with_the_arithmetic(comm, shared, monkeypatch):
    folder = save_tiny(comm, shared / "saved", "mixtral", num_hidden_layers=16)
    with open_group(comm) as group:
        small = dataclasses.replace(group.topology, memory_bytes=group.topology.memory_bytes * 0 + 500_000)
        monkeypatch.setattr(group, "topology", small)
        with pytest.raises(PlacementError, match=r"the weights of the \d+ ranks of \S+ take .*; it has 500 kB"):
            hpcmoe.hf.load(folder, group)


@pytest.mark.mpi
def test_arguments_are_checked_and_alike(comm, shared):
    folder = save(comm, shared / "saved", make_model("mixtral"))
    with open_group(comm) as group:
        for wrong in ({"dtype": torch.float16}, {"dtype": "float8"}, {"trains": "attention"}):
            with pytest.raises(ConfigError, match=f"hpcmoe.hf.load: {next(iter(wrong))} = .*: must be"):
                hpcmoe.hf.load(folder, group, **wrong)
        if comm.size > 1:
            with pytest.raises(ConfigError, match="trains = 'experts', 'all' on rank 0: must be alike on all ranks"):
                hpcmoe.hf.load(folder, group, trains="experts" if comm.rank else "all")


@pytest.mark.full
@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_two_gigabytes_take_what_the_estimate_says(comm, shared, dtype):
    sizes = {
        "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 10,
        "num_attention_heads": 16, "num_local_experts": 16, "dtype": torch.bfloat16,
    }  # fmt: skip
    folder = save_tiny(comm, shared / "saved", "mixtral", shard="500MB", **sizes)
    forget_files(comm, folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that tests before have had is used again
    with open_group(comm) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group, dtype=dtype)
        barrier(comm)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = read_figure("io", "read_bytes"), read_figure("status", "VmRSS") * 1024
        prepared.read()
        barrier(comm)
        read = read_figure("io", "read_bytes") - before[0]
        peak = read_figure("status", "VmHWM") * 1024 - before[1]
    estimate = prepared.estimate
    of_node = comm.allreduce(read)
    assert of_node == 0 or 0.95 < of_node / estimate.node_read < 1.05  # 0 where files are in memory
    assert 0.95 < peak / (estimate.kept + estimate.passing) < 1.05


def forget_files(comm, folder):
    """Have the system drop what it has in memory of a folder's files. Collective."""
    for file in folder.iterdir() if comm.rank == 0 else ():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    barrier(comm)


def read_figure(file, name):
    """Read a figure of this process from the system."""
    lines = pathlib.Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
