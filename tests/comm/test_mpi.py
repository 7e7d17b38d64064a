"""Sums over the ranks."""

import numpy as np
import pytest

from hpcmoe.comm.mpi import all_reduce, start_all_reduce


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_all_reduce_sums_in_place(comm, dtype):
    array = np.array([[comm.rank, 1], [2, 10**comm.rank]], dtype)
    assert all_reduce(comm, array) is array
    assert array.tolist() == [[sum(range(comm.size)), comm.size], [2 * comm.size, int("1" * comm.size)]]


@pytest.mark.mpi
def test_sums_under_way_together_end_in_any_order(comm):
    arrays = [np.full(3, float(10**n)) for n in range(3)]
    waits = [start_all_reduce(comm, array) for array in arrays]
    for n in (2, 0, 1):
        waits[n]()
        assert arrays[n].tolist() == [comm.size * 10**n] * 3
