"""Whatever happens to a file of a checkpoint is one line that names it, on all ranks, and offers another checkpoint."""

import os

import numpy as np
import pytest

from hpcmoe.errors import CheckpointError
from hpcmoe.wait import barrier
from hpcmoe.write.boxes import Piece
from hpcmoe.write.checkpoint import find_checkpoint, save_checkpoint
from hpcmoe.write.pieces import run_tasks


def save(comm, folder, *steps):
    """Save checkpoints of a thousand numbers a rank."""
    for step in steps:
        piece = Piece(name="w", shape=(comm.size, 1000), start=(comm.rank, 0), array=np.full((1, 1000), step, np.int32))
        run_tasks(save_checkpoint(comm, folder, step, [piece], {"step": step}, keep=10))


def alter(path, at=-2000):
    """Flip one bit, so many bytes from the end or the beginning."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change_digit(path):
    """Make the first digit of a list of checksums another one."""
    content = path.read_text()
    path.write_text(("1" if content[0] == "0" else "0") + content[1:])


def error_of(comm, where):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(comm, where)
    assert error.value.shared and "\n" not in str(error.value)
    return str(error.value)


DAMAGE = {
    "altered": (lambda path: alter(path), "is altered: it does not match its checksum in SHA256SUMS"),
    "cut short": (lambda path: os.truncate(path, 1000), " bytes, "),
    "longer": (lambda path: path.open("ab").write(b"x"), " were written"),
    "empty": (lambda path: os.truncate(path, 0), "is 0 bytes"),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_of_a_rank(comm, tmp_path, damage):
    save(comm, tmp_path, 60, 120)
    path = tmp_path / "checkpoint-120" / "rank0000.h5"
    spoil, said = DAMAGE[damage]
    spoil(path)
    message = error_of(comm, tmp_path)
    assert f"{path} " in message and said in message
    assert message.endswith(f"; the one before it is there: --resume {tmp_path}/checkpoint-60")
    assert find_checkpoint(comm, tmp_path / "checkpoint-60") == tmp_path / "checkpoint-60"


@pytest.mark.parametrize("name", ["master.h5", "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_master_or_list(comm, tmp_path, name, damage):
    save(comm, tmp_path, 60, 120)
    path = tmp_path / "checkpoint-120" / name
    if (name, damage) == ("SHA256SUMS", "altered"):
        change_digit(path)  # of the master's own checksum
    elif (name, damage) == ("SHA256SUMS", "cut short"):
        os.truncate(path, 100)
    else:
        DAMAGE[damage][0](path)
    message = error_of(comm, tmp_path)
    named = path.with_name("master.h5") if (name, damage) == ("SHA256SUMS", "altered") else path
    assert str(named) in message and message.endswith(f"--resume {tmp_path}/checkpoint-60"), message


@pytest.mark.parametrize("at", [0, 8, 100, 1500, -1])
def test_no_byte_of_a_master_goes_unnoticed(comm, tmp_path, at):
    save(comm, tmp_path, 1)
    alter(tmp_path / "checkpoint-1" / "master.h5", at)
    assert error_of(comm, tmp_path).endswith("is altered: it does not match its checksum in SHA256SUMS; "
                                             "there is no other that can be read")  # fmt: skip


def test_the_last_whole_one_before_is_offered_else_the_first_after(comm, tmp_path):
    save(comm, tmp_path, 10, 20, 30, 40)
    alter(tmp_path / "checkpoint-30" / "rank0000.h5")
    os.truncate(tmp_path / "checkpoint-20" / "rank0000.h5", 100)
    assert error_of(comm, tmp_path / "checkpoint-30").endswith(f"before it is there: --resume {tmp_path}/checkpoint-10")
    (tmp_path / "checkpoint-10" / "master.h5").unlink()
    assert error_of(comm, tmp_path / "checkpoint-30").endswith(f"after it is there: --resume {tmp_path}/checkpoint-40")


def test_the_offer_is_a_path_from_here(comm, tmp_path, monkeypatch):
    save(comm, tmp_path / "out" / "run", 1, 2)
    alter(tmp_path / "out" / "run" / "checkpoint-2" / "rank0000.h5")
    monkeypatch.chdir(tmp_path)
    assert error_of(comm, "out/run").endswith("--resume out/run/checkpoint-1")
    monkeypatch.chdir(tmp_path / "out" / "run" / "checkpoint-2")
    assert error_of(comm, ".").endswith(f"--resume {tmp_path}/out/run/checkpoint-1")


@pytest.mark.mpi
def test_every_rank_learns_which_file_another_found_altered(comm, shared):
    save(comm, shared, 60, 120)
    paths = [shared / "checkpoint-120" / f"rank{rank:04d}.h5" for rank in range(comm.size)]
    for path in paths:
        content = path.read_bytes()
        barrier(comm)
        if comm.rank == 0:
            alter(path)
        barrier(comm)
        message = error_of(comm, shared)
        assert message.startswith("[rank ") and f"] {path} is altered" in message
        assert message.endswith(f"--resume {shared}/checkpoint-60")
        barrier(comm)
        if comm.rank == 0:
            path.write_bytes(content)
        barrier(comm)
    assert find_checkpoint(comm, shared) == shared / "checkpoint-120"
