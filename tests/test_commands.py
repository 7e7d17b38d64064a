"""The program as its user meets it: what it leaves, how it goes on, how it refuses, how it dies."""

import contextlib
import os
import signal
import socket
import sys
import time

import h5py
import numpy as np
import pytest
from launch import HANG_SECONDS, MPIRUN, ROOT, Running, mpirun, mpirun_several
from mpi4py import MPI

from hpcmoe.description import NOT_INSTALLED, find_version
from hpcmoe.errors import HpcmoeError
from hpcmoe.main import read_run_arguments, run

PROMPT_SECONDS = 20  # of processors, for what the program refuses
TINY = {
    "run.steps": "4",
    "model.sequence_length": "32",
    "data.batch_sequences": "16",
    "data.validation_sequences": "16",
    "train.validate_every": "2",
    "write.checkpoint_every": "2",
    "cluster.measure_seconds": "0.2",
}


def main_command(output, settings=(), *options):
    """Spell the program's arguments for a tiny run that writes under output."""
    chosen = {"run.output": str(output), **TINY, **dict(settings)}
    overrides = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    return ["-m", "hpcmoe.main", "inputs/run.toml", *overrides, *options]


def series(folder, name):
    """Read one metric of a run -> {step: value}."""
    with h5py.File(folder / "run" / "run.h5") as file:
        return dict(zip(file[name]["step"][:].tolist(), file[name]["value"][:].tolist(), strict=True))


@pytest.fixture(scope="module", params=[8, pytest.param(16, marks=pytest.mark.full)])
def big(request, tmp_path_factory):
    """Run the main job at many ranks once -> (its output folder, how it ended)."""
    folder = tmp_path_factory.mktemp("big")
    return folder, mpirun(request.param, *main_command(folder))


def test_the_main_job_ends_with_its_table_and_its_files(big):
    folder, ended = big
    assert ended.status == 0, ended
    for figure in ("tokens per second", "utilisation", "link balance sigma", "BW_min", "memory of a rank"):
        assert figure in ended.output, ended
    assert ended.lines("hpcmoe:") == [] and "Traceback" not in ended.errors, ended

    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (folder / "run" / "checkpoint-4" / "master.h5").is_file()
    losses = series(folder, "/train/loss")
    assert list(losses) == [1, 2, 3, 4]
    assert 4.0 < losses[1] < 7.0 and losses[4] < losses[1]  # an even guess over 256 bytes is 5.55 nats


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.full)])
def test_a_checkpoint_goes_on_with_the_same_losses_on_other_ranks(big, ranks, tmp_path):
    """And a rank without tokens takes part."""
    few = {"data.batch_sequences": 2, "data.validation_sequences": 1, "pipeline.micro_batches": 1}
    resume = main_command(tmp_path, {}, "--resume", big[0] / "run" / "checkpoint-2")
    mpirun_several(ranks, resume, main_command(tmp_path / "few", few))
    for name in ("/train/loss", "/train/validation_loss"):
        expected = {step: value for step, value in series(big[0], name).items() if step > 2}
        resumed = {step: value for step, value in series(tmp_path, name).items() if step > 2}
        assert list(resumed) == list(expected)
        np.testing.assert_allclose(list(resumed.values()), list(expected.values()), rtol=2e-5)
    losses = series(tmp_path / "few", "/train/loss")
    assert len(losses) == 4 and np.isfinite(list(losses.values())).all()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Run at two ranks whole, in two parts, from another seed, and inferring -> folder, what each printed."""
    folder = tmp_path_factory.mktemp("two")
    part = {"run.steps": 2, "train.learning_rate_warmup_steps": 20}
    return folder, mpirun_several(
        2,
        main_command(folder / "whole"),
        main_command(folder / "again", part),
        main_command(folder / "again", {}, "--resume"),
        main_command(folder / "seed", {"run.seed": 1}),
        main_command(folder / "infer", {"run.mode": "infer", "run.warmup_steps": 1}),
    )[1]


def test_a_seed_gives_the_same_losses_and_a_restart_too_bit_for_bit(two):
    folder, _ = two
    losses = {name: series(folder / name, "/train/loss") for name in ("whole", "again", "seed")}
    assert list(losses["whole"]) == [1, 2, 3, 4]
    assert losses["again"] == losses["whole"] and losses["seed"] != losses["whole"]


def test_inference_reports_its_throughput(two):
    folder, printed = two
    assert "tokens per second" in printed[-1]
    assert len(series(folder / "infer", "/run/tokens_per_second")) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.top_k": 0}, "[model] top_k = 0: must be"),
        ({"model.topk": 2}, "[model] topk = 2: unknown key; did you mean top_k?"),
        ({"modle.top_k": 2}, "[modle]: unknown section"),
        ({"model.num_experts": 4096, "model.hidden": 8192, "model.feed_forward": 32768}, "do not fit"),
        ({"cluster.memory_bytes_per_node": 100000}, "do not fit"),
        ({"parallel.tensor": 2}, "[parallel] tensor"),
        ({"data.files": '["/nowhere/*.txt"]'}, "/nowhere/*.txt"),
        ({"run.output": "/proc/nowhere"}, "[run] output"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_the_user_can_mend_is_one_line(settings, said, tmp_path):
    check_error(main_command(tmp_path, settings), said)


def test_what_is_in_the_way_or_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_error(["-m", "hpcmoe.main", "inputs/none.toml"], "inputs/none.toml: cannot be read: No such file")
    check_error(main_command(tmp_path, {}, "--resume"), "resume")
    (tmp_path / "run").write_text("in the way")
    check_error(main_command(tmp_path), "[run] output")


def check_error(command, said):
    """Check that the program, on a rank of its own in this process, has one line to say."""
    with pytest.raises(HpcmoeError) as error, contextlib.ExitStack() as opened:
        run(MPI.COMM_SELF, read_run_arguments([str(word) for word in command[2:]]), opened)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "settings", "said"),
    [
        (3, {"model.topk": 2}, "[model] topk = 2: unknown key"),
        (2, {"run.output": "/proc/nowhere"}, "[run] output"),
        (3, {"cluster.memory_bytes_per_node": 100000}, "do not fit"),
        pytest.param(
            16, {"parallel.tensor": 2, "parallel.expert": 12},
            "[parallel] expert = 12 must divide the 16 ranks", marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line_and_status_2(ranks, settings, said, tmp_path):
    check_refusal(mpirun(ranks, *main_command(tmp_path, settings)), said)


def check_refusal(ended, said):
    """Check that the program said one line, soon, and ended with status 2."""
    assert ended.status == 2, ended
    assert len(ended.lines("hpcmoe:")) == 1 and said in ended.lines("hpcmoe:")[0], ended
    assert "Traceback" not in ended.errors, ended
    assert ended.cpu_seconds < PROMPT_SECONDS, ended


def test_a_killed_rank_takes_all_down_and_is_named(tmp_path):
    running = Running(MPIRUN, "-n", 3, sys.executable, *main_command(tmp_path, {"run.steps": 1000000}))
    try:
        wait_for(lambda: len(list((tmp_path / "run").glob("checkpoint-*/master.h5"))) > 0)
        victim = next(p for p in running.processes() if rank_of(p) == "1")
        os.kill(victim.pid, signal.SIGKILL)
        ended = running.wait()
    finally:
        running.kill()
    assert ended.status != 0, ended
    named = f"[rank 1 of 3, {socket.gethostname()}]"
    assert any(str(victim.pid) in line for line in ended.lines(named)), ended


def test_a_package_that_only_lies_on_the_path_is_said_to_be_not_installed():
    assert find_version("numpy") == np.__version__
    assert find_version("no-such-package-lies-here") == NOT_INSTALLED


def rank_of(process):
    """Tell a process's rank, as its launcher told it; None for the launcher itself."""
    environment = process.environ()
    return environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))


def wait_for(condition, timeout_seconds=HANG_SECONDS):
    """Wait until a condition holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "has not come about"
        time.sleep(0.1)
