"""Two runs never hold one lock; one whose holder is gone is cleared, and whoever holds it is named."""

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
from launch import HANG_SECONDS

from hpcmoe.errors import ConfigError
from hpcmoe.write import lock
from hpcmoe.write.lock import (
    LOCK,
    STALE_SECONDS,
    acquire_lock,
    heartbeat,
    holds_lock,
    make_holder,
    read_lock,
    read_process_start,
    release_lock,
    write_lock,
)


@pytest.fixture
def own():
    return make_holder()


@pytest.fixture
def elsewhere(own):
    """Describe a holder on another machine, in another job."""
    return dataclasses.replace(own, token="t", machine="other", host="node07", process=1, job="17", restarts="")


def leave(folder, holder, age_seconds=0.0):
    """Lay down the lock of a holder who gave a sign of life some time ago."""
    write_lock(folder / LOCK, holder)
    then = time.time() - age_seconds
    os.utime(folder / LOCK, (then, then))


def test_a_lock_taken_is_held_until_it_is_released(tmp_path, own):
    acquire_lock(tmp_path, own)
    assert read_lock(tmp_path / LOCK) == own and holds_lock(tmp_path, own)
    other = dataclasses.replace(own, token="t")
    release_lock(tmp_path, other)
    assert holds_lock(tmp_path, own) and not holds_lock(tmp_path, other)
    with pytest.raises(ConfigError) as error:
        acquire_lock(tmp_path, other)
    assert str(error.value) == (
        f"{tmp_path} is in use by process {os.getpid()} on {own.host} ({own.user}, since {own.since}): "
        f"wait for it or take another [run] name; if it is gone, remove {tmp_path}/{LOCK}"
    )
    release_lock(tmp_path, own)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"process": 2**22 + 1}, {"started": 5}], ids=["gone", "number recycled"])
def test_a_lock_whose_process_is_gone_is_cleared_at_once(tmp_path, own, change, caplog):
    leave(tmp_path, dataclasses.replace(own, token="t", **change))
    acquire_lock(tmp_path, own)
    assert holds_lock(tmp_path, own) and [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert "cleared; it was of process" in caplog.text and "that process is gone" in caplog.text


def test_a_dead_process_that_nobody_has_buried_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_process_start(process.pid) == 0 and read_process_start(os.getpid()) > 0
    process.wait()


def test_a_holder_elsewhere_is_believed_while_it_shows_signs_of_life(tmp_path, own, elsewhere):
    leave(tmp_path, elsewhere, age_seconds=100)
    with pytest.raises(ConfigError, match=r"process 1 on node07 \(.*, Slurm job 17, since .*last heartbeat, 1\d\d s"):
        acquire_lock(tmp_path, own)


def test_a_holder_elsewhere_without_a_sign_of_life_is_cleared(tmp_path, own, elsewhere, caplog):
    leave(tmp_path, elsewhere, age_seconds=STALE_SECONDS + 10)
    acquire_lock(tmp_path, own)
    assert holds_lock(tmp_path, own) and "no heartbeat for" in caplog.text


def test_a_job_that_was_requeued_takes_over_from_itself(tmp_path, own, elsewhere):
    leave(tmp_path, elsewhere)
    again = dataclasses.replace(own, job="17", restarts="1")
    acquire_lock(tmp_path, again)
    assert holds_lock(tmp_path, again)


def test_a_holder_knows_its_slurm_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert (make_holder().job, make_holder().restarts) == ("17", "2")


def test_another_step_of_the_same_job_is_refused(tmp_path, own, elsewhere):
    leave(tmp_path, elsewhere)
    with pytest.raises(ConfigError, match="Slurm job 17"):
        acquire_lock(tmp_path, dataclasses.replace(own, job="17"))


@pytest.mark.parametrize("text", ["of another program", "[]", '{"token": 1}', "\xff"])
def test_a_file_of_that_name_which_is_no_lock_is_never_removed(tmp_path, own, text, monkeypatch):
    monkeypatch.setattr(lock, "READ_SECONDS", 0.0)
    (tmp_path / LOCK).write_text(text)
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.raises(ConfigError, match="which its lock does not name"):
        acquire_lock(tmp_path, own)
    assert (tmp_path / LOCK).read_text() == text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_refused_as_a_lock_and_waited_for_by_none(tmp_path, own, make):
    make(tmp_path / LOCK)
    with pytest.raises(ConfigError, match=f"{LOCK} is no file that a run has made: remove it"):
        acquire_lock(tmp_path, own)
    assert not holds_lock(tmp_path, own)
    release_lock(tmp_path, own)
    assert os.path.lexists(tmp_path / LOCK)


def test_an_empty_lock_of_a_run_killed_as_it_made_it_is_cleared_in_time(tmp_path, own, monkeypatch):
    monkeypatch.setattr(lock, "READ_SECONDS", 0.0)
    (tmp_path / LOCK).touch()
    with pytest.raises(ConfigError, match="which its lock does not name"):
        acquire_lock(tmp_path, own)
    os.utime(tmp_path / LOCK, (0, 0))
    acquire_lock(tmp_path, own)
    assert holds_lock(tmp_path, own)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_holds_the_lock(tmp_path, own, stale):
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if stale:
            leave(folder, dataclasses.replace(own, token="old", process=2**22 + 1))
        start, taken = threading.Barrier(8), []

        def take(number, folder=folder, start=start, taken=taken):
            start.wait()
            try:
                acquire_lock(folder, dataclasses.replace(own, token=str(number)))
                taken.append(str(number))
            except ConfigError:
                pass

        threads = [threading.Thread(target=take, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert taken == [read_lock(folder / LOCK).token] and [path.name for path in folder.iterdir()] == [LOCK]


def test_what_a_process_killed_as_it_cleared_has_left_is_cleared_in_time(tmp_path, own):
    leave(tmp_path, dataclasses.replace(own, token="old", process=2**22 + 1))
    clearing = tmp_path / f"{LOCK}.clearing"
    clearing.touch()
    os.utime(clearing, (0, 0))
    acquire_lock(tmp_path, own)
    assert holds_lock(tmp_path, own) and [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_holder_shows_signs_of_life(tmp_path, own, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    leave(tmp_path, own, age_seconds=1000)
    with heartbeat(tmp_path, own):
        wait_for(lambda: time.time() - (tmp_path / LOCK).stat().st_mtime < 500)
    assert holds_lock(tmp_path, own)


def test_a_holder_whose_lock_was_taken_while_it_stood_still_ends(tmp_path, own, elsewhere, monkeypatch, caplog):
    ended = []
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock.os, "kill", lambda *how: ended.append(how))
    leave(tmp_path, elsewhere)
    monkeypatch.setattr(lock, "READ_SECONDS", 0.01)
    with heartbeat(tmp_path, own):
        wait_for(lambda: len(ended) == 2)  # a first Ctrl-C would write a checkpoint
    assert ended == 2 * [(os.getpid(), 2)] and "node07" in caplog.text
    release_lock(tmp_path, own)
    assert read_lock(tmp_path / LOCK) == elsewhere


def wait_for(condition):
    """Wait until a condition holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
