"""A run of 100,000 steps leaves little: some hundred lines of the log, and a record that grows by numbers alone."""

import itertools
import logging

import h5py
import numpy as np
import pytest
from mpi4py import MPI
from report.test_progress import LOSS, METRICS, NORM, RATE

from hpcmoe.model.routing_stats import RoutingStats
from hpcmoe.report import progress
from hpcmoe.report.progress import open_progress
from hpcmoe.report.sinks import LINES, open_sinks
from hpcmoe.run.step import Outcome
from hpcmoe.run.train import record_step
from hpcmoe.write import records as records_of_a_run
from hpcmoe.write.records import open_records

STEP_SECONDS = 0.05
COUNTS = np.ones((2, 2), np.int64)
STATS = RoutingStats(
    num_tokens=500, num_dropped=0, tokens_of_expert=COUNTS, own_tokens=COUNTS, utilisation=METRICS.utilisation,
    aux_loss=1.0, z_loss=1.0,
)  # fmt: skip


@pytest.mark.parametrize("steps", [2_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_log_and_record_stay_small(tmp_path, monkeypatch, caplog, steps):
    now = itertools.count(0.0, STEP_SECONDS / 2)  # asked by the record and by the progress
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(records_of_a_run, "_FLUSH_SECONDS", 1e9)  # the last flush alone: the test's own time
    monkeypatch.setattr(progress, "find_terminal_width", lambda: None)
    caplog.set_level(logging.INFO)
    outcome = Outcome(loss=LOSS, stats=STATS, norm=NORM)
    with (
        open_records(MPI.COMM_SELF, tmp_path) as records,
        open_sinks(tmp_path, True, False) as sinks,
        open_progress(steps, 0, True, 10.0, sinks) as show,
    ):
        for step in range(1, steps + 1):
            record_step(records, step, outcome, METRICS)
            show(step, outcome.loss, RATE, METRICS, outcome.norm)
    most = steps * STEP_SECONDS / 10 + 3
    assert 2 <= len(caplog.messages) <= most and len((tmp_path / LINES).read_text().splitlines()) <= most
    assert (tmp_path / "run.h5").stat().st_size < 1_000_000 + 500 * steps
    with h5py.File(tmp_path / "run.h5") as file:
        assert len(file["train/loss/value"]) == steps


def test_of_large_arrays_fewer_and_fewer_steps_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(records_of_a_run, "_SAMPLED_BYTES", 8_000)  # ten arrays
    with open_records(MPI.COMM_SELF, tmp_path) as records:
        for step in range(1, 1001):
            records.sample(step, "experts", "utilisation", np.full((10, 10), float(step)))
    with h5py.File(tmp_path / "run.h5") as file:
        kept = file["experts/utilisation/step"][:]
        assert np.array_equal(file["experts/utilisation/value"][:, 0, 0], kept)
    assert kept[:12].tolist() == [*range(1, 11), 12, 14] and len(kept) < 80 and kept[-1] > 900
