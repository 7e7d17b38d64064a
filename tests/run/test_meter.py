"""The meter's readings are those of all ranks together, and its totals add up what it read."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmoe.clock import Clock
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.exchange import Traffic
from hpcmoe.run.meter import STAGES, Meter
from hpcmoe.wait import gather_to_all


class FakeExchange:
    """An exchange that has carried copies [P] and rows [4, P] that the test sets."""

    def __init__(self, comm):
        self.clock, self.transport = Clock(), SimpleNamespace(rank=comm.rank, size=comm.size)
        self.take_traffic()

    def take_traffic(self):
        size = self.transport.size
        carried = getattr(self, "carried", None)
        self.carried = Traffic(copies=np.zeros(size, np.int64), rows=np.zeros((len(Direction), size), np.int64))
        return carried


def make_outcome(num_tokens, num_dropped):
    census = SimpleNamespace(
        utilisation=np.array([num_tokens, 2.0]), num_dropped=num_dropped, own_tokens=np.full((2, 3), num_tokens)
    )  # fmt: skip
    return SimpleNamespace(num_tokens=num_tokens, census=census)


@pytest.fixture
def meter(comm):
    return Meter(FakeExchange(comm), SimpleNamespace(world=comm))


def do_step(meter, seed):
    """Carry random rows and spend rank + 1 more seconds on each stage but the last -> (copies [P], rows [4, P])."""
    comm = meter.mesh.world
    copies, *rows = np.random.default_rng([comm.rank, seed]).integers(0, 50, (1 + len(Direction), comm.size))
    meter.exchange.carried.copies += copies
    meter.exchange.carried.rows += rows
    for stage in STAGES[:-1]:
        meter.clock.seconds[stage] = meter.clock.seconds.get(stage, 0.0) + comm.rank + 1
    return copies, np.array(rows)


@pytest.mark.mpi
def test_a_reading_is_of_this_step_and_of_all_ranks(comm, meter):
    do_step(meter, seed=0)
    meter.start()  # forgets that
    copies, _ = do_step(meter, seed=1)
    time.sleep(0.01)
    reading = meter.read(make_outcome(300, 0))

    dispatched = np.array(gather_to_all(comm, copies))
    others = dispatched[~np.eye(comm.size, dtype=bool)]
    assert reading.links.count == len(others) == comm.size * (comm.size - 1)
    if comm.size > 1:
        assert reading.links.mean == pytest.approx(others.mean())
        assert reading.links.sigma == pytest.approx(others.std() / others.mean())
    mean = np.arange(1, comm.size + 1).mean()
    assert reading.seconds_of_stage == dict.fromkeys(STAGES[:-1], pytest.approx(mean)) | {STAGES[-1]: 0}
    assert 0.01 <= reading.seconds < 5 and reading.tokens_per_second == 300 / reading.seconds


@pytest.mark.mpi
def test_the_totals_add_up_the_readings(comm, meter):
    readings, rows = [], []
    for step in range(3):
        meter.start()
        rows.append(do_step(meter, seed=step)[1])
        readings.append(meter.read(make_outcome(100 * step, step)))
    assert (meter.num_steps, meter.num_tokens, meter.num_dropped) == (3, 300, 3)
    assert np.array_equal(meter.rows_to_peer, sum(rows).sum(axis=0))  # all directions
    assert meter.utilisation.tolist() == [300, 6]
    assert meter.link_sigma == pytest.approx(sum(reading.links.sigma for reading in readings))
    assert meter.seconds == pytest.approx(sum(reading.seconds for reading in readings))
    assert meter.seconds_of_stage["route"] == pytest.approx(3 * np.arange(1, comm.size + 1).mean())


@pytest.mark.mpi
def test_tokens_are_summed_by_home_node_since_they_were_taken_last(comm, meter):
    node_of_rank = np.arange(comm.size) // 2
    assert meter.take_tokens(node_of_rank) is None
    for step in (1, 2):
        meter.read(make_outcome(10 * step * (1 + comm.rank), 0))
    taken = meter.take_tokens(node_of_rank)
    if comm.rank > 0:
        assert taken is None
    else:
        of_node = np.bincount(node_of_rank, 30 * (1 + np.arange(comm.size)))
        assert taken.shape == (2, len(of_node), 3)
        assert (taken == of_node[None, :, None]).all()
    assert meter.take_tokens(node_of_rank) is None  # nothing since
