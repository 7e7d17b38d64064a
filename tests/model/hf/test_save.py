"""What a spread model saves is what transformers saves of the whole: names, shapes, dtypes, weights; and it loads."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from limits import limit_file_size
from spreading import assert_close, call, draw_ids, open_group, place_unevenly
from tiny_families import REGISTERED, make_model

import hpcmoe
from hpcmoe.errors import CheckpointError, ConfigError, on_root
from hpcmoe.model.hf import gather
from hpcmoe.model.hf.adapters import ADAPTED
from hpcmoe.model.hf.shard_files import ShardWriter, find_code, split_into_files
from hpcmoe.model.hf.spread import TESTED
from hpcmoe.wait import broadcast

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

SMALL = 20_000  # bytes of a file: each tiny model takes several


class Died(BaseException):
    """What ends a rank where it stands."""


def step(model, optimizer, ids, all_ids, group=None):
    """Take a step of training."""
    call(model, ids, all_ids).loss.backward()
    if group is not None:
        group.sum_gradients(model)
    optimizer.step()


def train_whole(comm, family):
    """Take a step of the whole model on one process."""
    all_ids, _ = draw_ids(comm)
    whole = make_model(family)
    step(whole, torch.optim.SGD(whole.parameters(), lr=0.05), all_ids, all_ids)
    return whole


def train_spread(comm, group, family, **options):
    """Take the same step of a spread model."""
    all_ids, ids = draw_ids(comm)
    model = hpcmoe.hf.spread(make_model(family), group, **options)
    step(model, torch.optim.SGD(model.parameters(), lr=0.05), ids, all_ids, group)
    return model


def read_tensors(folder):
    """Read a checkpoint's tensors by safetensors itself, by way of its index where it has one."""
    from safetensors import safe_open

    files = {path.name for path in folder.glob("*.safetensors")}
    found = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        told = json.loads(index.read_text())
        assert told["weight_map"].keys() == found.keys() and set(told["weight_map"].values()) == files
        assert told["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def read_json(folder, name):
    return json.loads((folder / name).read_text())


def check_saved(comm, folder, make_whole, close=2e-6):
    """Compare a checkpoint with what transformers writes of the whole model, that rank 0 makes. Collective."""

    def check():
        whole = make_whole()
        whole.save_pretrained(reference := folder.with_name(f"{folder.name}-of-transformers"))
        wanted, found = read_tensors(reference), read_tensors(folder)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert_close(found[name].double(), tensor.double(), name, close)
        assert read_json(folder, "config.json") == read_json(reference, "config.json")
        if (reference / "generation_config.json").exists():
            assert read_json(folder, "generation_config.json") == read_json(reference, "generation_config.json")
        assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []

    on_root(comm, check)


def check_loaded(comm, folder, model):
    """Check that transformers loads a checkpoint as the model that is spread: the same logits. Collective."""
    from transformers import AutoModelForCausalLM

    _, ids = draw_ids(comm)
    logits = model.eval()(input_ids=ids).logits.detach()

    def check():
        loaded, told = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
        assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_close(loaded.eval()(input_ids=ids).logits, logits, "logits")

    on_root(comm, check)


@pytest.mark.mpi
@pytest.mark.parametrize("family", TESTED)
def test_a_step_is_saved_as_transformers_saves_it(comm, shared, family):
    with open_group(comm) as group:
        model = train_spread(comm, group, family)
        hpcmoe.hf.save(model, group, shared / "a")
        check_saved(comm, shared / "a", lambda: train_whole(comm, family))
        check_loaded(comm, shared / "a", model)


@pytest.mark.mpi
@pytest.mark.parametrize("family", [name for name in ADAPTED if name != "longcat_flash"])
def test_adapted_families_have_their_own_names_again(comm, shared, family):
    with open_group(comm) as group:
        hpcmoe.hf.save(hpcmoe.hf.spread(make_model(family), group), group, shared / "a", max_shard_bytes=SMALL)
        check_saved(comm, shared / "a", lambda: make_model(family), close=0)


@pytest.mark.full
@pytest.mark.mpi
@pytest.mark.parametrize("family", REGISTERED)
def test_other_families_are_saved_as_transformers_saves_them(comm, shared, family):
    with open_group(comm) as group:
        hpcmoe.hf.save(hpcmoe.hf.spread(make_model(family), group), group, shared / "a", max_shard_bytes=SMALL)
        check_saved(comm, shared / "a", lambda: make_model(family), close=0)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_replicas_small_files_and_moved_experts(comm, shared, family):
    with open_group(comm) as group:
        model = train_spread(comm, group, family, placement=place_unevenly(comm.size))
        hpcmoe.hf.save(model, group, shared / "a", max_shard_bytes=SMALL)
        check_saved(comm, shared / "a", lambda: train_whole(comm, family))
        files = len([*(shared / "a").glob("*.safetensors")])
        moved = group.rebalance(model)
        assert files > 4 and (moved > 0 or comm.size == 1)
        hpcmoe.hf.save(model, group, shared / "a", max_shard_bytes=10 * SMALL)  # in place of the first
        assert len([*(shared / "a").glob("*.safetensors")]) < files
        check_saved(comm, shared / "a", lambda: train_whole(comm, family))
        check_loaded(comm, shared / "a", model)


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_tensor_parallel_shards_are_put_together(comm, shared, family):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    color = int(comm.size == 3 and comm.rank == 2)  # of three ranks, the last is a group of its own
    part, folder = comm.Split(color, comm.rank), shared / str(color) / "a"
    shards = 2 if part.size % 2 == 0 else 1
    with open_group(part, tensor_parallel=shards) as group:
        hpcmoe.hf.save(hpcmoe.hf.spread(make_model(family), group), group, folder, max_shard_bytes=SMALL)
        check_saved(part, folder, lambda: make_model(family), close=0)
    part.Free()


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_what_is_loaded_trained_and_saved_loads_on_fewer_ranks(comm, shared, family):
    def train(ranks, source, target):
        """Load, take a step and save, with some of the ranks -> the model's logits."""
        with open_group(ranks) as group:
            all_ids, ids = draw_ids(ranks)
            model = hpcmoe.hf.load(source, group).train()
            step(model, torch.optim.SGD(model.parameters(), lr=0.05), ids, all_ids, group)
            hpcmoe.hf.save(model, group, target, max_shard_bytes=SMALL)
            check_loaded(ranks, target, model)

    if comm.rank == 0:
        make_model(family).save_pretrained(shared / "of-transformers")
    comm.Barrier()
    train(comm, shared / "of-transformers", shared / "a")
    check_saved(comm, shared / "a", lambda: train_whole(comm, family))
    fewer = comm.Split(int(comm.rank == comm.size - 1 and comm.size > 1), comm.rank)
    if comm.rank < max(comm.size - 1, 1):
        train(fewer, shared / "a", shared / "b")
    fewer.Free()


@pytest.mark.mpi
def test_bfloat16_stays_bfloat16(comm, shared):
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("deepseek_v3").to(torch.bfloat16), group)
        hpcmoe.hf.save(model, group, shared / "a")
        check_saved(comm, shared / "a", lambda: make_model("deepseek_v3").to(torch.bfloat16), close=0)
        assert read_json(shared / "a", "config.json")["dtype"] == "bfloat16"
        later = hpcmoe.hf.spread(make_model("mixtral"), group).to(torch.bfloat16)
        hpcmoe.hf.save(later, group, shared / "b")
        check_saved(comm, shared / "b", lambda: make_model("mixtral").to(torch.bfloat16), close=0)


@pytest.mark.mpi
def test_what_ends_midway_leaves_the_earlier_checkpoint(comm, shared, monkeypatch):
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("mixtral"), group)
        hpcmoe.hf.save(model, group, shared / "a")
        before = read_tensors(shared / "a")
        with torch.no_grad():
            model.lm_head.weight += 1
        fetch, calls = gather.ExpertGatherer.fetch, []

        def die(gatherer, wanted):
            calls.append(wanted)
            if len(calls) == 9:
                raise Died
            return fetch(gatherer, wanted)

        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(gather.ExpertGatherer, "fetch", die)
            hpcmoe.hf.save(model, group, shared / "a")
        comm.Barrier()
        assert (shared / "a.partial").exists()
        found = read_tensors(shared / "a")
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        comm.Barrier()
        hpcmoe.hf.save(model, group, shared / "a")
        assert not torch.equal(read_tensors(shared / "a")["lm_head.weight"], before["lm_head.weight"])
        assert sorted(path.name for path in shared.iterdir()) == ["a"]


def error_of(comm, call, kind=CheckpointError):
    """Return the line of an error that all ranks have alike."""
    with pytest.raises(kind) as error:
        call()
    line = str(error.value)
    assert error.value.shared and "\n" not in line and line == broadcast(comm, line)
    return line


@pytest.mark.mpi
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(comm, shared):
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("mixtral"), group)
        hpcmoe.hf.save(model, group, shared / "a")
        with limit_file_size(20_000) if comm.rank == 0 else contextlib.nullcontext():
            line = error_of(comm, lambda: hpcmoe.hf.save(model, group, shared / "a", max_shard_bytes=90_000))
        assert "model-0000" in line and "cannot be written: File too large" in line
        comm.Barrier()
        assert sorted(path.name for path in shared.iterdir()) == ["a"]
        check_saved(comm, shared / "a", lambda: make_model("mixtral"), close=0)


@pytest.mark.mpi
def test_what_must_not_be_replaced_is_not(comm, shared):
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("mixtral"), group)
        own = shared / "own"
        if comm.rank == 0:
            own.mkdir()
            (own / "config.json").touch()
            (own / "thesis.tex").touch()
            (shared / "file").touch()
        comm.Barrier()
        line = error_of(comm, lambda: hpcmoe.hf.save(model, group, own))
        assert "holds thesis.tex, so it is no checkpoint and is not replaced" in line
        assert "is no folder" in error_of(comm, lambda: hpcmoe.hf.save(model, group, shared / "file"))
        assert "Not a directory" in error_of(comm, lambda: hpcmoe.hf.save(model, group, shared / "file" / "a"))
        line = error_of(comm, lambda: hpcmoe.hf.save(model, group, own, max_shard_bytes=0), ConfigError)
        assert "max_shard_bytes = 0: must be at least 1" in line
        line = error_of(comm, lambda: hpcmoe.hf.save(torch.nn.Linear(2, 2), group, shared / "a"), ConfigError)
        assert "Linear: is no model of transformers" in line
        lost = hpcmoe.hf.spread(make_model("longcat_flash"), group)
        assert "cannot be saved" in error_of(comm, lambda: hpcmoe.hf.save(lost, group, shared / "a"), ConfigError)
        assert sorted(path.name for path in own.iterdir()) == ["config.json", "thesis.tex"]
        assert sorted(path.name for path in shared.iterdir()) == ["file", "own"]


@pytest.mark.mpi
def test_ranks_whose_models_differ_are_told(comm, shared):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("mixtral"), group)
        if comm.rank == 1:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:-1])
        line = error_of(comm, lambda: hpcmoe.hf.save(model, group, shared / "a"), ConfigError)
        assert "headers = " in line and "must be alike on all ranks" in line
        assert list(shared.iterdir()) == []


@pytest.mark.mpi
def test_buffers_are_those_of_rank_0(comm, shared):
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("deepseek_v3"), group)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += comm.rank
        hpcmoe.hf.save(model, group, shared / "a", max_shard_bytes=SMALL)
        check_saved(comm, shared / "a", lambda: make_model("deepseek_v3"), close=0)


@pytest.mark.mpi
def test_the_tokenizer_goes_along(comm, shared):
    source = shared / "source"
    if comm.rank == 0:
        source.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors", "a.py"):
            (source / name).write_text(name)
    comm.Barrier()
    with open_group(comm) as group:
        model = hpcmoe.hf.spread(make_model("olmoe"), group)
        model.config._name_or_path = str(source)
        hpcmoe.hf.save(model, group, shared / "a")
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    copied = {path.name: path for path in (shared / "a").iterdir() if path.name in wanted or path.suffix == ".py"}
    assert copied.keys() == wanted and all(path.read_text() == name for name, path in copied.items())


@pytest.mark.mpi
def test_adapters_are_saved_in_pefts_format_and_merged_ones_whole(comm, shared):
    peft = pytest.importorskip("peft")
    wrap = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapt(model):
        torch.manual_seed(3)
        return peft.get_peft_model(model, wrap)

    with open_group(comm) as group:
        model = adapt(hpcmoe.hf.spread(make_model("qwen3_moe").eval(), group))
        hpcmoe.hf.save(model, group, shared / "adapters")
        ids = draw_ids(comm)[1]
        logits = model(input_ids=ids).logits.detach()
        assert {p.name for p in (shared / "adapters").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        again = peft.PeftModel.from_pretrained(make_model("qwen3_moe").eval(), shared / "adapters")
        assert_close(again(input_ids=ids).logits, logits, "logits with adapters")
        merged = model.merge_and_unload()
        hpcmoe.hf.save(merged, group, shared / "merged")
        check_loaded(comm, shared / "merged", merged)
        assert_close(merged(input_ids=ids).logits, logits, "merged logits")


def test_files_hold_tensors_of_all_widths_where_safetensors_finds_them(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.tensor(7.0, dtype=torch.bfloat16),
        "d": torch.empty(0, 4), "e": torch.arange(4).view(2, 2), "f": torch.tensor([True]),
    }  # fmt: skip
    (file,) = split_into_files({name: tensor.to("meta") for name, tensor in tensors.items()}, 1000)
    writer = ShardWriter(tmp_path, [file])
    writer.write("b", 1, tensors["b"][1:])
    writer.write("b", 0, tensors["b"][:1])
    for name in "acdef":
        writer.write(name, 0, tensors[name])
    writer.write("of another rank", 0, tensors["a"])
    writer.finish()
    found = read_tensors(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(offset % tensors[name].itemsize == 0 for name, offset in file.offset_of_tensor.items())


def test_a_file_that_is_not_whole_or_there_already_is_one_line(tmp_path):
    (file,) = split_into_files({"a": torch.empty(8, device="meta")}, 1000)
    writer = ShardWriter(tmp_path, [file])
    writer.write("a", 0, torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is \d+ bytes, \d+ were to be written"):
        writer.finish()
    again = ShardWriter(tmp_path, [file])
    again.write("a", 0, torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written: File exists"):
        again.finish()
    assert Path(tmp_path / file.name).stat().st_size == file.num_bytes - 16


def test_numbers_that_safetensors_does_not_hold_are_one_line():
    assert find_code(torch.bfloat16) == "BF16"
    with pytest.raises(CheckpointError, match=r"torch\.qint8: safetensors holds no such numbers"):
        find_code(torch.qint8)
