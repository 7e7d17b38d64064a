"""A run's folder takes a run at a time; what is there is moved where it is a run's, and never removed."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading

import h5py
import numpy as np
import pytest

from hpcmoe.errors import CheckpointError, ConfigError, on_all
from hpcmoe.interrupts import Interrupted
from hpcmoe.write import pieces
from hpcmoe.write.boxes import Piece
from hpcmoe.write.folder import MARK, open_folder
from hpcmoe.write.lock import LOCK
from hpcmoe.write.writer import open_writer

OWN = {MARK, LOCK}


def write_run(comm, output, name, text, resume=False):
    """Have a run leave a text in its record's place -> its folder."""
    with open_folder(comm, str(output), name, resume) as folder:
        (folder / "run.h5").write_text(text)
        (folder / "topology.json").write_text("{}")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def read_all(output):
    """Read the records under a folder -> {folder's path: text}."""
    return {str(path.parent.relative_to(output)): path.read_text() for path in output.rglob("run.h5")}


def refuse(comm, output, name="a"):
    """Open a folder that is refused -> the line."""
    with pytest.raises(ConfigError) as error, open_folder(comm, str(output), name, resume=False):
        pass
    assert error.value.shared and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_made_with_its_parents_and_marked(comm, tmp_path):
    with open_folder(comm, str(tmp_path / "x" / "out"), "a", resume=False) as folder:
        assert folder == tmp_path / "x" / "out" / "a" and names(folder) == OWN
    assert names(folder) == {MARK} and json.loads((folder / MARK).read_text())["run"] == "a"


def test_ten_runs_of_a_name_are_all_kept_by_number(comm, tmp_path, caplog):
    caplog.set_level("INFO")
    for run in range(11):
        folder = write_run(comm, tmp_path, "a", f"run {run}")
    expected = {"a": "run 10"} | {f"a.{run + 1}": f"run {run}" for run in range(10)}
    assert read_all(tmp_path) == expected and names(folder) == {MARK, "run.h5", "topology.json"}
    assert f"the run that was in {folder} is now in {folder}.10" in caplog.text


def test_no_run_of_another_name_is_touched(comm, tmp_path):
    """Names that could be taken for those of what is moved."""
    for name in ("keep.previous", "keep.1", "keep.x", "keep"):
        write_run(comm, tmp_path, name, name)
    for again in range(3):
        write_run(comm, tmp_path, "keep", f"again {again}")
    found = read_all(tmp_path)
    assert {found.pop(f"keep{end}") for end in (".previous", ".1", ".x")} == {"keep.previous", "keep.1", "keep.x"}
    assert found == {"keep": "again 2", "keep.2": "keep", "keep.3": "again 0", "keep.4": "again 1"}


def test_a_run_that_is_killed_early_replaces_no_finished_one(comm, tmp_path):
    write_run(comm, tmp_path, "a", "finished")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), open_folder(comm, str(tmp_path), "a", resume=False) as folder:
            (folder / "topology.json").write_text("{}")
            _ = 1 / 0
    assert read_all(tmp_path) == {"a.1": "finished"} and names(tmp_path) == {"a", "a.1"}


@pytest.mark.parametrize("linked", ["run", "output", "both"])
def test_a_link_stays_one_and_all_runs_stay_where_it_points(comm, tmp_path, linked):
    scratch, out = tmp_path / "scratch", tmp_path / "home" / "out"
    (scratch / "a").mkdir(parents=True)
    out.parent.mkdir()
    if linked == "run":
        out.mkdir()
        (out / "a").symlink_to(scratch / "a")
    else:
        out.symlink_to("../scratch")
    if linked == "both":
        (scratch / "a").rmdir()
        (scratch / "real").mkdir()
        (scratch / "a").symlink_to("real")
    for run in range(4):
        write_run(comm, out, "a", str(run))
    real = "real" if linked == "both" else "a"
    kept = {path: text for path, text in read_all(scratch).items() if path != "a" or linked != "both"}
    assert kept == {real: "3", f"{real}.1": "0", f"{real}.2": "1", f"{real}.3": "2"}
    assert (out / "a" / "run.h5").read_text() == "3"
    assert (out / "a").is_symlink() == (linked != "output") and out.is_symlink() == (linked != "run")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EACCES])
def test_where_nothing_can_be_put_beside_the_folder_it_is_put_inside(comm, tmp_path, monkeypatch, number):
    """A folder that is mounted, has a quota of its own, or whose parent is another user's."""
    write_run(comm, tmp_path, "a", "first")
    rename = os.rename

    def refuse_outside(path, target):
        if target.parent.parent == tmp_path:
            raise OSError(number, os.strerror(number))
        rename(path, target)

    monkeypatch.setattr("pathlib.Path.rename", refuse_outside)
    for run in ("second", "third"):
        write_run(comm, tmp_path, "a", run)
    assert read_all(tmp_path) == {"a": "third", "a/a.1": "first", "a/a.2": "second"} and names(tmp_path) == {"a"}


def test_what_others_have_put_there_stays(comm, tmp_path):
    mine = {"notes.txt": "mine", "checkpoint-best": "mine", "run.h5.partial.bak": "mine", "a.partial": "mine"}
    (tmp_path / "a").mkdir()
    for name, text in mine.items():
        (tmp_path / "a" / name).write_text(text)
    for run in range(3):
        folder = write_run(comm, tmp_path, "a", str(run))
    assert names(folder) == {MARK, "run.h5", "topology.json", *mine}
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert names(tmp_path / "a.1") == {MARK, "run.h5", "topology.json"}


@pytest.mark.parametrize("name", ["run.h5", "topology.json", "checkpoint-3", "activations-3", "checkpoint-3.partial"])
def test_what_only_has_a_name_of_ours_is_not_touched(comm, tmp_path, name):
    (tmp_path / "a").mkdir()
    foreign = tmp_path / "a" / name
    foreign.write_text("mine") if "." in name and "partial" not in name else foreign.mkdir()
    assert refuse(comm, tmp_path) == (
        f"[run] name = 'a': {tmp_path}/a holds {name}, and nothing shows that hpcmoe wrote it; "
        "take another name, or move it"
    )
    assert names(tmp_path / "a") == {name}


@pytest.mark.parametrize("text", ["[]", "7", '"bytes_per_second, hpcmoe"', "null", "[" * 3000, "\xff"])
@pytest.mark.parametrize("name", [MARK, "topology.json"])
def test_whatever_another_program_wrote_by_that_name_is_not_touched(comm, tmp_path, name, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text(text)
    assert f"holds {name}, and nothing shows that hpcmoe wrote it" in refuse(comm, tmp_path)
    assert (tmp_path / "a" / name).read_text() == text


def test_links_that_were_given_to_a_folder_do_not_make_its_results_ours(comm, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "topology.json").write_text('{"bytes_per_second": []}')
    with h5py.File(tmp_path / "a" / "run.h5", "w") as mine:
        mine["run"] = 1
    assert "nothing shows that hpcmoe wrote it" in refuse(comm, tmp_path)
    assert names(tmp_path / "a") == {"topology.json", "run.h5"}


def test_a_pipe_of_that_name_is_not_waited_for(comm, tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "topology.json")
    assert "nothing shows that hpcmoe wrote it" in refuse(comm, tmp_path)


@pytest.mark.parametrize("kept", ["record", "checkpoint"])
def test_a_run_from_before_the_mark_is_known_by_its_files(comm, tmp_path, kept):
    (tmp_path / "a" / "checkpoint-2").mkdir(parents=True)
    if kept == "record":
        with h5py.File(tmp_path / "a" / "run.h5", "w") as file:
            file["run/config"] = "[run]"
    else:
        with h5py.File(tmp_path / "a" / "checkpoint-2" / "master.h5", "w") as file:
            file.create_group("files")
    before = names(tmp_path / "a")
    with open_folder(comm, str(tmp_path), "a", resume=False) as folder:
        assert names(folder) == OWN
    assert names(tmp_path / "a.1") == before


def test_resume_keeps_the_folder_and_marks_it(comm, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.h5").write_text("x")
    with open_folder(comm, str(tmp_path), "a", resume=True) as folder:
        assert names(folder) == {"run.h5", *OWN}


def test_resume_of_nothing(comm, tmp_path):
    with (
        pytest.raises(CheckpointError, match="no run to resume"),
        open_folder(comm, str(tmp_path), "a", resume=True),
    ):
        pass
    assert names(tmp_path) == set()


@pytest.mark.parametrize("error", [Interrupted(2), SystemExit(), ZeroDivisionError()])
def test_whatever_ends_a_run_leaves_nothing_half_done_and_no_lock(comm, tmp_path, error):
    with pytest.raises(type(error)), open_folder(comm, str(tmp_path), "a", resume=False) as folder:
        for name in ("checkpoint-4.partial", "checkpoint-2.old.partial", "activations-4.partial"):
            (folder / name).mkdir()
            (folder / name / "rank0000.h5").write_text("half")
        for name in ("run.h5.partial", "topology.json.part", "run.h5"):
            (folder / name).write_text("half")
        raise error
    assert names(folder) == {MARK, "run.h5"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_as_a_checkpoint_is_written_leaves_the_one_before_it(comm, tmp_path, monkeypatch, asynchronous):
    write_file, begun, late = pieces.write_rank_file, threading.Event(), threading.Event()

    def piece():
        yield Piece(name="w", shape=(3,), start=(0,), array=np.ones(3))

    def interrupt(path, held):
        (path.parent / "half.h5").write_text("half")
        begun.set()
        if not asynchronous:
            raise Interrupted(2)
        late.wait()
        return write_file(path, held)

    with (
        pytest.raises(Interrupted),
        open_folder(comm, str(tmp_path), "a", resume=False) as folder,
        open_writer(comm, folder, 2, asynchronous) as writer,
    ):
        writer.save(1, piece(), {"step": 1})
        writer.finish()
        monkeypatch.setattr(pieces, "write_rank_file", interrupt)
        writer.save(2, piece(), {"step": 2})
        begun.wait()
        raise Interrupted(2)
    late.set()  # a thread that goes on until all are aborted finds no folder to write to
    assert names(folder) == {MARK, "checkpoint-1"}
    with pytest.raises(CheckpointError, match="cannot be written"):
        if asynchronous:
            writer.under_way[1].result()
        write_file(folder / "checkpoint-2.partial" / "x.h5", [*piece()])
    assert names(folder) == {MARK, "checkpoint-1"}


def test_a_folder_that_a_thread_still_fills_is_swept(comm, tmp_path, monkeypatch):
    remove, late = shutil.rmtree, []

    def remove_late(path):
        if not late:
            late.append(True)
            raise OSError(errno.ENOTEMPTY, "a file came meanwhile")
        remove(path)

    monkeypatch.setattr("shutil.rmtree", remove_late)
    with pytest.raises(Interrupted), open_folder(comm, str(tmp_path), "a", resume=False) as folder:
        (folder / "checkpoint-4.partial").mkdir()
        raise Interrupted(2)
    assert names(folder) == {MARK}


@pytest.mark.parametrize("in_the_way", ["out", "out/a"])
def test_file_in_the_way(comm, tmp_path, in_the_way):
    path = tmp_path / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    assert refuse(comm, tmp_path / "out") == (
        f"[run] output = '{tmp_path}/out': {tmp_path}/out/a cannot be written: File exists"
    )
    assert path.read_text() == "precious"


@pytest.mark.parametrize("target", ["gone", "a"])
def test_a_link_to_nothing_or_to_itself(comm, tmp_path, target):
    (tmp_path / "a").symlink_to(target)
    said = f"[run] output = '{{}}': {tmp_path}/a is a link to {target}, which is not there"
    assert refuse(comm, tmp_path) == said.format(tmp_path)
    assert refuse(comm, tmp_path / "a", "b") == said.format(tmp_path / "a")
    assert os.readlink(tmp_path / "a") == target


def test_a_name_too_long(comm, tmp_path):
    assert refuse(comm, tmp_path, "a" * 300).endswith("cannot be written: File name too long")


def test_folder_that_cannot_be_made(comm):
    assert refuse(comm, "/proc/none/out").endswith("/proc/none/out/a cannot be written: No such file or directory")


def test_folder_on_a_full_disk(comm, small_disk):
    with pytest.raises(OSError) as full:
        (small_disk / "ballast").write_bytes(bytes(1 << 21))
    assert full.value.errno == errno.ENOSPC
    assert refuse(comm, small_disk).endswith("cannot be written: No space left on device")


def test_read_only_folder_loses_nothing(comm, small_disk):
    write_run(comm, small_disk, "a", "precious")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert refuse(comm, small_disk).endswith("cannot be written: Read-only file system")
    assert read_all(small_disk) == {"a": "precious"}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "a/", "a\0b"])
def test_name_that_is_no_plain_name(comm, tmp_path, name):
    (tmp_path / "out").mkdir()
    assert refuse(comm, tmp_path / "out", name) == f"[run] name = {name!r}: must be the plain name of a folder"
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == set()


@pytest.mark.mpi
def test_one_run_of_all_ranks_holds_the_folder_until_its_end(comm, shared):
    with open_folder(comm, str(shared), "a", resume=False) as folder:
        with (
            pytest.raises(ConfigError, match="is in use by process") as error,
            open_folder(comm, str(shared), "a", resume=True),
        ):
            pass
        assert error.value.shared and (folder / LOCK).exists()
        comm.Barrier()
    comm.Barrier()
    assert names(folder) == {MARK}


@pytest.mark.mpi
def test_a_rank_that_fails_alone_tidies_up(comm, shared):
    last = comm.size - 1
    with contextlib.suppress(Interrupted), open_folder(comm, str(shared), "a", resume=False) as folder:
        comm.Barrier()
        if comm.rank == last:
            (folder / "checkpoint-4.partial").mkdir()
            raise Interrupted(15)
        comm.Barrier()
    if comm.rank == last:
        assert names(folder) == {MARK}
        comm.Barrier()
    on_all(comm, lambda: None)


@pytest.mark.mpi
def test_all_ranks_learn_that_the_folder_cannot_be_written(comm):
    assert "cannot be written" in refuse(comm, "/proc/none")


@pytest.mark.mpi
def test_folder_that_one_rank_does_not_see(comm, shared, monkeypatch):
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(
            "hpcmoe.write.folder.check_shared_folder", lambda *_: (_ for _ in ()).throw(ConfigError("gone"))
        )
    said = refuse(comm, shared)
    assert said == f"[rank {comm.size - 1} of {comm.size}] gone"
    comm.Barrier()
    assert names(shared / "a") == {MARK}
