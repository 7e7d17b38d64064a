"""A group of ranks opens anywhere: on the world, on a part of it, twice, within another, alone."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import ROOT, run
from mpi4py import MPI
from small import make_topology
from twins import DenseExperts, compare, draw

import hpcmoe
from hpcmoe.errors import ClusterError, ConfigError, HpcmoeError

H, F, E = 8, 12, 4


def make_layer(group, **arguments):
    return hpcmoe.Experts(**{"hidden": H, "feed_forward": F, "num_experts": E, "group": group} | arguments)


def check_layer(layer, seed=0):
    """Compare a layer with its dense twin on tokens of this rank's own."""
    x = draw(5, layer.hidden, seed=seed)
    choices, gates = (
        draw(5, layer.num_experts, seed=seed + 1).argsort(dim=1)[:, :2],
        draw(5, 2, seed=seed + 2).sigmoid(),
    )
    with torch.no_grad():
        compare(layer(x, choices, gates), DenseExperts(layer)(x, choices, gates))


@pytest.mark.mpi
def test_a_group_knows_its_ranks_and_leaves_the_process_as_it_was(comm):
    threads = torch.get_num_threads()
    with hpcmoe.open(comm, threads=2) as group:
        assert isinstance(group, hpcmoe.Group) and (group.rank, group.size) == (comm.rank, comm.size)
        assert group.mesh.expert_parallel == comm.size and torch.get_num_threads() == 2
        assert group.topology.node_of_rank.tolist() == [0] * comm.size and group.device.name == "host"
        assert group.topology.source["links"] == "assumed"
        check_layer(make_layer(group))
    assert torch.get_num_threads() == threads


@pytest.mark.mpi
def test_two_groups_one_after_the_other_and_one_within_another(comm):
    with hpcmoe.open(comm) as outer:
        first = make_layer(outer)
        with hpcmoe.open(comm, schedule="arrival") as inner:
            second = make_layer(inner, seed=7)
            check_layer(first)
            check_layer(second, comm.rank)
            assert (first.number, second.number) == (0, 0)
        check_layer(first)
    with hpcmoe.open(comm) as group:
        check_layer(make_layer(group))


@pytest.mark.mpi
def test_a_group_may_be_part_of_the_world(comm):
    part = comm.Split(comm.rank % 2, -comm.rank)
    with hpcmoe.open(part, max_tokens=9 + comm.rank % 2) as group:
        assert (group.rank, group.size) == (part.rank, part.size)
        check_layer(make_layer(group, seed=comm.rank % 2), comm.rank)
    part.Free()


@pytest.mark.mpi
def test_links_may_be_measured_or_given(comm):
    with hpcmoe.open(comm, links=make_topology(comm.size, min(2, comm.size))) as group:
        assert group.topology.num_nodes == min(2, comm.size)
        check_layer(make_layer(group))
    with hpcmoe.open(comm, links="measure") as group:
        assert group.topology.source["links"] == "measured"
    with (
        pytest.raises(ClusterError, match="links: a Topology of 9 ranks: must be of"),
        hpcmoe.open(comm, links=make_topology(9)),
    ):
        pass
    with pytest.raises(ClusterError, match="no/such/file"), hpcmoe.open(comm, links="no/such/file"):
        pass


WRONG = [
    ({"max_tokens": 0}, "hpcmoe.open: max_tokens = 0: must be greater than or equal to 1"),
    ({"schedule": "any"}, "hpcmoe.open: schedule = 'any': must be 'serial', 'overlap' or 'arrival'"),
    ({"device": "gpu"}, "hpcmoe.open: device = 'gpu': must be 'auto', 'host' or 'cuda'"),
    ({"in_flight": True}, "hpcmoe.open: in_flight = true: must be a valid integer"),
    ({"links": 3}, "hpcmoe.open: links = 3: must be a valid string"),
    ({"tensor_parallel": 64}, "tensor = 64 must divide the"),
    ({"comm": 3}, "hpcmoe.open: comm = 3: must be an intracommunicator of mpi4py"),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_a_wrong_argument_is_one_line_on_all_ranks(comm, arguments, line):
    with pytest.raises(HpcmoeError, match=line) as caught, hpcmoe.open(**{"comm": comm} | arguments):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.mpi
def test_arguments_that_differ_between_ranks_are_an_error_on_all(comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    line = r"\[rank 1 of .\] hpcmoe.open: max_tokens = 2, 1 on rank 0: must be alike on all ranks"
    with pytest.raises(ConfigError, match=line), hpcmoe.open(comm, max_tokens=1 + min(comm.rank, 1)):
        pass


@pytest.mark.mpi
def test_lanes_return_results_in_order_and_raise_what_a_step_raises(comm):
    with hpcmoe.open(comm, in_flight=3) as group:
        layer = make_layer(group)
        choices, gates = torch.zeros(2, 1).long(), torch.ones(2, 1)

        def step(number):
            layer(torch.full((2, H), float(number)), choices, gates)
            if number == 9:
                raise ValueError("no tenth")
            return number**2

        for numbers in ([], [3], [1, 2], list(range(8))):  # more and more of them at once
            assert list(group.lanes(step, numbers)) == [number**2 for number in numbers]
        assert list(group.lanes(step, [5, 6], in_flight=1)) == [25, 36]
        assert list(group.lanes(step, [5, 6], schedule="arrival")) == [25, 36]
        with pytest.raises(ConfigError, match="in_flight = 2: must divide that of hpcmoe.open, 3"):
            group.lanes(step, [1], in_flight=2)
        with pytest.raises(ConfigError, match="in_flight = 4: must divide that of hpcmoe.open, 3"):
            group.lanes(step, [1], in_flight=4)
        with pytest.raises(ConfigError, match="schedule = 'x': must be 'serial', 'overlap' or 'arrival'"):
            group.lanes(step, [1], schedule="x")
    with pytest.raises(ValueError, match="no tenth"), hpcmoe.open(comm) as group:
        layer = make_layer(group)
        group.lanes(step, [7, 8, 9])


@pytest.mark.mpi
def test_a_model_is_saved_and_loaded(comm, shared):
    with hpcmoe.open(comm) as group:
        saved, loaded = (hpcmoe.MoE(H, F, E, group=group, seed=seed) for seed in (1, 2))
        group.save(shared / "model", saved, extra={"step": 3})
        assert group.load(shared / "model", loaded) == {"step": 3}
        x = draw(6, H, seed=4)
        assert torch.equal(saved(x), loaded(x))


def test_one_process_without_mpirun_is_a_group_of_one():
    program = (
        "import hpcmoe, torch\n"
        "with hpcmoe.open() as group:\n"
        "    moe = hpcmoe.MoE(8, 12, 4, group=group)\n"
        "    moe(torch.ones(3, 8)).sum().backward()\n"
        "    print(group.size, moe.experts.expert_of_slot.tolist())\n"
    )
    ended = run(sys.executable, "-c", program, PYTHONPATH=str(ROOT))
    assert ended.status == 0 and ended.output == "1 [0, 1, 2, 3]\n", ended


def test_the_package_alone_imports_nothing_that_takes_long():
    names = "'torch', 'mpi4py', 'numba', 'numpy'"
    program = f"import sys, hpcmoe; print([name for name in ({names}) if name in sys.modules], 'open' in dir(hpcmoe))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "[] True\n"


@pytest.mark.mpi
def test_a_rank_that_leaves_by_an_exception_takes_the_others_along(comm):
    """Within seconds, with its reason; none of them hangs in an exchange."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    expected = ZeroDivisionError if comm.rank == 1 else HpcmoeError
    with pytest.raises(expected) as caught, hpcmoe.open(comm) as group:
        layer = make_layer(group)
        if comm.rank == 1:
            raise ZeroDivisionError("no reason")
        for _ in range(10**6):
            layer(torch.ones(2, H), torch.zeros(2, 1).long(), torch.ones(2, 1))
    assert comm.rank == 1 or "[rank 1 of" in str(caught.value) and "no reason" in str(caught.value)


@pytest.mark.mpi
def test_copies_of_a_layer_follow_their_own_optimizer(comm):
    with hpcmoe.open(comm) as group:
        layer = make_layer(group, dtype=torch.bfloat16)
        other = copy.deepcopy(layer)
        call = draw(4, H, seed=1), torch.arange(4)[:, None], torch.ones(4, 1)
        before = layer(*call)
        assert torch.equal(other(*call), before)
        other(*call).sum().backward()
        torch.optim.AdamW(other.parameters(), lr=0.5, fused=True).step()
        assert torch.equal(layer(*call), before)
        changed = other(*call)
        other.refresh()
        assert torch.equal(other(*call), changed)
        assert len(list(other.parameters())) == 0 or not torch.equal(changed, before)


def test_loads_are_arrays_of_each_layer():
    with hpcmoe.open() as group:
        make_layer(group)
        make_layer(group, num_experts=3)
        assert [loads.dtype for loads in group.loads()] == [np.int64] * 2
        assert [len(loads) for loads in group.loads()] == [4, 3]


def test_a_closed_group_says_so():
    with hpcmoe.open(MPI.COMM_SELF, threads=1) as group:
        moe = hpcmoe.MoE(H, F, E, group=group)
        y = moe(torch.ones(3, H))
    calls = [
        lambda: moe(torch.ones(3, H)), lambda: y.sum().backward(), lambda: make_layer(group), group.loads,
        lambda: group.sum_gradients(moe), lambda: group.lanes(moe, [torch.ones(3, H)]), lambda: group.save("none", moe),
        lambda: group.load("none", moe), lambda: group.rebalance(moe),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="this group is closed"):
            call()
    assert len(moe.state_dict()) == 3 + 3 * E  # the weights stay


def test_ctrl_c_in_a_step_leaves_the_process_to_open_another_group():
    code = """
import os, signal, torch, hpcmoe
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def train(steps, interrupted=None):
    with hpcmoe.open(threads=1) as group:
        moe = hpcmoe.MoE(8, 8, 4, group=group)
        def step(x):
            loss = moe(x).square().mean()
            if interrupted == "step":
                os.kill(os.getpid(), signal.SIGINT)
            loss.backward()
        for _ in range(steps):
            list(group.lanes(step, torch.ones(4, 5, 8)))
            if interrupted == "between":
                os.kill(os.getpid(), signal.SIGINT)
            group.sum_gradients(moe)
for where in ("step", "between"):
    try:
        train(10, where)
    except KeyboardInterrupt:
        print("interrupted")
train(2)
print("again")
"""
    ended = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert (ended.status, ended.output, ended.errors) == (0, "interrupted\ninterrupted\nagain\n", ""), ended
