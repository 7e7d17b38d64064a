"""Folders that are no model, by accident or on purpose: one line on all ranks, before anything is allocated or run."""

import json
import os
import time

import pytest
from safetensors_files import edit_header, put_together, take_apart
from spreading import open_group
from stored_models import save
from tiny_families import make_model

import hpcmoe
from hpcmoe.errors import CheckpointError, ConfigError, HpcmoeError
from hpcmoe.model.hf.tensor_files import read_header
from hpcmoe.wait import barrier

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GATE = "model.layers.0.mlp.gate.weight"  # [8, 32]
EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"  # [32, 16]
LONGEST_SECONDS = 30.0  # on a busy machine; far less where it is not


def edit_json(path, **changes):
    """Change keys of a JSON file; None takes a key away."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def edit_shard(folder, name, target):
    """Send the name of a tensor to another file in the index."""
    tree = json.loads((folder / INDEX).read_text())
    tree["weight_map"][name] = target
    (folder / INDEX).write_text(json.dumps(tree))


def edit_entry(folder, name, **changes):
    """Change a tensor's entry in the header of the one file."""
    edit_header(folder / ONE, lambda header: header[name].update(changes))


def remove_tensor(folder, name):
    """Take a tensor out of the one file, which stays a good one."""
    from safetensors.torch import load_file, save_file

    save_file({n: t for n, t in load_file(folder / ONE).items() if n != name}, folder / ONE)


def repeat_key(path, key):
    """Write a key of a header twice."""
    header, data = take_apart(path)
    text = json.dumps(header)
    put_together(path, text.replace("{", f'{{"{key}": {json.dumps(header[key])}, ', 1), data)


def lengthen_header(path):
    """Claim a header of 10 GB, in a file that has as much."""
    header, data = take_apart(path)
    put_together(path, header, data, 10**10)
    os.truncate(path, 2 * 10**10)


def link_out(folder):
    """Replace a shard by a link to a good file outside of the folder."""
    shard = sorted(folder.glob("model-*"))[0]
    outside = folder.parent / f"{folder.name}-outside"
    shard.rename(outside)
    shard.symlink_to(outside)


def leave_weights_of_torch(folder):
    """Leave weights in torch's own format alone."""
    (folder / ONE).rename(folder / "pytorch_model.bin")


def overlap(folder):
    """Have a tensor begin where another does."""
    header, _ = take_apart(folder / ONE)
    names = sorted((name for name in header if "down_proj" in name), key=lambda name: header[name]["data_offsets"])
    edit_entry(folder, names[1], data_offsets=header[names[0]]["data_offsets"])


def put_pipe(folder):
    """Put a pipe, at which who opens it waits for ever, in a shard's place."""
    shard = sorted(folder.glob("model-*"))[0]
    shard.unlink()
    os.mkfifo(shard)


ONE_FILE = {
    "truncated": (lambda f: os.truncate(f / ONE, 100_000), r"is cut at byte 100000: by its header it ends at \d+"),
    "truncated header": (lambda f: os.truncate(f / ONE, 100), rf"{ONE}: no safetensors file, or cut: has 100 B"),
    "empty": (lambda f: (f / ONE).write_bytes(b""), rf"{ONE}: no safetensors file, or cut: has 0 B"),
    "longer": (lambda f: os.truncate(f / ONE, 10**7), rf"{ONE}: goes on to byte 10000000: by its header it ends"),
    "missing tensor": (lambda f: remove_tensor(f, GATE), rf"{GATE}: no tensor makes it: the checkpoint is not whole"),
    "missing expert": (lambda f: remove_tensor(f, EXPERT.format(7)), "7 tensors: must be for 8 experts, as config"),
    "other family": (lambda f: edit_json(f / CONFIG, model_type="deepseek_v2"), r"makes it: .* \(deepseek_v2\)"),
    "other widths": (lambda f: edit_json(f / CONFIG, hidden_size=64), r"shape \[\[.*\]\] makes .*: must be"),
    "more experts": (lambda f: edit_json(f / CONFIG, num_experts=9), r"gate.weight: .*: must be \[9, 32\]"),
    "hostile depth": (lambda f: edit_json(f / CONFIG, num_hidden_layers=10**9), "layers = 10+: of"),
    "odd numbers": (lambda f: edit_json(f / CONFIG, num_attention_heads="x"), rf"{CONFIG}: "),
    "unknown family": (lambda f: edit_json(f / CONFIG, model_type="no_such"), rf"{CONFIG}: model_type = 'no_such'"),
    "dense family": (lambda f: edit_json(f / CONFIG, model_type="llama"), "experts are not in transformers' registry"),
    "no family": (lambda f: edit_json(f / CONFIG, model_type=None), rf"{CONFIG}: model_type is missing"),
    "dtype of config": (lambda f: edit_json(f / CONFIG, dtype="float7"), rf"{CONFIG}: dtype = 'float7': must be"),
    "no config": (lambda f: (f / CONFIG).unlink(), rf"has no {CONFIG}"),
    "config of text": (lambda f: (f / CONFIG).write_text("{"), rf"{CONFIG}: not JSON"),
    "dtype": (lambda f: edit_entry(f, GATE, dtype="F7"), rf"{ONE}: {GATE}: dtype = 'F7': must be one of BOOL, U8"),
    "shape": (lambda f: edit_entry(f, GATE, shape=[32, 8]), rf"{ONE}: {GATE}: shape \[\[32, 8\]\] makes .*: must be"),
    "negative": (lambda f: edit_entry(f, GATE, shape=[-8, -32]), rf"{ONE}: {GATE}: shape = \[-8, -32\]: must be"),
    "huge": (lambda f: edit_entry(f, GATE, shape=[2**62, 2**62]), rf"{ONE}: {GATE}: data_offsets = .*: must be"),
    "out of range": (lambda f: edit_entry(f, GATE, data_offsets=[2**40, 2**40 + 1024]), "data_offsets leaves a gap"),
    "overlap": (overlap, r"down_proj.weight: data_offsets overlaps the tensor before it"),
    "header of 10 GB": (lambda f: lengthen_header(f / ONE), rf"{ONE}: header of 10 GB: at most 100 MB"),
    "header of a list": (lambda f: put_together(f / ONE, "[]", b""), rf"{ONE}: the header is no JSON object"),
    "deep header": (lambda f: put_together(f / ONE, "[" * 10**6, b""), rf"{ONE}: not JSON: nested too deeply"),
    "bytes in header": (lambda f: (f / ONE).write_bytes((2).to_bytes(8, "little") + b"\xff{"), "header is not UTF-8"),
    "twice in header": (lambda f: repeat_key(f / ONE, GATE), rf"{ONE}: {GATE}: stands 2 times, must stand once"),
    "torch's format": (leave_weights_of_torch, r"has neither .*; pytorch_model.bin is no safetensors: convert it"),
}  # fmt: skip
SHARDS = {
    "missing shard": (lambda f: edit_shard(f, GATE, "gone.safetensors"), rf"{INDEX}: 'gone.safetensors': no such file"),
    "other shard": (lambda f: edit_shard(f, GATE, sorted(f.glob("model-*"))[-1].name), rf"{INDEX}: {GATE}: is not in"),
    "above": (lambda f: edit_shard(f, GATE, "../one/model.safetensors"), rf"{INDEX}: '../one.*: leaves the folder"),
    "absolute": (lambda f: edit_shard(f, GATE, str(f / ONE)), rf"{INDEX}: .*: leaves the folder"),
    "link out": (link_out, rf"{INDEX}: .*: is a link out of the folder, to .*-outside"),
    "no name": (lambda f: edit_shard(f, GATE, 7), rf"{INDEX}: {GATE}: 7: must be a file's name"),
    "truncated shard": (lambda f: os.truncate(sorted(f.glob("model-*"))[1], 9000), "is cut at byte 9000|or cut"),
    "empty index": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), rf"{INDEX}: weight_map is missing"),
    "pipe": (put_pipe, r"model-.*: is no regular file"),
}  # fmt: skip


@pytest.mark.mpi
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_what_is_wrong_is_one_line_on_all_ranks(comm, shared, shard):
    model = make_model("olmoe")
    with open_group(comm) as group:
        for number, (spoil, match) in enumerate((ONE_FILE if shard == "5GB" else SHARDS).values()):
            folder = save(comm, shared / f"{number}", model, shard)
            if comm.rank == 0:
                spoil(folder)
            barrier(comm)
            begun = time.monotonic()
            with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
                hpcmoe.hf.load(folder, group)
            assert time.monotonic() - begun < LONGEST_SECONDS
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000 and str(folder) in str(caught.value)
        assert group.layers == []  # nothing was built


@pytest.mark.mpi
def test_what_is_no_folder_is_one_line(comm, shared):
    with open_group(comm) as group:
        with pytest.raises(ConfigError, match="mistralai/Mixtral-8x7B: no such folder; a name on the Hub"):
            hpcmoe.hf.load("mistralai/Mixtral-8x7B", group)
        with pytest.raises(ConfigError, match=r"hpcmoe.hf.load = '\$NO_SUCH/model': \$NO_SUCH is not set"):
            hpcmoe.hf.load("$NO_SUCH/model", group)


@pytest.mark.mpi
def test_code_that_comes_with_a_checkpoint_is_never_run(comm, shared):
    folder = save(comm, shared / "saved", make_model("olmoe"))
    if comm.rank == 0:
        (folder / "evil.py").write_text(f"open({str(shared / 'has run')!r}, 'w')\n")
        edit_json(folder / CONFIG, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    barrier(comm)
    with open_group(comm) as group:
        assert type(hpcmoe.hf.load(folder, group)).__module__.startswith("transformers.models.olmoe")
        barrier(comm)
        if comm.rank == 0:
            edit_json(folder / CONFIG, model_type="evil")
        barrier(comm)
        with pytest.raises(ConfigError, match="model_type = 'evil'"):
            hpcmoe.hf.load(folder, group)
    assert not (shared / "has run").exists()


@pytest.mark.mpi
def test_a_file_that_is_cut_while_it_is_read_is_one_line_on_all_ranks(comm, shared):
    folder = save(comm, shared / "saved", make_model("olmoe"))
    with open_group(comm) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group)
        barrier(comm)
        if comm.rank == 0:
            os.truncate(folder / ONE, 50_000)
        barrier(comm)
        with pytest.raises(CheckpointError, match=rf"{ONE}: has no byte [0-9]+: was cut while it was read"):
            prepared.read()


@pytest.mark.mpi
def test_the_cache_of_the_hub_is_a_folder_of_links_that_are_followed(comm, shared):
    blobs, folder = shared / "models--a--b" / "blobs", shared / "models--a--b" / "snapshots" / "0123"
    save(comm, folder, make_model("olmoe"), "20KB")
    if comm.rank == 0:
        blobs.mkdir()
        for file in list(folder.iterdir()):
            file.rename(blobs / file.name)
            file.symlink_to(f"../../blobs/{file.name}")
    barrier(comm)
    with open_group(comm) as group:
        assert hpcmoe.hf.load(folder, group).config.model_type == "olmoe"


def test_headers_spoilt_at_random_are_refused_or_read(tmp_path):
    """No error of another kind: a byte of the header is another, at each place of it."""
    path = tmp_path / ONE
    entries = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    put_together(path, entries | {"b": {"dtype": "I8", "shape": [], "data_offsets": [24, 25]}}, bytes(25))
    good, refused = path.read_bytes(), 0
    assert read_header(path).keys() == {"a", "b"}
    for place in range(len(good) - 25):
        for byte in (0, 34, 45, 57, 91, 125, 255):
            path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            try:
                read_header(path)
            except HpcmoeError as error:
                refused += 1
                assert "\n" not in str(error) and ONE in str(error)
    assert refused > 500
