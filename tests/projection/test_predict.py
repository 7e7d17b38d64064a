"""A step foretold: its order, its flows, its time against what can be computed by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT

from hpcmoe.config import read_config
from hpcmoe.projection.flows import Fabric, fill_progressively
from hpcmoe.projection.simulate import Work, simulate
from hpcmoe.projection.spread import sample_layers, spread_experts
from hpcmoe.projection.turns import list_ops, order_lanes


def work_of(kind, layers, batches, trains, far_bytes, compute=1.0, classes=2):
    """Classes that compute for a second an op of experts, and send each other bytes."""
    lanes = order_lanes(kind, layers, batches, 2, trains)
    stages = {op.stage for lane in lanes for op in lane}
    seconds = {stage: np.full((classes, layers), compute * (stage == "compute")) for stage in stages}
    others = (1 - np.eye(classes))[None].repeat(layers, 0)
    near = np.eye(classes)[None].repeat(layers, 0)
    return Work(
        lanes=lanes,
        seconds=seconds,
        near=near,
        far=others * far_bytes,
        far_rows=others,
        ranks_per_core=np.ones(classes),
    )


def pair_fabric(rate=1.0, latency=0.0):
    """Two classes with a link each way."""
    return Fabric(
        names=["a", "b"],
        rates=[rate, rate],
        uses={(0, 1): [(0, 1.0)], (1, 0): [(1, 1.0)]},
        latency={(0, 1): latency, (1, 0): latency},
    )


@pytest.mark.parametrize("kind", ["serial", "overlap", "arrival"])
@pytest.mark.parametrize("trains", [False, True])
def test_lanes_hold_every_op_once_and_keep_each_micro_batch_in_order(kind, trains):
    """Whatever the schedule, no op is lost, and a micro-batch's own order stays."""
    lanes = order_lanes(kind, 3, 5, 2, trains)
    ops = [op for lane in lanes for op in lane]
    assert sorted(map(str, ops)) == sorted(str(op) for number in range(5) for op in list_ops(3, number, trains))
    for number in range(5):
        for lane in lanes:
            mine = [op for op in lane if op.micro_batch == number]
            assert mine in ([], list_ops(3, number, trains))


def test_serial_step_is_the_sum_of_what_it_waits_for():
    """One micro-batch: half the rows are near, then the others come after 4 s, are computed, and go home in 4 s."""
    outcome = simulate(work_of("serial", 1, 1, False, 4.0), pair_fabric())
    assert outcome.seconds == pytest.approx(4 + 0.5 + 4)


@pytest.mark.parametrize("latency", [0.0, 0.25])
def test_latency_counts_once_each_way(latency):
    """A message takes its latency besides its bytes, there and back."""
    without = simulate(work_of("serial", 2, 1, False, 4.0), pair_fabric()).seconds
    assert simulate(work_of("serial", 2, 1, False, 4.0), pair_fabric(latency=latency)).seconds == pytest.approx(
        without + 2 * 2 * latency
    )


@pytest.mark.parametrize("kind", ["overlap", "arrival"])
def test_two_micro_batches_hide_what_one_waits_for(kind):
    """Two in flight take less than one after the other, and not less than what the link or the rank needs."""
    serial = simulate(work_of("serial", 4, 4, False, 0.5), pair_fabric()).seconds
    hidden = simulate(work_of(kind, 4, 4, False, 0.5), pair_fabric()).seconds
    assert max(16 * 1.0, 16 * 2 * 0.5) <= hidden < 0.9 * serial


def test_spent_seconds_sum_to_the_step():
    """What a class spent, waiting included, is the step."""
    outcome = simulate(work_of("overlap", 3, 4, True, 0.3), pair_fabric())
    assert sum(outcome.spent.values()) == pytest.approx([outcome.seconds] * 2)


def test_flows_share_fairly_and_what_one_leaves_goes_to_others():
    """Of three flows one is held by its own link; the others share what it leaves of the uplink."""
    uses = {(0, 1): [(0, 1.0), (1, 1.0)], (2, 3): [(0, 1.0)], (4, 5): [(0, 1.0)]}
    assert fill_progressively(frozenset(uses), uses, [10.0, 2.0]) == pytest.approx(
        {(0, 1): 2.0, (2, 3): 4.0, (4, 5): 4.0}
    )


@pytest.mark.parametrize(("ranks", "slots", "replicate"), [(4, 4, False), (8, 2, False), (8, 4, True), (32, 1, True)])
def test_shares_sum_to_one_and_loads_even_out(ranks, slots, replicate):
    """By load no rank has more than in order of number, and with replicas less still."""
    loads = np.random.default_rng(1).random((3, 16)) ** 3
    shares = spread_experts(loads, ranks, slots, True, replicate)
    plain = spread_experts(loads, ranks, slots, False, False)
    assert shares.sum(axis=1) == pytest.approx(np.ones(3))
    assert (shares.max(axis=1) <= plain.max(axis=1) + 1e-12).all()


def test_sampled_layers_stand_for_even_and_uneven_ones():
    """Of many layers as many as asked for, from the whole range."""
    loads = 1 + np.arange(40)[:, None] * np.eye(8)[0]
    assert sample_layers(loads, 4).tolist() == [5, 15, 25, 35]
    assert sample_layers(loads, 40).tolist() == list(range(40))


def ask(*words):
    """Ask `hpcmoe plan` about the default config in a process of its own."""
    command = [sys.executable, "-m", "hpcmoe.plan", "inputs/run.toml", "--cluster", "inputs/cluster.toml", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_answer_needs_neither_torch_nor_mpi():
    """What is asked without ranks starts neither, nor what takes seconds to import."""
    code = (
        "import sys; from hpcmoe.plan import main\n"
        "status = main(['inputs/run.toml', '--cluster', 'inputs/cluster.toml', '--loads', 'even'])\n"
        "assert status == 0 and not {'torch', 'mpi4py', 'h5py', 'scipy'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_written_plan_adds_up_and_its_lines_fit(tmp_path):
    """Parts sum to the step, the range holds it, and the table is readable in 120 columns."""
    ended = ask("--nodes", "1:4:x2", "--vary", "nic=x2", "-o", str(tmp_path / "plan.json"))
    assert ended.returncode == 0, ended.stderr
    assert max(map(len, ended.stdout.splitlines()[:10])) <= 120
    candidates = json.loads((tmp_path / "plan.json").read_text())["candidates"]
    assert [(row["nodes"], row["vary"]) for row in candidates] == [(n, v) for n in (1, 2, 4) for v in ("", "nic=x2")]
    for row in candidates:
        assert sum(row["seconds_of_part"].values()) == pytest.approx(row["step_seconds"])
        assert row["step_seconds_range"][0] <= row["step_seconds"] <= row["step_seconds_range"][1]


def test_the_best_shape_is_written_as_a_config(tmp_path):
    """What --write leaves is a config whose [parallel] is the best shape."""
    ended = ask("--loads", "even", "--shapes", "2x16x4", "--write", str(tmp_path / "best.toml"))
    assert ended.returncode == 0, ended.stderr
    parallel = read_config(tmp_path / "best.toml")[0].parallel
    assert (parallel.data, parallel.expert, parallel.tensor) == (2, 16, 4)


@pytest.mark.parametrize(
    "words",
    [("--nodes", "0"), ("--shapes", "3x"), ("--vary", "nic=2"), ("--loads", "99"), ("--costs", "/dev/null"),
     ("--nodes", "9999999"), ("--shapes", "1x999x1")],
)  # fmt: skip
def test_a_wrong_question_ends_in_one_line(words):
    """Whatever is wrong: one line, status 2."""
    ended = ask(*words)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)
