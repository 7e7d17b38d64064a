"""The meter's figures are those of all ranks together, and its totals add up what it read."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from small import open_small_job

from hpcmoe.clock import Clock
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.traffic import Traffic
from hpcmoe.report.meter import MEANS, STAGES, Meter
from hpcmoe.wait import gather_to_all


class FakeDispatcher:
    """A dispatcher that has sent assignments [P] of two layers and rows [4, P] that the test sets."""

    def __init__(self, comm):
        self.clock, self.transport = Clock(), SimpleNamespace(rank=comm.rank, size=comm.size)
        self.pop_traffic()

    def pop_traffic(self):
        size = self.transport.size
        carried = getattr(self, "carried", None)
        self.carried = Traffic(
            assignments=dict.fromkeys((1, 0), np.zeros(size, np.int64)), rows=np.zeros((len(Direction), size), np.int64)
        )
        return carried


def make_stats(num_tokens, num_dropped):
    utilisation, own_tokens = np.array([num_tokens, 2.0]), np.full((2, 3), num_tokens)
    return SimpleNamespace(
        num_tokens=num_tokens, num_dropped=num_dropped, utilisation=utilisation, own_tokens=own_tokens
    )


@pytest.fixture
def meter(comm):
    return Meter(FakeDispatcher(comm), SimpleNamespace(world=comm, data_index=0, data_parallel=1))


def do_step(meter, seed):
    """Send random rows and spend rank + 1 s more on each stage but the last -> (assignments [2, P], rows [4, P])."""
    comm = meter.mesh.world
    first, second, *rows = np.random.default_rng([comm.rank, seed]).integers(0, 50, (2 + len(Direction), comm.size))
    assignments = np.stack([first, second])
    meter.dispatcher.carried.assignments |= {1: second, 0: first}
    meter.dispatcher.carried.rows += rows
    for stage in STAGES[:-1]:
        meter.clock.seconds[stage] = meter.clock.seconds.get(stage, 0.0) + comm.rank + 1
    return assignments, np.array(rows)


@pytest.mark.mpi
def test_a_steps_metrics_are_of_this_step_and_of_all_ranks(comm, meter):
    do_step(meter, seed=0)
    meter.start()  # forgets that
    assignments, _ = do_step(meter, seed=1)
    time.sleep(0.01)
    metrics = meter.read(make_stats(300, 0))

    dispatched = np.stack(gather_to_all(comm, assignments), axis=1)  # [2, P, P]
    of_layers = dispatched[:, ~np.eye(comm.size, dtype=bool)]
    others = of_layers.sum(axis=0)
    if comm.size > 1:
        assert metrics.link_tokens_mean == pytest.approx(others.mean())
        assert metrics.link_sigma == pytest.approx(others.std() / others.mean())
        assert metrics.link_sigma_of_layer == pytest.approx(of_layers.std(axis=1) / of_layers.mean(axis=1))
    served = dispatched.sum(axis=1)
    assert metrics.balancedness_of_layer == pytest.approx(served.mean(axis=1) / served.max(axis=1))
    assert metrics.balancedness == pytest.approx(served.mean(axis=1).sum() / served.max(axis=1).sum())
    mean = np.arange(1, comm.size + 1).mean()
    assert metrics.seconds_of_stage == dict.fromkeys(STAGES[:-1], pytest.approx(mean)) | {STAGES[-1]: 0}
    assert 0.01 <= metrics.seconds < 500 and metrics.tokens_per_second == 300 / metrics.seconds


@pytest.mark.mpi
def test_the_totals_add_up_the_figures(comm, meter):
    metrics_of_step, rows = [], []
    for step in range(3):
        meter.start()
        rows.append(do_step(meter, seed=step)[1])
        metrics_of_step.append(meter.read(make_stats(100 * step, step)))
    assert (meter.num_steps, meter.sums["num_tokens"], meter.sums["num_dropped"]) == (3, 300, 3)
    assert np.array_equal(meter.rows_to_peer, sum(rows).sum(axis=0))  # all directions
    assert meter.sums["utilisation"].tolist() == [300, 6]
    for name in MEANS + ("seconds",):
        assert meter.sums[name] == pytest.approx(sum(getattr(metrics, name) for metrics in metrics_of_step)), name
    assert meter.seconds_of_stage["route"] == pytest.approx(3 * np.arange(1, comm.size + 1).mean())


@pytest.mark.mpi
@pytest.mark.parametrize("changes", [{}, {"tensor": 2}, {"data": 2}])
def test_what_ranks_serve_is_what_their_experts_were_asked_for(comm, shared, changes):
    """One expert a rank: its load is the rank's, whole for each shard; a second group serves its own tokens' part."""
    tensor, data = changes.get("tensor", 1), changes.get("data", 1)
    if comm.size % (tensor * data):
        pytest.skip("does not fit this number of ranks")
    experts = comm.size // (tensor * data)
    shape = {"parallel__tensor": tensor, "parallel__data": data, "model__num_experts": experts}
    with open_small_job(comm, shared, model__top_k=1, placement__method="contiguous", **shape) as (job, _, _):
        job.meter.start()
        outcome = job.stepper.run(job.training, np.arange(14), np.ones((2, experts)), "train")
        assignments = np.stack([job.stepper.dispatcher.traffic.assignments[layer] for layer in range(2)])
        served, links, _ = job.meter.sum_over_ranks(assignments, [0.0])
    assert served.shape == (2, comm.size)
    for shard in range(tensor):
        of_groups = served[:, shard::tensor].reshape(2, data, experts)
        assert np.array_equal(of_groups.sum(axis=1), outcome.stats.tokens_of_expert)
    assert links.shape == (3, 3) and np.array_equal(links[0, 0], links[1:, 0].sum())


@pytest.mark.mpi
def test_tokens_are_summed_by_home_node_since_they_were_taken_last(comm, meter):
    node_of_rank = np.arange(comm.size) // 2
    assert meter.pop_tokens(node_of_rank) is None
    for step in (1, 2):
        meter.read(make_stats(10 * step * (1 + comm.rank), 0))
    taken = meter.pop_tokens(node_of_rank)
    if comm.rank > 0:
        assert taken is None
    else:
        of_node = np.bincount(node_of_rank, 30 * (1 + np.arange(comm.size)))
        assert taken.shape == (2, len(of_node), 3)
        assert (taken == of_node[None, :, None]).all()
    assert meter.pop_tokens(node_of_rank) is None  # nothing since
