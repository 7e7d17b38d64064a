"""Placement by itself, as a user runs it: answers that are placements, one line for what is wrong, in time."""

import contextlib
import copy
import io
import json
import os
import signal
import sys
import time

import h5py
import numpy as np
import psutil
import pytest
from cases import UNUSED, make_case, make_domains, put, write_case
from covering import table, usually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import Running, run

from hpcmoe.place import main
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.files.case import read_case
from hpcmoe.write.hdf5 import write_entry
from hpcmoe.write.problem import record_problem

FEW = ("--iterations", "200", "--budget", "1")
ERROR_SECONDS = 2.0  # of a core, in which a broken case must be refused
OBJECTIVES = ("links", "ports", "step")


def place(case, *words, few=FEW):
    """Run the command in this process -> (status, standard output, lines of standard error)."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in (case, *few, *words)])
    return status, output.getvalue(), errors.getvalue().splitlines()


def check_answer(case_path, out_path, objective):
    """Assert that an answer is a placement, and costs what it says."""
    answer = json.loads(out_path.read_text())
    problem, _ = read_case(case_path, objective)
    slots = np.array(answer["expert_of_slot"])
    assert slots.shape == (problem.num_layers, problem.num_ranks, problem.slots_per_rank)
    copies = np.zeros(problem.num_nodes, np.int64)
    for of_layer in slots:
        count = np.bincount(of_layer[of_layer >= 0], minlength=problem.num_experts)
        assert len(count) == problem.num_experts and count.min() >= 1 and (problem.replicate or count.max() == 1)
        assert all(len(set(of_rank)) == len(of_rank) for of_rank in (row[row >= 0].tolist() for row in of_layer))
        np.add.at(copies, problem.node_of_rank, (of_layer >= 0).sum(axis=1))
    assert (copies * problem.expert_bytes <= problem.memory_bytes).all()

    cost = sum(layer_seconds(problem, layer, of_layer.ravel()) for layer, of_layer in enumerate(slots))
    assert answer["objective"] == objective and answer["objective_seconds"] == pytest.approx(cost, rel=1e-6)
    assert answer["lower_bound_seconds"] <= cost * (1 + 1e-9)
    if answer["optimal"]:
        assert answer["lower_bound_seconds"] == pytest.approx(cost, rel=1.1e-5)
    assert answer["contiguous_seconds"] is None or cost <= answer["contiguous_seconds"] * (1 + 1e-9)
    assert 0 <= answer["cross_node_share"] <= 1 and answer["sigma_links"] >= 0 and answer["seconds"] >= 0
    return answer


CASES = {
    "one slot": make_case(),
    "replicas": make_domains(make_case(slots=2, replicate=True)),
    "more experts than ranks": make_case(experts=20, slots=3),
    "tight memory": make_case(experts=7, M=[7 * 35e6, 4 * 35e6, 5 * 35e6, 6 * 35e6]),
    "one node": make_case(nodes=1, ranks=4, experts=4, nic_out=None, nic_in=None, rack=None, uplink=None),
    "no tokens": make_case(home_tokens_per_rank=[0] * 8),
}


@pytest.mark.parametrize(("name", "objective"), table(CASES, OBJECTIVES))
def test_an_answer_is_a_placement_that_costs_what_it_says(tmp_path, name, objective):
    case, out = write_case(tmp_path / "case.json", CASES[name]), tmp_path / "out.json"
    status, output, _ = place(case, "--objective", objective, "-o", out)
    assert status == 0 and output.splitlines()[-1] == f"written: {out}"
    check_answer(case, out, objective)
    assert [path.name for path in tmp_path.iterdir()] == ["case.json", "out.json"]


def test_a_device_stays_what_it_is(tmp_path):
    case, pipe = write_case(tmp_path / "case.json", make_case()), tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert place(case, "-o", pipe)[0] == 0
        assert json.loads(os.read(reader, 1 << 16))["optimal"] in (True, False)
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_the_same_seed_and_iterations_give_the_same_answer(tmp_path):
    case = write_case(tmp_path / "case.json", make_domains(make_case(slots=2, replicate=True)))
    answers = []
    for out in (tmp_path / "a.json", tmp_path / "b.json"):
        assert place(case, "--seed", "7", "-o", out, few=("--iterations", "200", "--budget", "60"))[0] == 0
        answers.append(json.loads(out.read_text()) | {"seconds": None})
    assert answers[0] == answers[1] and answers[0]["seed"] == 7


def test_other_methods_are_compared(tmp_path):
    case, out = write_case(tmp_path / "case.json", make_case()), tmp_path / "out.json"
    _, output, _ = place(case, "--compare", "-o", out)
    answer = json.loads(out.read_text())
    assert answer["eplb_seconds"] > 0 and answer["contiguous_seconds"] > 0
    assert "  contiguous" in output and "  eplb" in output


def test_the_table_shows_nodes_what_is_busiest_and_what_binds(tmp_path):
    case = write_case(tmp_path / "case.json", make_case())
    status, output, errors = place(case, "--objective", "step", "--layer", "2", "--latency")
    assert status == 0 and errors == []
    for text in (
        "objective step",
        "lower bound",
        "contiguous",
        "experts of layer 2",
        "n3",
        "busiest",
        "uplink",
        "rank",
    ):
        assert text in output
    assert "what binds" in output and "written" not in output
    assert "objective links" in place(case, "--objective", "links")[1]


def test_a_run_can_be_placed_again(tmp_path):
    case = write_case(tmp_path / "case.json", make_case())
    problem, _ = read_case(case, "ports")
    with h5py.File(tmp_path / "run.h5", "w") as file:

        class Records:
            """Records that write each fact at once."""

            def describe(self, chapter, name, value, unit=""):
                """Write a fact."""
                write_entry(file.require_group(chapter), name, value, unit)

        record_problem(Records(), problem)
    status, _, errors = place(tmp_path / "run.h5", "-o", tmp_path / "out.json")
    assert status == 0 and errors == ["hpcmoe: note: the run took no step: probabilities are those that it began with"]
    check_answer(case, tmp_path / "out.json", "ports")
    assert place(tmp_path / "run.h5", "--objective", "links", "-o", tmp_path / "out.json")[0] == 0
    check_answer(case, tmp_path / "out.json", "links")

    # Its placement is the one that it had last.
    layouts = np.stack([np.random.default_rng(seed).permuted(np.tile(np.arange(8), (3, 1)), axis=1) for seed in (1, 2)])
    with h5py.File(tmp_path / "run.h5", "a") as file:
        file["cluster/expert_of_replica"] = layouts[0]
    for expected in layouts:
        words = ("--start", tmp_path / "run.h5", "--moves", 0, "-o", tmp_path / "out.json")
        assert place(tmp_path / "run.h5", *words)[0] == 0
        assert (
            np.reshape(json.loads((tmp_path / "out.json").read_text())["expert_of_slot"], (3, -1)).tolist()
            == expected.tolist()
        )
        with h5py.File(tmp_path / "run.h5", "a") as file:
            group = file.require_group("cluster/migrated")
            group.require_dataset("value", data=layouts, shape=layouts.shape, dtype=int)

    (tmp_path / "run.h5").write_text("{}")
    status, _, errors = place(tmp_path / "run.h5")
    assert status == 2 and len(errors) == 1 and "run.h5: cannot be read" in errors[0]


def no_search(*_, **__):
    """Stand in for the search where none may begin."""
    raise AssertionError("the search began")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-o", "none/out.json"], "none/out.json: cannot be written: No such file or directory"),
        (["-o", "."], ".: cannot be written: is a folder"),
        (["-o", "a" * 300], f"{'a' * 300}: cannot be written: File name too long"),
        (["-o", "case.json"], "case.json: cannot be written: is the case itself"),
        (["--plot", "none/out.png"], "none/out.png: cannot be written: No such file or directory"),
        (["--plot", "out.gif"], "--plot out.gif: must end with .png, .pdf, .svg"),
        (["--layer", "3"], "--layer 3: must be below layers = 3"),
        (["--budget", "0"], "command line: argument --budget: invalid positive value: '0'"),
        (["--budget", "inf"], "command line: argument --budget: invalid positive value: 'inf'"),
        (["--budget", "nan"], "command line: argument --budget: invalid positive value: 'nan'"),
        (["--seed", "-1"], "command line: argument --seed: invalid natural value: '-1'"),
        (["--iterations", "1e3"], "command line: argument --iterations: invalid natural value: '1e3'"),
        (["--objective", "fast"], "command line: argument --objective: invalid choice: 'fast'"),
        (["--quick"], "command line: unrecognized arguments: --quick"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_the_search(tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpcmoe.placement.solve.make_placement", no_search)
    write_case(tmp_path / "case.json", make_case())
    status, output, errors = place("case.json", *words)
    assert status == 2 and output == "" and len(errors) == 1 and errors[0].startswith(f"hpcmoe: {line}")


def test_a_picture_without_matplotlib_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("hpcmoe.placement.solve.make_placement", no_search)
    status, _, errors = place(write_case(tmp_path / "case.json", make_case()), "--plot", tmp_path / "out.png")
    assert status == 2 and len(errors) == 1 and "--plot: matplotlib is not there" in errors[0]


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_picture_is_drawn(tmp_path, kind):
    case, picture = write_case(tmp_path / "case.json", make_case()), tmp_path / f"out.{kind}"
    status, output, _ = place(case, "--plot", picture)
    assert status == 0 and output.endswith(f"written: {picture}\n")
    assert picture.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind])


def change(draw, value):
    """Draw something that may stand in a value's place: of another type, sign, length or depth."""
    others = [None, True, "x", "", -1, 0, 1.5, 10**12, 10**400, 1e300, float("nan"), float("inf"), [], {}, [[]], [0]]
    if isinstance(value, list) and value:
        others += [value[:-1], [*value, value[-1]], [value], value[0], [*value[:-1], None], value[::-1]]
    return draw(st.sampled_from(others))


@st.composite
def mutants(draw):
    """Draw a valid case with one or two things about it changed."""
    case = copy.deepcopy(draw(st.sampled_from([CASES["one slot"], CASES["replicas"], CASES["tight memory"]])))
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(case)))
        if draw(st.booleans()) and draw(st.booleans()):
            del case[key]
            continue
        # Go down some way into the lists, and change what is there.
        holder, place_in = case, key
        while isinstance(holder[place_in], list) and holder[place_in] and draw(st.booleans()):
            holder, place_in = holder[place_in], draw(st.integers(0, len(holder[place_in]) - 1))
        holder[place_in] = change(draw, holder[place_in])
    return case


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=mutants(), objective=st.sampled_from(OBJECTIVES))
def test_a_changed_case_is_placed_or_refused_in_lines(tmp_path, case, objective):
    path, out = tmp_path / "case.json", tmp_path / "out.json"
    path.write_text(json.dumps(case))
    status, output, errors = place(
        path, "--objective", objective, "-o", out, few=("--iterations", "20", "--budget", "1")
    )
    if status == 0:
        check_answer(path, out, objective)
        assert all(line.startswith("hpcmoe: note: ") for line in errors)
    else:
        assert status == 2 and output == "" and errors
        assert all(line.startswith(f"hpcmoe: {path}: ") and len(line) < 500 for line in errors)


BROKEN = {
    "sum of P[1] = 1.5: must be 1, to within 1e-06": put(make_case(), "P", 1, value=[1.5, *[0] * 7]),
    "B[1][2] = nan: must be finite and > 0": put(make_case(), "B", 1, 2, value=float("nan")),
    "9 experts do not fit into 8 ranks x 1 slots = 8; E": make_case(experts=9),
    "8 experts x 3 layers x 35 MB = 840 MB do not fit: node n0 with 100 MB": make_case(M=[1e8] * 4),
    "M[127] = nan: must be finite": put(
        make_case(128, 8, 256, 60), "M", 127, value=float("nan")
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", usually(BROKEN, *list(BROKEN)[-2:]))
def test_the_command_refuses_a_broken_case_within_two_seconds(tmp_path, line):
    path = write_case(tmp_path / "case.json", BROKEN[line] | {UNUSED: 1})
    ended = run(sys.executable, "-m", "hpcmoe.place", path, "-o", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert ended.cpu_seconds < ERROR_SECONDS
    assert ended.status == 2 and ended.output == "" and not list(tmp_path.glob("out*"))
    assert ended.errors.startswith(f"hpcmoe: {path}: {line}") and len(ended.errors.splitlines()) == 1


def test_the_command_explains_itself():
    ended = run(sys.executable, "-m", "hpcmoe.place", "--help")
    assert ended.status == 0 and ended.errors == ""
    assert all(
        word in ended.output for word in ("CASE.json", "--budget SECONDS", "-o OUT.json", "--plot FILE", "--seed")
    )
    ended = run(sys.executable, "-m", "hpcmoe.place")
    assert ended.status == 2 and ended.errors == "hpcmoe: command line: the following arguments are required: CASE\n"


def test_the_command_bears_a_reader_that_leaves(tmp_path):
    case, out = write_case(tmp_path / "case.json", make_case()), tmp_path / "out.json"
    command = f"'{sys.executable}' -m hpcmoe.place '{case}' -o '{out}' --iterations 10 | true; echo ${{PIPESTATUS[0]}}"
    ended = run("bash", "-c", command)
    assert ended.output == "0\n" and ended.errors == ""
    check_answer(case, out, "step")


@pytest.mark.parametrize("seconds", [4.0, *(pytest.param(seconds, marks=pytest.mark.full) for seconds in (3.7, 4.3))])
def test_the_command_ends_on_ctrl_c_with_one_word(tmp_path, seconds):
    """At moments when it searches: without insistence numba loses a third of them."""
    case = write_case(tmp_path / "case.json", make_domains(make_case(8, 8, 64, 8, slots=2, replicate=True)))
    running = Running(sys.executable, "-m", "hpcmoe.place", case, "--budget", "100", "-o", tmp_path / "out.json")
    process = psutil.Process(running.process.pid)
    while sum(process.cpu_times()[:2]) < seconds:  # of its own, however busy the machine is
        assert running.process.poll() is None, running.wait()
        time.sleep(0.01)
    running.process.send_signal(signal.SIGINT)
    ended = running.wait()
    assert ended.status == 130 and ended.errors.splitlines()[-1] == "hpcmoe: interrupted"
    assert "Traceback" not in ended.errors and not list(tmp_path.glob("out*"))


def test_a_placement_is_begun_with_weighed_and_written_as_eplbs_map(tmp_path):
    case = write_case(tmp_path / "case.json", make_case(replicate=False, slots=2))
    out, again, eplb = tmp_path / "out.json", tmp_path / "again.json", tmp_path / "map.json"
    status, *_ = place(case, "-o", out, "--eplb-out", eplb)
    first, map_ = json.loads(out.read_text()), json.loads(eplb.read_text())
    assert status == 0
    assert np.reshape(first["expert_of_slot"], (3, -1)).tolist() == map_["physical_to_logical"]

    # As it is; then with a move or two from the contiguous placement.
    for start in (out, eplb):
        assert place(case, "--start", start, "--moves", 0, "-o", again)[0] == 0
        weighed = json.loads(again.read_text())
        assert weighed["expert_of_slot"] == first["expert_of_slot"] and weighed["iterations"] == 0
        assert weighed["objective_seconds"] == first["objective_seconds"]
    plain = np.pad(np.arange(8)[:, None], ((0, 0), (0, 1)), constant_values=-1)
    (tmp_path / "plain.json").write_text(json.dumps([plain.ravel().tolist()] * 3))
    costs = []
    for moves in ("0", "2", None):
        words = ("--moves", moves) if moves else ()
        assert place(case, "--start", tmp_path / "plain.json", *words, "-o", again)[0] == 0
        answer = json.loads(again.read_text())
        costs.append(answer["objective_seconds"])
        moved = (np.array(answer["expert_of_slot"])[..., 0] != np.arange(8)).sum(axis=1)
        assert moves is None or moved.max() <= int(moves)
    assert costs[0] > costs[1] > costs[2] * 0.999


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--moves", "2"), "--moves 2: needs --start"),
        (("--eplb-out", "map.txt"), "--eplb-out map.txt: must end with .json, .npy"),
        (("--start", "none.json"), "none.json: cannot be read: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_start_is_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert place(write_case(tmp_path / "case.json", make_case()), *words)[::2] == (2, [f"hpcmoe: {said}"])
