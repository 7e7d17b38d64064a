"""The steps of [run] trace are recorded on the ranks that are shown, messages on both ends, nothing of other steps."""

import gzip
import json
import time

import pytest
from report.test_timeline import check_format
from small import open_small_job

from hpcmoe.comm.device import HostDevice
from hpcmoe.config import RunConfig
from hpcmoe.model.balance import even_load
from hpcmoe.run import tracing
from hpcmoe.run.tracing import Tracing, align_clocks
from hpcmoe.run.train import train_step

pytestmark = pytest.mark.mpi


class Recorded(list):
    """What a profiler has seen once its block has ended: one kernel."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        now = time.perf_counter()
        self.append(("gemm", 7, now - 1e-3, now))


class DeviceWithStreams(HostDevice):
    """A device with a stream that a profiler has seen."""

    def record_streams(self):
        """Record one kernel."""
        return Recorded()


@pytest.mark.parametrize("most", [64, 2])
def test_the_steps_named_are_written_as_all_ranks_saw_them(comm, shared, most):
    run = RunConfig(output=str(shared), name=".", trace="2:3", trace_ranks=most)
    with open_small_job(comm, shared, comm__shared_memory=False) as (job, optimizer, _):
        traced = Tracing(run, job.mesh, job.stepper.dispatcher, DeviceWithStreams())
        for step in range(1, 5):
            with traced.step(step):
                outcome, _ = train_step(job, optimizer, even_load(2, 4), step)
            assert (job.stepper.clock.spans is not None) == (step == 2 and comm.rank in traced.ranks)
        job.meter.read(outcome.stats)
    if comm.rank == 0:
        with gzip.open(shared / "trace.json.gz") as file:
            slices, flows = check_format(json.load(file)["traceEvents"])
        shown = min(comm.size, most)
        assert len({rank for rank, _ in slices}) == shown and (0, 10_007) in slices
        assert len(slices[0, 0]) == 2 and (len(flows) > 0) == (comm.size > 1)
    assert (traced.hidden_share is None) == (comm.size == 1)


def test_a_run_that_ends_before_writes_what_it_has(comm, shared):
    run = RunConfig(output=str(shared), name=".", trace="1:9")
    with open_small_job(comm, shared) as (job, optimizer, _):
        traced = Tracing(run, job.mesh, job.stepper.dispatcher, HostDevice())
        with traced.step(1):
            train_step(job, optimizer, even_load(2, 4), 1)
        traced.finish()
        traced.finish()
    assert (shared / "trace.json.gz").exists() and job.stepper.clock.spans is None


def test_clocks_that_differ_are_found_to(comm, monkeypatch):
    clock, ahead = time.perf_counter, 100.0 * comm.rank
    monkeypatch.setattr(tracing.time, "perf_counter", lambda: clock() + ahead)
    assert align_clocks(comm, list(range(comm.size))) == pytest.approx(ahead, abs=0.1)
    assert align_clocks(comm, [0]) == 0.0
