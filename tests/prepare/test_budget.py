"""A first look at memory refuses what cannot fit anywhere; the exact one counts what each node's ranks need besides."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from small import make_config, make_topology

from hpcmoe.errors import ClusterError, PlacementError
from hpcmoe.prepare.budget import (
    COMMUNICATOR_BYTES,
    GPU_LIBRARY_BYTES,
    check_budget,
    format_budget,
    make_budget,
    may_use_gpus,
    share_gpu_memory,
)

MEMORY = SimpleNamespace(dense_with_state=40, activations=100, buffers=7, working=5, copies=6, moving=0, snapshot=0)


@pytest.mark.parametrize(
    ("mode", "dtype", "num_bytes"), [("train", "bfloat16", 16), ("infer", "bfloat16", 2), ("infer", "float32", 4)]
)
def test_the_first_look_takes_the_memory_of_all_nodes_for_all_experts_and_their_state(mode, dtype, num_bytes):
    config = make_config(run__mode=mode, model__dtype=dtype)
    needed = 4 * 2 * (2 * 8 * 12) * num_bytes  # experts x layers x numbers x bytes of a number and its state
    topology = make_topology(4, 2)
    check_budget(
        config.spec,
        config.parallel.data,
        dataclasses.replace(topology, memory_bytes=np.array([needed // 2, needed // 2])),
    )
    with pytest.raises(PlacementError, match=r"4 experts x 2 layers .* do not fit .* of 4 ranks on 2 nodes"):
        check_budget(
            config.spec,
            config.parallel.data,
            dataclasses.replace(topology, memory_bytes=np.array([needed // 2, needed // 2 - 1])),
        )


@pytest.mark.parametrize(
    ("device", "gpus", "given", "there"),
    [("host", 8, 0, False), ("auto", 0, 0, False), ("auto", 8, 0, True), ("cuda", 0, 0, True), ("cuda", 8, 9, False)],
)
def test_the_hosts_memory_says_nothing_of_what_lies_on_gpus(device, gpus, given, there):
    topology = dataclasses.replace(make_topology(4, 2), devices_of_node=np.array([gpus, 0]))
    assert may_use_gpus(device, given, topology) == there


def test_experts_get_what_process_messages_and_dense_parts_leave():
    topology = dataclasses.replace(make_topology(3, 2), memory_bytes=np.array([1000, 100]))  # two ranks and one
    budget = make_budget(topology, MEMORY, 20, None)
    on_host = {"process": 20, "messages": 7, "experts that come": 0, "copy for checkpoints": 0}
    rest = {"dense parts": 40, "matrices cast or packed": 6, "activations": 100, "experts at work": 5}
    assert budget.needs == on_host | rest
    assert budget.bytes_for_experts.tolist() == [1000 - 2 * 178, 0]  # and never below zero


def test_on_gpus_only_what_lies_there_counts():
    topology = dataclasses.replace(make_topology(4, 2), memory_bytes=np.array([40, 40]))
    free, libraries = 10.0**10, GPU_LIBRARY_BYTES + 2 * COMMUNICATOR_BYTES
    budget = make_budget(topology, MEMORY, 20, free + np.array([500, 400, 900, 900]), num_communicators=2)
    rest = {"dense parts": 40, "matrices cast or packed": 6, "activations": 100, "experts at work": 5}
    assert budget.what == "GPU memory" and budget.needs == {"messages": 7} | rest | {"libraries": libraries}
    left = free - libraries - 158
    assert budget.bytes_for_experts.tolist() == [2 * (left + 400), 2 * (left + 900)]  # the node's tightest GPU


def test_beside_gpus_the_hosts_memory_must_hold_what_lies_there():
    topology = dataclasses.replace(make_topology(4, 2), memory_bytes=np.array([50, 49]))
    memory = SimpleNamespace(**vars(MEMORY) | {"moving": 2, "snapshot": 3})
    arithmetic = (
        r"node n1: 2 ranks x \(process 20 B \+ experts that come 2 B \+ copy for checkpoints 3 B\) = 50 B do not fit "
    )
    with pytest.raises(ClusterError, match=arithmetic + "into the 49 B"):
        make_budget(topology, memory, 20, np.full(4, 1e10))


def test_ranks_of_one_gpu_share_what_is_free_of_it():
    gpus = [("a", 900), ("b", 1000), ("a", 800), ("a", 850)]  # asked one after the other: the least counts
    assert share_gpu_memory(gpus).tolist() == pytest.approx([800 / 3, 1000, 800 / 3, 800 / 3])
    assert share_gpu_memory([None, None]) is None and share_gpu_memory([("a", 1), None]) is None


def test_nodes_that_are_alike_share_a_line():
    topology = dataclasses.replace(make_topology(12, 6), memory_bytes=np.array([5000, 5000, 9000, 5000, 5000, 5000]))
    lines = format_budget(make_budget(topology, MEMORY, 20, None), topology, 100, 2)
    besides = "process 20 B + messages 7 B + dense parts 40 B + matrices cast or packed 6 B + activations 100 B"
    besides += " + experts at work 5 B"
    assert lines == [
        f"memory of nodes n0, n1, n3, n4 and 1 more, each: 5 kB - 2 ranks x ({besides}) = 4.64 kB for experts of 100 B,"
        " holds 23 a layer",
        f"memory of node n2: 9 kB - 2 ranks x ({besides}) = 8.64 kB for experts of 100 B, holds 43 a layer",
    ]
