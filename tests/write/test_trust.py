"""Checkpoints that somebody altered, with sums made anew: one line, or numbers of their own; no other file is read."""

import contextlib
import json
import os
import random
import shutil

import h5py
import numpy as np
import pytest
import torch
from launch import ROOT
from mpi4py import MPI
from small import make_topology
from torch import nn

import hpcmoe
from hpcmoe.errors import CheckpointError
from hpcmoe.write.checksums import CHECKSUMS, compute_digest, write_checksums
from hpcmoe.write.problem import read_last_placement, read_loads, read_run_problem

SECRET = 31337.0
ARRAY, METADATA = "dense/weight/value", ("arrays", "optimizer", "extra", "num_ranks", "model_format")
NUM_DAMAGES, NUM_ALL = 40, 1000


def make_training():
    """Make a small model and an optimizer that has stepped."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def group():
    comm = MPI.COMM_SELF.Dup()
    with hpcmoe.open(comm, links=make_topology(1, 1), threads=1) as opened:
        yield opened
    comm.Free()


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """Save a checkpoint beside a file that nobody must read -> its folder."""
    folder = tmp_path_factory.mktemp("trust")
    np.full(64, SECRET, np.float32).tofile(folder / "secret.bin")
    with h5py.File(folder / "secret.h5", "w") as file:
        for name, shape in (("x", (3, 4)), ("dense/weight/value/0.0", (3, 4)), ("metadata/extra", ())):
            file.create_dataset(name, data=np.full(shape, SECRET, np.float32))
    group.save(folder / "saved", *make_training(), {"epoch": 1})
    return folder / "saved"


def point_away(folder, draw):
    """Have the master's array come from another file, or from another array."""
    with h5py.File(folder / "master.h5", "r+") as master:
        del master[ARRAY]
        layout = h5py.VirtualLayout((3, 4), np.float32)
        files = ("../secret.h5", str(folder.parent / "secret.h5"), ".", "rank0000.h5", "rank0001.h5")
        file, names = draw.choice(files), ("x", "dense/bias/value/0", "dense/weight/value/0.0")
        name = draw.choice(names[:2] if file == "rank0000.h5" else names)  # of its own file another
        layout[:] = h5py.VirtualSource(file, name, (3, 4), np.float32)
        master.create_virtual_dataset(ARRAY, layout)


def link_away(folder, draw):
    """Replace an entry by a link, outward or round in a circle."""
    file, names = draw.choice(
        [("master.h5", (ARRAY, "metadata/extra", "metadata", "files", "dense")), ("rank0000.h5", (f"{ARRAY}/0.0",))]
    )
    with h5py.File(folder / file, "r+") as opened:
        name = draw.choice(names)
        del opened[name]
        target = draw.choice([h5py.ExternalLink("../secret.h5", "/x"), h5py.SoftLink("/metadata/arrays"), opened["/"]])
        opened[name] = target


def store_elsewhere(folder, draw):
    """Keep an array's numbers in a raw file, or nowhere."""
    with h5py.File(folder / "rank0000.h5", "r+") as file:
        name = f"{ARRAY}/0.0"
        del file[name]
        match draw.randrange(4):
            case 0:
                external = [(str(folder.parent / "secret.bin"), 0, 48)]
                file.create_dataset(name, (3, 4), np.float32, external=external)
            case 1:
                file.create_dataset(name, (3, 4), np.float32)  # never written
            case 2:
                file.create_dataset(name, (3, 4), np.float32, chunks=(1, 4), compression="gzip")
            case 3:
                pass


def change_kind(folder, draw):
    """Give an array another dtype or shape, in one of the files."""
    with h5py.File(folder / "rank0000.h5", "r+") as file:
        del file[f"{ARRAY}/0.0"]
        shape = draw.choice([(3, 4), (4, 3), (12,), (3, 4, 1), (1, 1)])
        file.create_dataset(f"{ARRAY}/0.0", data=np.ones(shape, draw.choice(["f4", "f8", "i8", "S3", "V2"])))


def rename_files(folder, draw):
    """Name other files in the list, or say other sizes."""
    with h5py.File(folder / "master.h5", "r+") as master:
        entry = draw.choice(["name", "bytes"])
        del master[f"files/{entry}"]
        values = {
            "name": ["../secret.h5", "/etc/passwd", "rank0000.h5\0x", "", "rank0009.h5"],
            "bytes": [-1, 2**62, 0, float("nan")],
        }
        value = [draw.choice(values[entry])] * draw.choice([1, 1, 2])
        if entry == "name":
            master.create_dataset("files/name", data=[v.replace("\0", "") for v in value], dtype=h5py.string_dtype())
        else:
            master.create_dataset("files/bytes", data=np.array(value))


def change_metadata(folder, draw):
    """Remove a value of the metadata, or replace it by something else."""
    with h5py.File(folder / "master.h5", "r+") as master:
        name = f"metadata/{draw.choice(METADATA)}"
        text = master[name].asstr()[()] if h5py.check_string_dtype(master[name].dtype) else "1"
        del master[name]
        huge = json.dumps(
            {"dense/weight": {"dtype": "float32", "state": {"exp_avg": {"dtype": "int", "shape": [2**50]}}}}
        )
        strange = json.dumps({"dense/weight": {"dtype": "nn", "group": 0}})
        optimizer = json.dumps({"name": "AdamW", "groups": draw.choice([[], [1], {}, None, [{}, {}]])})
        values = ["", "{", "null", "[]", "3", "[" * 100_000, huge, strange, optimizer, text[:-1], text + " ", 7.5]
        if (value := draw.choice([None, *values])) is not None:
            master[name] = value


def flip_bytes(folder, draw):
    """Change some bytes of a file, or cut it short."""
    path = folder / draw.choice(["master.h5", "rank0000.h5"])
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 2, 8])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content[: draw.choice([len(content), len(content), draw.randrange(len(content))])])


def spoil_numbers(folder, draw):
    """Put numbers that are not finite where finite ones were."""
    with h5py.File(folder / "rank0000.h5", "r+") as file:
        file[f"{ARRAY}/0.0"][draw.randrange(3)] = draw.choice([np.nan, np.inf])


DAMAGES = (
    point_away, link_away, store_elsewhere, change_kind, rename_files, change_metadata, flip_bytes, spoil_numbers,
)  # fmt: skip


def make_sums_anew(folder, keep_sizes):
    """Write the sums of the files as they are now; and their sizes in the master, unless these are the damage."""
    if not keep_sizes:
        with h5py.File(folder / "master.h5", "r+") as master:
            master["files/bytes"][0] = os.path.getsize(folder / "rank0000.h5")
    names = [path.name for path in folder.iterdir() if path.name != CHECKSUMS]
    write_checksums(folder, {name: compute_digest(folder / name) for name in sorted(names)})


def check_damage(group, saved, folder, number):
    """Damage a checkpoint by one of the ways and load it: one line, or its own numbers."""
    draw = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    damage = DAMAGES[number % len(DAMAGES)]
    damage(folder, draw)
    make_sums_anew(folder, damage in (rename_files, flip_bytes, link_away))
    model, optimizer = make_training()
    try:
        group.load(folder, model, optimizer)
    except CheckpointError as error:
        assert "\n" not in str(error), number
        return True
    states = [
        entry for state in optimizer.state.values() for entry in state.values() if isinstance(entry, torch.Tensor)
    ]
    assert not any((tensor == SECRET).any() for tensor in [*model.parameters(), *states]), number
    return False


def test_altered_checkpoints_are_one_line_or_their_own_numbers(group, saved, tmp_path):
    refused = [check_damage(group, saved, saved.parent / "damaged", number) for number in range(NUM_DAMAGES)]
    assert NUM_DAMAGES * 0.6 < sum(refused) < NUM_DAMAGES  # a number that changed is only a number


@pytest.mark.full
def test_a_thousand_altered_checkpoints_are_too(group, saved):
    refused = [check_damage(group, saved, saved.parent / "damaged", number) for number in range(NUM_ALL)]
    assert sum(refused) > NUM_ALL // 2


@pytest.mark.parametrize("damage", [point_away, store_elsewhere, link_away])
def test_no_other_file_is_read_even_where_its_numbers_would_fit(group, saved, damage):
    for number in range(12):
        folder = saved.parent / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        damage(folder, random.Random(number))
        make_sums_anew(folder, damage is link_away)
        with pytest.raises(CheckpointError):
            group.load(folder, *make_training())


def test_numbers_that_are_not_finite_are_told(group, saved, caplog):
    folder = saved.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    spoil_numbers(folder, random.Random(0))
    make_sums_anew(folder, False)
    with caplog.at_level("WARNING"):
        group.load(folder, *make_training())
    assert f"{ARRAY} holds numbers that are not finite" in caplog.text


@pytest.mark.parametrize("read", [read_loads, read_last_placement, read_run_problem])
def test_a_record_with_links_elsewhere_is_one_line(tmp_path, read):
    shutil.copy(ROOT / "tests/old/run.h5", tmp_path / "run.h5")
    read(tmp_path / "run.h5")
    shutil.copy(ROOT / "tests/old/run.h5", tmp_path / "other.h5")
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        for group in ("experts", "cluster", "problem"):
            del file[group]
            file[group] = h5py.ExternalLink("other.h5", f"/{group}")
    with pytest.raises(CheckpointError, match=r"is a link to elsewhere, which is not followed"):
        read(tmp_path / "run.h5")


def test_a_record_of_random_bytes_is_one_line_or_read(tmp_path):
    whole = (ROOT / "tests/old/run.h5").read_bytes()
    for number in range(NUM_DAMAGES):
        draw, content = random.Random(number), bytearray(whole)
        for _ in range(4):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "run.h5").write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        for read in (read_loads, read_last_placement):
            with contextlib.suppress(CheckpointError):
                read(tmp_path / "run.h5")
