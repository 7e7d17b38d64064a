"""A rank that hangs is named with where it is and its stack, and all end in time; one that is busy is waited for."""

import re
import signal

import pytest
from launch import MPIRUN, Running, mpirun

PROGRAM = """
import os, re, signal, sys, time
from hpcmoe.mpi_library import import_mpi
MPI = import_mpi()
import hpcmoe.main
from hpcmoe.comm.window import Window
from hpcmoe.experts.layer import ExpertLayer
from hpcmoe.write import writer

def at_call(owner, name, number, act):
    # Have rank 1 call act before, or where that returns True in place of, one call of a function.
    original, calls = getattr(owner, name), []
    def counted(*arguments):
        calls.append(name)
        if MPI.COMM_WORLD.rank != 1 or len(calls) != number or not act():
            return original(*arguments)
    setattr(owner, name, counted)

case = sys.argv.pop(1)
at_call(writer, "save_checkpoint", 1, lambda: time.sleep(3.0))  # a slow disk is no hang
if case == "stopped":
    at_call(ExpertLayer, "compute", 60, lambda: os.kill(os.getpid(), signal.SIGSTOP))
elif case == "spinning":
    at_call(ExpertLayer, "compute", 60, lambda: re.match("(a+)+$", "a" * 60 + "b"))  # for ever, in native code
else:
    at_call(Window, "post", 200, lambda: True)
hpcmoe.main.main()
"""
LIBRARY = """
import sys, time
import torch, hpcmoe
from mpi4py import MPI

with hpcmoe.open(hang_seconds=1.0) as group:
    moe = hpcmoe.MoE(hidden=8, feed_forward=16, num_experts=4, top_k=2, group=group)
    time.sleep(2.0)  # nobody waits
    moe(torch.randn(6, 8))
    if group.rank == 1:
        time.sleep(1000)
    try:
        moe(torch.randn(6, 8))
    except hpcmoe.ClusterError as error:
        print(error, file=sys.stderr, flush=True)
        time.sleep(0.5)
        MPI.COMM_WORLD.Abort(7)
"""
ORPHANS = """
import time
from hpcmoe.mpi_library import import_mpi
import_mpi()
print("begun", flush=True)
time.sleep(1000)
"""
SMALL = [
    "-c", PROGRAM, "{case}", "inputs/run.toml",
    *(word for key in (
        "run.steps=100000", "train.validate_every=0", "data.validation_sequences=1", "write.checkpoint_every=3",
        "model.hidden=8", "model.feed_forward=8", "model.sequence_length=16", "data.batch_sequences=8",
        "data.files=['hpcmoe/*.py']", "restart.hang_seconds=2",
    ) for word in ("--set", key)),
]  # fmt: skip


@pytest.mark.parametrize("case", ["stopped", pytest.param("spinning", marks=pytest.mark.full)])
def test_a_rank_that_hangs_is_named_with_its_place_and_stack(tmp_path, case):
    ended = mpirun(
        2, *(word.format(case=case) if word == "{case}" else word for word in SMALL), "--set", f"run.output={tmp_path}"
    )
    place = r"in \w+ of layer \d, micro-batch \d, step \d+; process \d+ is "
    said = rf"hangs: it neither works nor waits since [\d:]+, for [23] s, {place}"
    named = [line for line in ended.lines("[rank 1 of 2, ") if re.search(said, line)]
    assert named and named[0].endswith("stopped by a signal" if case == "stopped" else "running"), ended
    assert [line for line in ended.lines("[rank 1 of 2, ") if re.search(r'  File ".*", line \d+ in train_step', line)]
    assert [line for line in ended.lines("[rank 0 of 2, ") if "ends with a rank that hangs: [rank 1 of 2, " in line]
    assert ended.status == 2 and not [line for line in ended.lines("[rank 0 of 2, ") if "] hangs" in line[:40]], ended


@pytest.mark.full  # test_stalls.py has a part of it
def test_a_message_that_is_lost_shows_whose_it_was(tmp_path):
    ended = mpirun(
        2,
        *(word.format(case="lost") if word == "{case}" else word for word in SMALL),
        "--set",
        f"run.output={tmp_path}",
    )
    said = (
        r"all ranks wait for each other, .* of layer \d, micro-batch \d, without rows of rank 1: a message is missing"
    )
    assert ended.status == 2 and re.search(said, ended.errors), ended


def test_in_a_library_the_others_get_an_error(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LIBRARY)
    ended = mpirun(2, script)
    assert ended.status == 7, ended
    (line,) = ended.lines("ends with a rank that hangs: [rank 1 of 2, ")
    assert line.endswith("is asleep") and re.search(
        r'rank 1 of 2, .*  File ".*train\.py", line \d+ in <mod', ended.errors
    )


@pytest.mark.parametrize("name", ["hydra_pmi_proxy", "mpirun"])
def test_the_ranks_end_with_what_has_started_them(tmp_path, name):
    running = Running(MPIRUN, "-n", 2, "python", "-c", ORPHANS)
    assert running.process.stdout.readline() == running.process.stdout.readline() == "begun\n"
    parents = [process for process in running.processes() if process.name() == name]
    if not parents:
        running.kill()
        pytest.skip("another MPI's launcher")
    parents[0].send_signal(signal.SIGKILL)
    ended = running.wait()  # AssertionError where a process is left
    assert ended.status != 0
