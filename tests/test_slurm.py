"""The main job on clusters: four nodes of a real Slurm, and four hosts with shaped links between them."""

import dataclasses
import os
import signal
import sys
import time

import numpy as np
import pytest
from lab.machines import LAB, racks, slurm
from launch import HANG_SECONDS, MPIRUN, ROOT, Running, run
from test_commands import series, wait_for

from hpcmoe.cluster.topology import Topology, load_topology
from hpcmoe.segments import SHM_FOLDER, compute_world_number

SHORT = ["--set", "run.steps=2", "--set", "data.batch_sequences=16", "--set", "data.validation_sequences=16"]
INSIDE_RACK, BETWEEN_RACKS = 500e6 / 8, 50e6 / 8  # bytes a second: what a busy machine carries too
BUSY = 4  # load of a core; the test alone makes half of it
REQUEUED_RANKS = 4
FORGET_SECONDS = 15.0
TRIES = 3  # to start a requeued job
REQUEUED = "; ".join(
    [
        "import sys, time",
        "from hpcmoe.segments import clear_segments",
        "clear_segments()",
        "from mpi4py import MPI",
        "print(MPI.COMM_WORLD.size, flush=True)",
        "time.sleep(int(sys.argv[1]))",
    ]
)
REQUEUED_JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --requeue --open-mode=append
export PYTHONPATH={root}
srun --kill-on-bad-exit=1 {python} -c "{start}" $([ "$SLURM_RESTART_COUNT" ] && echo 0 || echo 600) || true
"""


@pytest.fixture(scope="module")
def slurm_conf():
    with slurm() as path:
        yield path


@pytest.fixture
def hosts():
    with racks(INTRA="500mbit", INTER="50mbit") as names:
        yield names


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("launch", "ranks"), [("srun", 8), ("mpirun", 4), pytest.param("srun", 16, marks=pytest.mark.full)]
)
def test_sbatch_runs_the_job_on_four_nodes_in_two_racks(slurm_conf, launch, ranks, tmp_path):
    log = tmp_path / "log"
    job = ["jobs/ep16.slurm", *SHORT, "--set", f"run.output={tmp_path}"]
    state = submit(f"--ntasks-per-node={ranks // 4}", f"--output={log}", *job, SLURM_CONF=slurm_conf, LAUNCH=launch)

    assert state == "COMPLETED", f"{state}\n{log.read_text() if log.exists() else 'no output'}"
    assert f"{ranks} ranks on 4 nodes in 2 racks" in log.read_text(), log.read_text()
    topology = load_topology(tmp_path / "run" / "topology.json")
    assert topology.node_names == ("node0", "node1", "node2", "node3")
    assert topology.rack_of_node.tolist() == [0, 0, 1, 1]
    assert np.bincount(topology.node_of_rank).tolist() == [ranks // 4] * 4


@pytest.mark.slurm
def test_a_job_whose_ranks_were_killed_may_be_requeued(slurm_conf, tmp_path):
    log, script = tmp_path / "log", tmp_path / "job.sh"
    script.write_text(REQUEUED_JOB.format(root=ROOT, python=sys.executable, start=REQUEUED))
    number = run("sbatch", "--parsable", f"--output={log}", script, SLURM_CONF=slurm_conf).output.strip()
    world = compute_world_number({"PMI_JOBID": f"{number}.0"}, 0)

    def control(*words):
        return run("scontrol", *words, SLURM_CONF=slurm_conf).output

    def is_over():
        return "JobState=COMPLETED" in control("show", "job", number)

    # Kill the ranks of the first start.
    wait_for(lambda: count_started(log) == REQUEUED_RANKS)
    run("scancel", f"--signal={signal.SIGKILL.value}", f"{number}.0", SLURM_CONF=slurm_conf)
    wait_for(is_over)

    # Leave their segments, which other starts on this machine may have swept by now. Slurm lets a requeued job wait for
    # two minutes unless it is told otherwise, and its PMI-2 loses a start at times.
    for _ in range(TRIES):
        for node in range(2):
            (SHM_FOLDER / f"mpich_shm_{world:x}_{node}").touch()
        control("requeue", number)
        wait_for(lambda: (control("update", f"jobid={number}", "starttime=now"), is_over())[1])
        if count_started(log) > REQUEUED_RANKS or "failed to send temp kvs" not in log.read_text():
            break
    assert count_started(log) == 2 * REQUEUED_RANKS, log.read_text()


@pytest.mark.slurm
def test_a_job_that_slurm_signals_before_its_time_is_over_is_queued_again_and_goes_on(slurm_conf, tmp_path):
    log, steps = tmp_path / "log", 150
    keys = {"run.steps": steps, "run.output": tmp_path, "write.checkpoint_every": 20, "train.validate_every": 0}
    words = [*SHORT, *(word for key, value in keys.items() for word in ("--set", f"{key}={value}"))]
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    number = run("sbatch", "--parsable", *options, "jobs/ep16.slurm", *words, SLURM_CONF=slurm_conf).output.strip()

    # Signal the script, as Slurm does two minutes before the time is over, once there is a checkpoint.
    wait_for(lambda: (tmp_path / "run" / "checkpoint-20").exists())
    run("scancel", "--batch", "--signal=USR1", number, SLURM_CONF=slurm_conf)
    wait_for(lambda: "ended in order" in log.read_text())

    # A requeued job waits for two minutes unless it is told otherwise: its nodes have to forget its first start.
    def has_state(state):
        return find_state(number, {"SLURM_CONF": slurm_conf}) == state

    wait_for(lambda: has_state("PENDING"))
    time.sleep(FORGET_SECONDS)
    run("scontrol", "update", f"jobid={number}", "starttime=now", SLURM_CONF=slurm_conf)
    wait_for(lambda: has_state("COMPLETED"))
    assert "resumed" in log.read_text() and "(exit status 75)" in log.read_text(), log.read_text()
    assert list(series(tmp_path, "train/loss")) == list(range(1, steps + 1)) and not (tmp_path / "run.1").exists()


def count_started(log):
    """Count the ranks that have told how many they are."""
    return log.read_text().splitlines().count(str(REQUEUED_RANKS)) if log.exists() else 0


def submit(*arguments, **environment):
    """Give Slurm a job and see it to its end, which `sbatch --wait` tells up to half a minute late -> its state."""
    sbatch = Running("sbatch", "--parsable", *arguments, **environment)
    number, refusal = sbatch.process.communicate(timeout=HANG_SECONDS)
    assert sbatch.process.returncode == 0, refusal
    number = number.strip()
    deadline = time.monotonic() + HANG_SECONDS
    while (state := find_state(number, environment)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, state
        time.sleep(1.0)
    sbatch.sweep()
    return state


def find_state(number, environment):
    """Ask Slurm for the state of a job."""
    told = run("scontrol", "--oneliner", "show", "job", number, **environment)
    assert told.status == 0, told
    return dict(word.split("=", 1) for word in told.output.split() if "=" in word)["JobState"]


@pytest.mark.racks
def test_links_ports_and_uplinks_are_measured_as_they_are_shaped(hosts, tmp_path):
    # Other work on this machine can only slow a link: of some measurements the best counts, and one may be enough.
    found = measure_over_racks(hosts, tmp_path)
    for _ in range(4):
        if all(np.allclose(*figures, rtol=0.15) for figures in compare(found)):
            break
        again = measure_over_racks(hosts, tmp_path)
        rates = [field.name for field in dataclasses.fields(Topology) if field.name.endswith("bytes_per_second")]
        better = {name: np.maximum(getattr(found, name), getattr(again, name)) for name in rates}
        found = dataclasses.replace(found, **better)
    assert found.node_names == tuple(hosts)
    assert all((measured <= 1.15 * shaped).all() for measured, shaped in compare(found))
    if os.getloadavg()[0] > BUSY * os.cpu_count():
        pytest.skip("other work on this machine keeps the hosts from filling their links")
    for figures in compare(found):
        np.testing.assert_allclose(*figures, rtol=0.15)


def compare(topology):
    """Pair what was found of links between hosts, ports and uplinks with what racks.sh has shaped."""
    same_rack = np.equal.outer(topology.rack_of_node, topology.rack_of_node)
    links = ~np.eye(4, dtype=bool)
    yield topology.bytes_per_second[links], np.where(same_rack, INSIDE_RACK, BETWEEN_RACKS)[links]
    yield topology.egress_bytes_per_second, np.full(4, INSIDE_RACK)
    yield topology.ingress_bytes_per_second, np.full(4, INSIDE_RACK)
    yield topology.uplink_bytes_per_second, np.full(2, BETWEEN_RACKS)


@pytest.mark.racks
@pytest.mark.parametrize(("full", "passed"), [((), 4), pytest.param(["--full"], 16, marks=pytest.mark.full)])
def test_every_way_between_hosts_equals_the_oracle(hosts, full, passed):
    """Two ranks on a host of each rack: a window within, and between them messages over a link that takes its time."""
    chosen = ["tests/run/test_oracle.py", *full, "-k", "every_way_in_every_order and not window"]
    tests = [sys.executable, "-m", "pytest", "-q", "--with-mpi", "-m", "mpi", *chosen]
    ended = run_on([f"{hosts[0]}:2", f"{hosts[2]}:2"], 4, *tests)
    assert ended.status == 0 and f"{passed} passed" in ended.output, ended


def run_on(hosts, num_ranks, *command):
    """Run a command on ranks of these hosts, which speak TCP alone -> Ended."""
    places = ["-launcher", "rsh", "-launcher-exec", LAB / "agent", "-hosts", ",".join(hosts), "-n", num_ranks]
    first = hosts[0].partition(":")[0]
    return run(LAB / "on", first, MPIRUN, *places, *command, UCX_TLS="tcp,self")


def measure_over_racks(hosts, folder):
    """Run the main job, a rank on each host -> the Topology that it found and wrote."""
    rack_key = 'cluster.racks=["left", "left", "right", "right"]'
    places = ["--set", f"run.output={folder}", "--set", rack_key, "--set", "cluster.measure_seconds=5.0"]
    main = [sys.executable, "-m", "hpcmoe.main", "inputs/run.toml", *SHORT, *places]
    ended = run_on(hosts, 4, *main)
    assert ended.status == 0, ended
    return load_topology(folder / "run" / "topology.json")
