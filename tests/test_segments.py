"""Before MPI starts: what killed ranks left is swept, what lives is spared, what blocks is named."""

import fcntl
import os
import sys
import time

import pytest
from launch import run
from mpi4py import MPI

from hpcmoe import output, segments

LONG_AGO = 1_000_000.0
REAL = segments.PROCESSES


def leave(folder, name, age=LONG_AGO):
    """Leave a segment in a folder, as old as given."""
    path = folder / name
    path.write_bytes(b"segment")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_nobody_holds_is_swept(tmp_path):
    for name in ("mpich_shm_eb421bf2_0", "mpich_vci_eb421bf2_0", "another"):
        leave(tmp_path, name)
    assert sorted(segments.remove_abandoned_segments(tmp_path)) == ["mpich_shm_eb421bf2_0", "mpich_vci_eb421bf2_0"]
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_what_is_open_is_spared(tmp_path):
    path = leave(tmp_path, "mpich_shm_1_0")
    with path.open():
        assert segments.remove_abandoned_segments(tmp_path) == []
    assert segments.remove_abandoned_segments(tmp_path) == ["mpich_shm_1_0"]


def test_what_is_mapped_is_spared_as_mpi_s_own_segment_is():
    own = [name for name in segments.list_segments(segments.SHM_FOLDER) if f"_{os.getpid():x}_" in name.name]
    segments.remove_abandoned_segments()
    assert all(path.exists() for path in own)


def test_maps_are_read_by_inode(tmp_path):
    path = leave(tmp_path, "mpich_shm_1_0")
    process = tmp_path / "processes" / "7"
    (process / "fd").mkdir(parents=True)
    line = f"7fec21391000-7fec21597000 rw-s 00000000 00:1b {{}}       {path}{{}}\n"
    maps = process / "maps"
    maps.write_text("7f00-7f01 r--p 00000000 00:1b 9 /usr/lib/x.so\n" + line.format(path.stat().st_ino, ""))
    assert segments.remove_abandoned_segments(tmp_path, tmp_path / "processes") == []
    maps.write_text(line.format(path.stat().st_ino + 1, " (deleted)"))  # one of the same name, unlinked before
    assert segments.remove_abandoned_segments(tmp_path, tmp_path / "processes") == ["mpich_shm_1_0"]


def test_a_process_that_ends_or_is_closed_to_us_is_passed_over(tmp_path):
    leave(tmp_path, "mpich_shm_1_0")
    (tmp_path / "processes" / "7").mkdir(parents=True)  # neither descriptors nor maps
    assert segments.remove_abandoned_segments(tmp_path, tmp_path / "processes") == ["mpich_shm_1_0"]


def test_what_appeared_since_this_process_began_is_spared(tmp_path):
    path = leave(tmp_path, "mpich_shm_1_0", age=0.0)
    assert segments.remove_abandoned_segments(tmp_path) == [] and path.exists()
    assert segments.remove_abandoned_segments(tmp_path, before=time.time() + 1) == ["mpich_shm_1_0"]
    assert 0 < segments.read_age(REAL) < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_another_user_s_are_spared(tmp_path, monkeypatch):
    path = leave(tmp_path, "mpich_shm_1_0")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert segments.remove_abandoned_segments(tmp_path) == [] and path.exists()


def test_without_the_lock_nothing_is_swept(tmp_path, monkeypatch):
    path = leave(tmp_path, "mpich_shm_1_0")
    monkeypatch.setattr(segments, "LOCK_SECONDS", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert segments.remove_abandoned_segments(tmp_path) == [] and path.exists()
    os.close(holder)


def test_where_there_is_no_shared_memory_nothing_is_done(tmp_path):
    assert segments.remove_abandoned_segments(tmp_path / "none") == []
    assert segments.find_foreign_segment(tmp_path / "none", {}) is None


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({"PMI_JOBID": "1.0", "PMI_RANK": "3"}, 0xEB421BF2),  # as seen under srun
        ({}, 7000),  # a process alone
        ({"PMI_RANK": "3", "PMI_FD": "9"}, None),  # under Hydra
        ({"PMIX_RANK": "3"}, None),
    ],
)
def test_a_world_s_number_is_estimated_as_mpich_does(environ, world):
    assert segments.compute_world_number(environ, 7000) == world


def test_mpich_s_own_name_of_a_process_alone_is_as_estimated():
    script = (
        "import os; from mpi4py import MPI; print(*[n for n in os.listdir('/dev/shm') if f'_{os.getpid():x}_' in n])"
    )
    if "MPICH" not in MPI.Get_library_version():
        pytest.skip("only MPICH names its segments so")
    assert run(sys.executable, "-c", script).output.startswith("mpich_shm_")


def test_another_user_s_segment_of_our_name_is_found(tmp_path, monkeypatch):
    path = leave(tmp_path, "mpich_shm_eb421bf2_1")
    environ = {"PMI_JOBID": "1.0"}
    assert segments.find_foreign_segment(tmp_path, environ) is None  # it is our own: swept, or held by a local peer
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert segments.find_foreign_segment(tmp_path, environ) == path
    assert segments.find_foreign_segment(tmp_path, {"PMI_JOBID": "2.0"}) is None


@pytest.mark.parametrize(("place", "speaks"), [("0", True), ("3", False)])
def test_what_blocks_is_named_once_with_the_cure(tmp_path, monkeypatch, capsys, place, speaks):
    path = leave(tmp_path, "mpich_shm_eb421bf2_1")
    monkeypatch.setattr(output, "DRAIN_SECONDS", 0.0)
    for key, value in {"SLURM_LOCALID": place, "PMI_JOBID": "1.0", "SLURMD_NODENAME": "node7"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as left:
        segments.exit_blocked(path)
    assert left.value.code == output.EXIT_USER
    said = capsys.readouterr().err
    assert said.count("\n") == said.count(f"hpcmoe: node7: {path} of user {path.stat().st_uid}, left by") == int(speaks)
    assert ("have its owner or root remove it, or submit the job anew" in said) is speaks
