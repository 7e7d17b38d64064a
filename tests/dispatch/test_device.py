"""Between devices, too, each way is the other's adjoint; buffers grow for what they cannot hold; traffic is counted."""

import numpy as np
import pytest
import torch
from kernels import compiler_for_host
from round_trips import (
    check_backward,
    check_forward,
    check_two_at_once,
    go,
    make_round_trip,
    run_both_ways,
    run_forward,
)
from small import open_small_device_dispatcher

from hpcmoe.comm.rows import KernelRowOps
from hpcmoe.comm.transport import HOMEWARD, Direction
from hpcmoe.wait import gather_to_all

HIDDEN, SLOTS = 4, 2  # as those of open_small_device_dispatcher


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_both_ways_are_what_their_definitions_say(comm, kind):
    with open_small_device_dispatcher(comm, kind) as dispatcher:
        for seed in range(4):
            round_trip = make_round_trip(dispatcher, (7 * comm.rank + 5 * seed) % 21, seed, kept_share=seed / 3)
            go(dispatcher, run_both_ways(dispatcher, round_trip))
            check_forward(dispatcher, round_trip)
            check_backward(dispatcher, round_trip)


@pytest.mark.mpi
@pytest.mark.parametrize("hidden", [HIDDEN, pytest.param(24, marks=pytest.mark.full)])
def test_kernels_of_our_own_do_both_ways_and_are_compiled_before(comm, tmp_path, hidden):
    row_ops = KernelRowOps(compiler_for_host(tmp_path))
    with open_small_device_dispatcher(comm, row_ops=row_ops, hidden=hidden) as dispatcher:
        compiled = set(row_ops.kernels)
        round_trip = make_round_trip(dispatcher, 7 * comm.rank, 1)
        go(dispatcher, run_both_ways(dispatcher, round_trip))
        check_forward(dispatcher, round_trip)
        check_backward(dispatcher, round_trip)
    with open_small_device_dispatcher(comm, row_ops=row_ops, dtype=torch.bfloat16, hidden=hidden) as dispatcher:
        compiled |= set(row_ops.kernels)
        round_trip = make_round_trip(dispatcher, 15, seed=3)
        round_trip.x = round_trip.x.float()  # as a model's tokens are
        go(dispatcher, run_forward(dispatcher, round_trip))
        check_forward(dispatcher, round_trip)
    assert set(row_ops.kernels) == compiled and len(compiled) == 8


@pytest.mark.mpi
def test_two_micro_batches_under_way_do_not_mix(comm):
    with open_small_device_dispatcher(comm) as dispatcher:
        for seed in range(3):
            check_two_at_once(dispatcher, 19, seed)


@pytest.mark.mpi
def test_a_buffer_grows_when_all_go_to_one_slot_and_stays_so(comm):
    with open_small_device_dispatcher(comm, expert_rows=3) as dispatcher:
        announced = dispatcher.sizes.buffer_bytes(dispatcher.routes)
        assert dispatcher.buffer_bytes == announced
        for _ in range(2):
            round_trip = make_round_trip(dispatcher, 20, seed=2, favourite=0)
            go(dispatcher, run_both_ways(dispatcher, round_trip))
            check_forward(dispatcher, round_trip)
            check_backward(dispatcher, round_trip)
        grown = dispatcher.buffer_bytes - announced
        assert (grown > 0) == (comm.rank == 0) and grown <= 1.04 * 20 * comm.size * dispatcher.sizes.row_bytes


@pytest.mark.mpi
def test_bfloat16_goes_as_bytes(comm):
    with open_small_device_dispatcher(comm, dtype=torch.bfloat16) as dispatcher:
        round_trip = make_round_trip(dispatcher, 15, seed=3)
        go(dispatcher, run_forward(dispatcher, round_trip))
        check_forward(dispatcher, round_trip)
        assert round_trip.output.dtype == torch.float32 and dispatcher.sizes.row_bytes == 16


@pytest.mark.mpi
def test_traffic_is_counted_by_direction_and_peer(comm):
    with open_small_device_dispatcher(comm) as dispatcher:
        round_trip = make_round_trip(dispatcher, 18, seed=5)
        go(dispatcher, run_both_ways(dispatcher, round_trip))
        traffic = dispatcher.pop_traffic()
        to_rank = np.bincount((round_trip.slots // SLOTS)[round_trip.kept], minlength=comm.size)
        assert {layer: assignments.tolist() for layer, assignments in traffic.assignments.items()} == {
            0: to_rank.tolist()
        }
        of_all = np.stack(gather_to_all(comm, traffic.rows), axis=1)  # [4, P, P]
        for direction in (Direction.DISPATCH, Direction.COMBINE_BACKWARD):
            assert traffic.rows[direction].tolist() == to_rank.tolist()
            assert np.array_equal(of_all[direction], of_all[HOMEWARD[direction]].T)
        assert not dispatcher.pop_traffic().rows.any()
