"""The state in memory outlives its ranks and any one host, and comes back whole or not at all."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import hpcmoe.write.mirror
from hpcmoe.errors import ClusterError
from hpcmoe.wait import barrier, broadcast
from hpcmoe.write.boxes import Piece, PieceSpec
from hpcmoe.write.mirror import bring_mirror, clear_mirrors, find_neighbours, has_newer_mirror, name_mirror, open_mirror
from hpcmoe.write.pieces import read_pieces
from hpcmoe.write.steps import list_checkpoints

ROWS = 1000


@pytest.mark.parametrize("hosts", ["a", "aabb", "abab", "aaabbc", "abcd"])
def test_each_file_is_kept_by_one_rank_of_the_next_host_if_there_is_one(hosts):
    near = [find_neighbours(hosts, rank) for rank in range(len(hosts))]
    names = sorted(set(hosts))
    for rank, own in enumerate(near):
        assert (own.keeper is None) == (len(names) == 1)
        if own.keeper is not None:
            assert hosts[own.keeper] == names[(names.index(hosts[rank]) + 1) % len(names)]
            assert rank in near[own.keeper].kept
    assert sum(len(own.kept) for own in near) == (len(hosts) if len(names) > 1 else 0)
    assert sum(own.is_first for own in near) == len(names)


@pytest.fixture
def run_folder(comm, tmp_path, monkeypatch):
    """Give the folder of a run whose ranks are on a host each, and what is left in memory afterwards is removed."""
    folder = Path(broadcast(comm, str(tmp_path) if comm.rank == 0 else None))
    monkeypatch.setattr(hpcmoe.write.mirror, "read_host_name", lambda: f"host{comm.rank}")
    yield folder
    shutil.rmtree(name_mirror(folder, f"host{comm.rank}"), ignore_errors=True)


class Died(Exception):
    """What ends a run in a test."""


def mirror_steps(comm, folder, steps):
    """Mirror an array, each rank a part of it, after some steps, and end by an error that all have."""
    spec = {"name": "weights", "shape": (comm.size * ROWS,), "start": (comm.rank * ROWS,)}
    with pytest.raises(Died), open_mirror(comm, folder, 1, 8 * ROWS) as mirror:
        for step in steps:
            array = np.full(ROWS, 100.0 * step + comm.rank)
            mirror.save(step, [Piece(array=array, **spec)], {"num_ranks": comm.size})
            while mirror.under_way is not None:
                mirror.poll()
        raise Died


def read_step(comm, folder, step):
    """Read the whole array of a step -> [ranks], a number of each rank's part."""
    spec = PieceSpec(name="weights", shape=(comm.size * ROWS,), start=(0,), extent=(comm.size * ROWS,))
    arrays, metadata = read_pieces(comm, folder / f"checkpoint-{step}", [spec])
    assert metadata["num_ranks"] == comm.size
    whole = arrays["weights", (0,)].reshape(comm.size, ROWS)
    assert (whole == whole[:, :1]).all()
    return whole[:, 0].tolist()


@pytest.mark.mpi
@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_mirror_outlives_its_run_and_any_one_host(comm, run_folder, lost):
    mirror_steps(comm, run_folder, [3, 4, 5])
    mirror = name_mirror(run_folder, f"host{comm.rank}")
    assert sorted(list_checkpoints(mirror)) == [4, 5]
    barrier(comm)
    if comm.rank == lost and comm.size > 1:
        shutil.rmtree(mirror)
    barrier(comm)
    assert has_newer_mirror(comm, run_folder)
    bring_mirror(comm, run_folder)
    assert read_step(comm, run_folder, 5) == [500.0 + rank for rank in range(comm.size)]
    assert not has_newer_mirror(comm, run_folder)


@pytest.mark.mpi
@pytest.mark.parametrize("damage", ["cut", "altered", "removed"])
def test_a_torn_mirror_gives_way_to_the_one_before(comm, run_folder, damage):
    mirror_steps(comm, run_folder, [3, 4])
    barrier(comm)
    torn = name_mirror(run_folder, f"host{comm.rank}") / "checkpoint-4"
    for path in torn.glob("rank*.h5"):
        if damage == "cut":
            os.truncate(path, 100)
        elif damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[::-1])
    barrier(comm)
    bring_mirror(comm, run_folder)
    assert sorted(list_checkpoints(run_folder)) == [3]
    assert read_step(comm, run_folder, 3) == [300.0 + rank for rank in range(comm.size)]
    assert not list(run_folder.glob("*.partial"))


@pytest.mark.mpi
def test_an_end_in_order_removes_the_mirror_and_a_new_run_does_not_see_an_old_one(comm, run_folder):
    mirror = name_mirror(run_folder, f"host{comm.rank}")
    mirror_steps(comm, run_folder, [3])
    assert mirror.is_dir()
    with open_mirror(comm, run_folder, 0, 0) as writer:
        assert writer is None and not mirror.exists()
    with open_mirror(comm, run_folder, 1, 8) as writer:
        assert mirror.is_dir() and not list_checkpoints(mirror)
    assert not mirror.exists()


@pytest.mark.mpi
def test_a_state_that_does_not_fit_is_refused_with_the_arithmetic(comm, run_folder):
    copies = 2 * (1 + (comm.size > 1))
    with (
        pytest.raises(ClusterError, match=rf"mirror_every: .* free, and two copies .* take {copies}e\+05 GB"),
        open_mirror(comm, run_folder, 1, 10**14),
    ):
        raise AssertionError("it was opened")


def test_another_users_folder_and_a_link_are_not_read_and_a_stale_mirror_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(hpcmoe.write.mirror, "MEMORY", tmp_path)
    own, stale, recent, link = (name_mirror(tmp_path, name) for name in "abcd")
    for path in (stale, recent):
        path.mkdir()
        (path / "alive").touch()
    os.utime(stale, (1, 1))
    link.symlink_to(recent)
    clear_mirrors(own)
    assert sorted(tmp_path.iterdir()) == sorted([recent, link])
    assert hpcmoe.write.mirror.list_mirrored(link) == {}
