"""A process's memory by who else has it: like is shown beside like, and what steps load is there before they begin."""

import dataclasses
import mmap
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from small import open_small_job

from hpcmoe.dispatch.sizes import DeviceSizes
from hpcmoe.prepare.memory import Memory
from hpcmoe.prepare.process import (
    STEP_BYTES,
    ProcessMemory,
    count_unshared,
    mean_of_fullest_node,
    peak_resident_bytes,
    preload_libraries,
    read_process,
    read_status,
)
from hpcmoe.report.tables import format_bytes, make_table
from hpcmoe.report.totals import gather_totals
from hpcmoe.run.train import train_step

MEMORY = Memory(
    states=4, one_expert=10, experts=20, dense=3, gradients=23, optimizer=46, buffers=100, copies=9, activations=1000,
    moving=5, snapshot=500,
)  # fmt: skip


def test_what_is_unshared_and_what_is_resident_grow_by_what_is_held():
    before = read_process()
    with mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:  # the heap may have as much left
        ballast.write(bytes([1]) * len(ballast))
        after = read_process()
        assert after.unshared - before.unshared >= 0.9 * len(ballast)
        assert after.peak >= len(ballast)
    assert after.resident >= after.unshared > 0
    assert after.libraries == max(after.resident - after.unshared - after.shared_memory, 0)


def test_libraries_are_what_is_resident_and_neither_unshared_nor_a_window():
    assert ProcessMemory(unshared=30, shared_memory=20, resident=100, peak=110).libraries == 50
    assert ProcessMemory(unshared=90, shared_memory=20, resident=100, peak=110).libraries == 0  # alone on its node


def test_a_system_that_says_nothing_of_a_figure_has_none(tmp_path):
    status = tmp_path / "status"
    assert read_status("RssShmem", status) == 0
    status.write_text("Name:\tpython\nVmRSS:\t  9 kB\nRssShmem:\t  12 kB\n")
    assert read_status("RssShmem", status) == 12 * 1024 and read_status("RssFile", status) == 0


def test_a_nodes_ranks_share_evenly_and_the_fullest_node_counts():
    assert mean_of_fullest_node([300, 100, 190, 190], np.array([0, 0, 1, 1])) == 200
    assert mean_of_fullest_node([300, 100, 250], np.array([0, 0, 1])) == 250


def test_a_window_of_several_ranks_is_not_unshared_and_on_gpus_only_copies_are():
    def dispatcher(local_peers):
        return SimpleNamespace(
            sizes=SimpleNamespace(works_at_once=False, shared_bytes=lambda routes: 60),
            routes=SimpleNamespace(local_peers=range(local_peers)),
        )

    assert count_unshared(MEMORY, dispatcher(3)) == MEMORY.total - 60
    assert count_unshared(MEMORY, dispatcher(1)) == MEMORY.total
    fields = {field.name: 1 for field in dataclasses.fields(DeviceSizes)}
    assert count_unshared(MEMORY, SimpleNamespace(sizes=DeviceSizes(**fields))) == 505


def test_what_the_first_backward_pass_loads_is_there_before_it():
    preload_libraries(trains=True, places=True)
    assert {"sympy", "numba", "hpcmoe.placement.solve"} <= sys.modules.keys()


@pytest.mark.mpi
def test_the_table_lets_like_stand_beside_like(comm, shared):
    """What is unshared is the arrays and the process itself, as computed and as measured, whoever shares the window."""
    with open_small_job(comm, shared) as (job, optimizer, _):
        job.meter.start()
        job.meter.read(train_step(job, optimizer, np.ones((2, 4)), 1)[0].stats)
        totals = gather_totals(job, optimizer, {}, 0)
        totals = dataclasses.replace(totals, bytes_of_link=np.zeros((comm.size, comm.size)))
        table, dispatcher = make_table(job, totals), job.stepper.dispatcher
    assert job.budget.process_bytes > STEP_BYTES and job.budget.needs["process"] == job.budget.process_bytes
    window = dispatcher.sizes.shared_bytes(dispatcher.routes) if comm.size > 1 else 0
    computed = job.budget.process_bytes + job.memory.total - window
    for label, *values in (
        ("the process itself: Python, torch, MPI", job.budget.process_bytes, totals.process_bytes),
        ("all that it shares with no other (USS)", computed, totals.unshared_bytes),
        ("libraries and files that processes share", totals.process.libraries),
        ("resident set of the process, at its peak", totals.process.peak),
    ):
        (row,) = [line for line in table.splitlines() if line.startswith(label)]
        shown = re.findall(r"([\d.]+) MB", row.removeprefix(label))
        assert [f"{number} MB" for number in shown] == [format_bytes(value) for value in values], label
    own = totals.unshared_bytes - totals.process_bytes  # the mean of the ranks' arrays
    assert 0 < own <= totals.measured.total


def test_a_process_takes_at_least_what_it_holds():
    before = peak_resident_bytes()
    ballast = np.ones(64 * 2**20, np.uint8)
    assert peak_resident_bytes() >= max(before, ballast.nbytes)
