"""Checkpoints of the program itself: taken up at any shape, killed at random moments, damaged and refused."""

import os
import random
import signal
import sys
import time

import numpy as np
import psutil
import pytest
from launch import MPIRUN, Running, mpirun, mpirun_several
from mpi4py import MPI
from test_commands import check_error, main_command, rank_of, series, wait_for

from hpcmoe.write.checkpoint import find_checkpoint
from hpcmoe.write.steps import list_checkpoints

MODEL = {
    "model.num_experts": 10, "model.hidden": 32, "model.feed_forward": 48, "experts.kind": "swiglu",
    "experts.bias": True, "write.asynchronous": True, "run.steps": 5, "write.checkpoint_every": 3,
    "dispatch.load_window_steps": 3,
}  # fmt: skip
SAVED = {
    "parallel.data": 2, "parallel.tensor": 2, "placement.replicate": True, "placement.spare_slots_per_rank": 1,
}  # fmt: skip
SHAPES = {  # by the number of ranks
    3: {"data 1, expert 3, tensor 1": {}},
    4: {
        "data 4, expert 1, tensor 1": {"parallel.data": 4},
        "data 1, expert 2, tensor 2, replicas": {
            "parallel.tensor": 2, "placement.replicate": True, "placement.spare_slots_per_rank": 2,
        },
    },
    8: {"data 1, expert 8, tensor 1": {}},
}  # fmt: skip
FULL = pytest.mark.full


def settings_of(shape):
    """The keys of a run at one parallel shape, as the command line takes them."""
    return {key: str(value).lower() for key, value in (MODEL | shape).items()}


@pytest.fixture(scope="module", params=[8, pytest.param(16, marks=FULL)])
def saved(request, tmp_path_factory):
    """Run with data and tensor parallel 2, with replicas and experts that do not divide -> its output folder."""
    folder = tmp_path_factory.mktemp("saved")
    ended = mpirun(request.param, *main_command(folder, settings_of(SAVED)))
    assert ended.status == 0, ended
    return folder


@pytest.mark.parametrize("ranks", [3, 4, pytest.param(8, marks=FULL)])
def test_a_checkpoint_goes_on_at_any_other_shape(saved, ranks, tmp_path):
    """And data of another seed is told."""
    resume = "--resume", saved / "run" / "checkpoint-3"
    commands = [main_command(tmp_path / shape, settings_of(keys), *resume) for shape, keys in SHAPES[ranks].items()]
    other = main_command(tmp_path / "other", settings_of({}) | {"run.seed": 7, "run.steps": 4}, *resume)
    ended, _ = mpirun_several(ranks, *commands, other)
    assert ended.errors.count("not those that would have come: ") == 1, ended
    assert "not those that would have come: [run] seed = 7, was 0" in ended.errors, ended
    for shape in SHAPES[ranks]:
        for name in ("/train/loss", "/train/gradient_norm", "/train/validation_loss", "/dispatch/aux_loss"):
            expected = {step: value for step, value in series(saved, name).items() if step > 3}
            resumed = {step: value for step, value in series(tmp_path / shape, name).items() if step > 3}
            assert list(resumed) == list(expected) and expected, shape
            np.testing.assert_allclose(list(resumed.values()), list(expected.values()), rtol=2e-5, err_msg=shape)


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_goes_on(tmp_path):
    settings = {"run.steps": 4, "write.checkpoint_every": 2}
    assert mpirun(2, *main_command(tmp_path, settings)).status == 0
    path = tmp_path / "run" / "checkpoint-4" / "rank0001.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    longer = settings | {"run.steps": 6}
    option = f"--resume {tmp_path}/run/checkpoint-2"
    altered = f"{path} is altered: it does not match its checksum in SHA256SUMS; the one before it is there: {option}"
    check_error(main_command(tmp_path, longer, "--resume"), altered)
    ended = mpirun(2, *main_command(tmp_path, longer, *option.split()))
    assert ended.status == 0, ended
    assert list(series(tmp_path, "/train/loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(list_checkpoints(tmp_path / "run")) == [4, 6]
    assert find_checkpoint(MPI.COMM_SELF, path.parent) == path.parent  # written anew


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=FULL)])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_its_line(tmp_path, asynchronous):
    assert mpirun(1, *main_command(tmp_path, {"run.steps": 1, "write.checkpoint_every": 1})).status == 0
    (tmp_path / "run" / "checkpoint-2.partial").write_text("in the way")
    ended = mpirun(2, *main_command(tmp_path, {"write.asynchronous": asynchronous}, "--resume"))
    assert ended.status == 2 and "Traceback" not in ended.errors, ended
    (line,) = ended.lines("hpcmoe:")
    assert f"{tmp_path}/run/checkpoint-2.partial: cannot be written: Not a directory" in line


def test_a_rank_whose_files_may_not_grow_is_named(tmp_path):
    settings = {"write.asynchronous": "true", "run.steps": 1000000, "train.validate_every": 0}
    running = Running(MPIRUN, "-n", 2, sys.executable, *main_command(tmp_path, settings))
    try:
        wait_for(lambda: list_checkpoints(tmp_path / "run"))
        victim = next(p for p in running.processes() if rank_of(p) == "1")
        victim.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
        ended = running.wait()
    finally:
        running.kill()
    (line,) = ended.lines("hpcmoe:")
    assert (
        ended.status == 2 and "[rank 1 of 2] " in line and ".partial/rank0001.h5: cannot be written: File too" in line
    )
    assert find_checkpoint(MPI.COMM_SELF, tmp_path / "run").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=FULL)])
def test_kills_at_random_moments_each_go_on_from_a_whole_checkpoint(tmp_path, kills):
    moments, newest = random.Random(3), 0
    settings = {
        "write.asynchronous": "true", "write.checkpoint_every": 1, "run.steps": 1000000, "model.hidden": 128,
        "train.validate_every": 0,
    }  # fmt: skip
    for attempt in range(kills):
        options = ["--resume"] if attempt else []
        running = Running(MPIRUN, "-n", 2, sys.executable, *main_command(tmp_path, settings, *options))
        try:
            wait_for(lambda: max(list_checkpoints(tmp_path / "run"), default=0) > newest)  # noqa: B023
            time.sleep(moments.uniform(0, 1))
            victim = next(p for p in running.processes() if rank_of(p) == str(attempt % 2))
            os.kill(victim.pid, signal.SIGKILL)
            assert running.wait().status != 0
        finally:
            running.kill()
        for path in list_checkpoints(tmp_path / "run").values():
            assert find_checkpoint(MPI.COMM_SELF, path) == path
        newest = max(list_checkpoints(tmp_path / "run"))
    ended = mpirun(3, *main_command(tmp_path, settings | {"run.steps": newest + 2}, "--resume"))
    assert ended.status == 0, ended
    assert list(series(tmp_path, "/train/loss")) == list(range(1, newest + 3))
