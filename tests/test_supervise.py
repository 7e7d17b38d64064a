"""A run whose ranks are started anew after a fault: on what is left, from what is whole, and not for ever."""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from faulted import read_losses, spell_run, wait_for_step
from launch import Running, mpirun, run

from hpcmoe.cluster.hosts import Host, Launch, find_launch, parse_hosts
from hpcmoe.config import Config
from hpcmoe.errors import ConfigError
from hpcmoe.sections import RestartConfig, RunConfig
from hpcmoe.supervise import (
    Attempt,
    Supervisor,
    end_processes,
    find_cause,
    find_lasting_error,
    list_processes,
    read_arguments,
)
from hpcmoe.write.mirror import name_mirror

DETERMINISTIC = {"run__steps": 30, "pipeline__deterministic": "true"}
DEATH = "[rank 1 of 2, h] 10:00:0{} process {} ended before its time, the first of this node's ranks: signal 9"


def find_process(running, word, rank=None):
    """Find a process of a command by a word of its command line, and its rank."""
    found = [p for p in running.processes() if word in " ".join(p.cmdline())]
    return next(p for p in found if rank is None or p.environ().get("PMI_RANK") == rank)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Give the losses of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("undisturbed")
    ended = mpirun(3, "-m", "hpcmoe.main", *spell_run(output, **DETERMINISTIC))
    assert ended.status == 0, ended
    return read_losses(output / "run")


@pytest.mark.parametrize(
    ("victim", "checkpoint_every", "mirror_every", "said"),
    [("rank", 100, 1, "rank 0 of 3"), ("launcher", 1, 0, "status 137")],
)
def test_a_run_survives_a_rank_and_its_launcher(victim, checkpoint_every, mirror_every, said, losses, tmp_path):
    every = {"write__checkpoint_every": checkpoint_every, "restart__mirror_every": mirror_every}
    words = spell_run(tmp_path, **DETERMINISTIC, **every)
    running = Running(sys.executable, "-m", "hpcmoe", "run", *words, "--restart", "2", "-n", "3")
    try:
        kept = name_mirror(tmp_path / "run", socket.gethostname()) if mirror_every else tmp_path / "run"
        wait_for_step(running, kept, 4)
        if victim == "rank":
            find_process(running, "hpcmoe.main", "0").kill()
        else:
            os.kill(next(p for p in running.processes() if p.name() in ("mpirun", "mpiexec.hydra")).pid, signal.SIGKILL)
        ended = running.wait()
    finally:
        running.kill()

    assert ended.status == 0, ended
    assert said in ended.lines("hpcmoe: start 1 ended")[0], ended
    assert ended.errors.count("resumed ") == 1 and ("brought from memory" in ended.errors) == (mirror_every > 0)
    assert np.array_equal(read_losses(tmp_path / "run"), losses)
    assert not kept.name.startswith("hpcmoe-mirror") or not kept.exists()


def make_supervisor(tmp_path, script, tries=3, **restart):
    """Make a supervisor whose launcher is a script; it sees how many starts there were in the file `starts`."""
    launcher = tmp_path / "mpirun"
    launcher.write_text(f'#!/bin/bash\ncd {tmp_path}; echo start "$@" >> starts; start=$(wc -l < starts)\n{script}\n')
    launcher.chmod(0o755)
    arguments, words = read_arguments(["run.toml", "-n", "2"])
    config = Config(run=RunConfig(output=str(tmp_path), name="run"), restart=RestartConfig(**restart))
    return Supervisor(arguments, config, Launch(program=str(launcher), ranks=2, words=tuple(words)), tries)


def count_starts(tmp_path):
    """Count the starts of a supervisor's ranks."""
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.mark.parametrize(
    ("script", "status", "starts", "said"),
    [
        ("exit 2", 2, 1, ""),
        ("exit 75", 75, 1, ""),
        ("exit 130", 130, 1, ""),
        ("[ $start = 1 ] && exit 137; exit 0", 0, 2, "no rank has said why"),
        ('echo "[rank 1 of 2, h$start] ValueError: token $start" >&2; exit 1', 1, 2, "the same error as before"),
        ('echo "[rank 0 of 2, h] Error" >&2; mkdir -p run/checkpoint-$start; exit 1', 1, 4, "3 tries are used up"),
        ('echo "[rank 1 of 2, h] rank 1 hangs: stopped" >&2; exit $((start == 1 ? 2 : 0))', 0, 2, "hangs: stopped"),
        ("kill -9 $$", 137, 3, "three starts in a row have come no further than step 0"),
    ],
)
def test_the_ranks_are_started_again_where_it_may_help(script, status, starts, said, tmp_path, capfd):
    assert make_supervisor(tmp_path, script).run() == status
    assert count_starts(tmp_path) == starts
    assert said in capfd.readouterr().err
    words = [line.split() for line in (tmp_path / "starts").read_text().splitlines()]
    assert ["--restarted" in line for line in words] == [number > 0 for number in range(starts)]


def test_a_signal_reaches_the_ranks_and_they_are_not_started_again(tmp_path):
    supervisor = make_supervisor(tmp_path, "trap 'exit 75' USR1; touch up; while true; do sleep 0.05; done")

    def ask():
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    assert supervisor.run() == 75
    assert count_starts(tmp_path) == 1


def test_a_signal_between_two_starts_ends_it(tmp_path):
    supervisor = make_supervisor(tmp_path, "exit 1")
    prepare_next = supervisor.prepare_next

    def prepare_and_ask(starts):
        os.kill(os.getpid(), signal.SIGTERM)
        prepare_next(starts)

    supervisor.prepare_next = prepare_and_ask
    assert supervisor.run() == 128 + signal.SIGTERM
    assert count_starts(tmp_path) == 1


def test_what_a_start_leaves_behind_is_ended(tmp_path):
    supervisor = make_supervisor(tmp_path, "setsid sleep 1000 & exit 0")
    assert supervisor.run() == 0
    assert not list_processes(supervisor.token)


def test_the_time_of_all_starts_counts(tmp_path):
    supervisor = make_supervisor(tmp_path, "[ $start = 1 ] && exit 9; exit 0", wall_seconds=1000.0)
    supervisor.begun -= 600
    supervisor.run()
    assert (
        "restart.wall_seconds=400.0" in (tmp_path / "starts").read_text()
        or "=399.0" in (tmp_path / "starts").read_text()
    )


def test_two_deaths_are_not_the_same_error_but_two_tracebacks_are():
    deaths = [Attempt(status=9, cause=DEATH.format(number, 100 * number), step=0) for number in (1, 2)]
    assert find_lasting_error(deaths) == ""
    errors = [Attempt(status=1, cause=f"[rank {rank} of 4, h] KeyError: 'x'", step=5) for rank in (1, 3)]
    assert find_lasting_error(errors).startswith("the same error as before")
    assert find_lasting_error([errors[0], Attempt(status=1, cause=errors[1].cause, step=6)]) == ""


def test_the_fault_is_the_first_death_whatever_the_others_say_of_it():
    death = DEATH.format(1, 7)
    lines = ["2026-12-01 10:00:00 step=3/40", death, "[rank 0 of 2, h] RuntimeError: lost", "srun: error: x", ""]
    assert find_cause(lines) == death
    assert find_cause([lines[0], lines[2], lines[3]]) == lines[2]
    assert find_cause([lines[0], lines[3]]) == "srun: error: x"
    assert find_cause([lines[0]]) == ""


def test_a_host_that_does_not_answer_is_left_out(tmp_path):
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\ncase "$*" in *b:1*) exit 1;; esac\n')
    launcher.chmod(0o755)
    launch = Launch(program=str(launcher), ranks=7, hosts=parse_hosts("a:4,b:2,c"), names_hosts=True, words=("-v",))
    left = launch.without_lost_hosts()
    assert left.format_command(["true"]) == [str(launcher), "-n", "5", "-hosts", "a:4,c:1", "-v", "true"]
    assert left.without_lost_hosts() is left
    few = Launch(program=str(launcher), ranks=3, hosts=launch.hosts, names_hosts=True)
    assert few.without_lost_hosts().ranks == 3  # no more than were asked for


def test_without_any_host_left_nothing_is_started(tmp_path, capfd):
    supervisor = make_supervisor(tmp_path, "exit 9")
    supervisor.launch = replace(supervisor.launch, hosts=parse_hosts("a,b"), names_hosts=True)
    assert supervisor.run() == 9
    assert "none of the hosts answers" in capfd.readouterr().err
    starts = (tmp_path / "starts").read_text().splitlines()
    assert sum("hpcmoe.main" in line for line in starts) == 1  # the others ask the hosts


def test_a_process_that_nothing_ends_holds_up_no_start(monkeypatch, capfd):
    class Stuck:
        pid = 4711

        def kill(self):
            """Do nothing, as for a process in a call that no signal ends."""

    monkeypatch.setattr("hpcmoe.supervise.list_processes", lambda token: [Stuck()])
    monkeypatch.setattr("hpcmoe.supervise._LEAVE_SECONDS", 0.1)
    end_processes("token")
    assert "not ended by SIGKILL, and left: process 4711" in capfd.readouterr().err


def test_a_node_that_slurm_calls_down_is_left_out(tmp_path, monkeypatch):
    for name, text in {
        "srun": "",
        "sinfo": "n1 allocated\nN2 down*\nn3 mixed\nn4 idle*",
        "scontrol": "n1\nN2\nn3\nn4",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<E\n{text}\nE\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "n[1-4]", "TASKS_PER_NODE": "4(x3),2", "NTASKS": "14"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    launch = find_launch(None, None, "", [])
    assert launch.format_command([])[1:] == ["--kill-on-bad-exit=1", "--ntasks=14"]
    left = launch.without_lost_hosts()
    assert left.hosts == (Host(name="n1", ranks=4), Host(name="n3", ranks=4))
    assert left.format_command([])[1:] == ["--kill-on-bad-exit=1", "--ntasks=8", "--nodes=2", "--nodelist=n1,n3"]


def test_open_mpi_is_told_its_hosts_in_its_own_words(tmp_path):
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\necho "mpirun (Open MPI) 5.0.11"\n')
    launcher.chmod(0o755)
    launch = Launch(program=str(launcher), ranks=2, hosts=parse_hosts("a,b"), names_hosts=True)
    assert launch.format_command([])[1:] == ["-n", "2", "--host", "a:1,b:1"]


@pytest.mark.parametrize("text", [":4", "a:0", "a:x", "a:4:4", "a:-1"])
def test_hosts_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="must be NAME or NAME:RANKS"):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ([], {}, "--ranks N: how many ranks?"),
        (["-n", "0"], {}, "--ranks 0: must be 1 or more"),
        (["-n", "2"], {"PMI_RANK": "0"}, "call it without mpirun"),
        (["-n", "2", "--set", "run.steps=no"], {}, "[run] steps"),
        (["-n", "2", "--launch", "srun"], {"PATH": "/nowhere"}, "srun is not on the PATH"),
    ],
)
def test_what_the_user_is_to_correct_is_one_line_and_status_2(words, environment, said):
    ended = run(sys.executable, "-m", "hpcmoe", "run", "inputs/run.toml", "--restart", *words, **environment)
    assert ended.status == 2 and said in ended.errors and len(ended.errors.splitlines()) == 1, ended


def test_it_starts_without_mpi_numpy_or_torch():
    program = (
        "import sys, hpcmoe.supervise; print([m for m in ('mpi4py', 'numpy', 'torch', 'h5py') if m in sys.modules])"
    )
    assert run(shutil.which(sys.executable), "-c", program).output.strip() == "[]"
