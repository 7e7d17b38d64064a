"""The table at the end holds the run's figures, and they agree with each other."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from small import Notes, open_small_job

from hpcmoe.report.tables import format_bytes, make_table, rows_of_layers
from hpcmoe.report.totals import format_sampling_floors, gather_totals
from hpcmoe.run.infer import infer
from hpcmoe.run.train import train, train_step
from hpcmoe.wait import broadcast

STEPS, TOKENS = 3, 14 * 5
LABELS = {
    "one expert of a layer, all its matrices": "one_expert", "experts, parameters": "experts",
    "dense parts, parameters": "dense", "gradients": "gradients", "optimizer's moments": "optimizer",
    "message buffers": "buffers", "activations in flight": "activations", "all of these": "total",
}  # fmt: skip


def run_job(comm, folder, **changes):
    """Run three steps -> (job, Totals, table, Notes)."""
    notes, load = Notes(), np.ones((2, changes.get("model__num_experts", 4)))
    with open_small_job(comm, folder, run__steps=STEPS, **changes) as (job, optimizer, _):
        if optimizer is None:
            losses = infer(job, notes, load, lambda *state: None) or {}
        else:
            losses = train(job, notes, optimizer, (0, load), lambda *state: None)
        totals = gather_totals(job, optimizer, losses, 0)
        totals = dataclasses.replace(totals, bytes_of_link=broadcast(comm, totals.bytes_of_link))
        return job, totals, make_table(job, totals), notes.values


def figure(table, name):
    """Find the numbers in a table's row."""
    (row,) = [line for line in table.splitlines() if line.strip().startswith(name)]
    return [float(number) for number in re.findall(r"\d+\.?\d*", row.strip()[len(name) :])]


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_copy_crosses_a_link_or_stays_there_and_back(comm, shared, mode):
    job, totals, _, _ = run_job(comm, shared, run__mode=mode)
    row_bytes, top_k, layers, ways = 8 * 4, 2, 2, {"train": 4, "infer": 2}[mode]
    assert totals.num_steps == STEPS and totals.num_tokens == STEPS * TOKENS
    assert totals.bytes_of_link.sum() == totals.num_tokens * top_k * layers * ways * row_bytes
    assert np.array_equal(totals.bytes_of_link, totals.bytes_of_link.T)  # what leaves comes back


@pytest.mark.mpi
def test_links_of_a_parallel_shape_are_those_of_its_groups(comm, shared):
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    _, totals, _, _ = run_job(comm, shared, parallel__data=2)
    half = comm.size // 2
    assert not totals.bytes_of_link[:half, half:].any() and not totals.bytes_of_link[half:, :half].any()
    assert totals.bytes_of_link[:half, :half].any() and totals.bytes_of_link[half:, half:].any()


@pytest.mark.mpi
def test_totals_are_means_and_sums_of_the_steps(comm, shared):
    job, totals, _, values = run_job(comm, shared, dispatch__capacity_factor=0.7, model__num_experts=2 * comm.size)
    steps = range(1, STEPS + 1)
    assert np.allclose(totals.utilisation, np.mean([values["experts/utilisation"][step] for step in steps], axis=0))
    for chapter, name in (
        ("dispatch", "link_sigma"), ("dispatch", "link_sigma_of_layer"),
        ("experts", "balancedness"), ("experts", "balancedness_of_layer"),
    ):  # fmt: skip
        mean = np.mean([values[f"{chapter}/{name}"][step] for step in steps], axis=0)
        assert getattr(totals, name) == pytest.approx(mean), name
    assert totals.num_dropped == sum(values["dispatch/dropped"][step] for step in steps) > 0
    assert totals.seconds == pytest.approx(sum(values["run/seconds"][step] for step in steps))
    assert sum(totals.seconds_of_stage.values()) <= totals.seconds * 1.5
    assert totals.measured.experts == job.memory.experts  # all ranks have all slots full


@pytest.mark.mpi
def test_the_table_shows_the_totals(comm, shared):
    job, totals, table, values = run_job(comm, shared)
    assert figure(table, "validation loss, first") == [round(values["train/validation_loss"][0], 4)]
    assert figure(table, "validation loss, last") == [round(values["train/validation_loss"][STEPS], 4)]
    assert figure(table, "steps measured") == [STEPS]
    assert figure(table, "tokens per second") == [round(totals.num_tokens / totals.seconds)]
    assert figure(table, "time per token") == [round(1e6 * totals.seconds / totals.num_tokens, 2)]
    assert figure(table, "time per step") == [round(1e3 * totals.seconds / STEPS, 1)]
    busy = totals.utilisation
    assert figure(table, "expert utilisation U_e") == [round(busy.min(), 2), round(busy.max(), 2)]
    assert figure(table, "balancedness of ranks") == [round(totals.balancedness, 3)]
    assert totals.link_sigma_floor < totals.link_sigma_floor_of_layer.min() or comm.size == 1
    for layer in range(2):
        expected = [busy[layer].min(), busy[layer].max(), totals.balancedness_of_layer[layer]]
        sigmas = [totals.link_sigma_of_layer[layer], totals.link_sigma_floor_of_layer[layer]]
        assert figure(table, f"{layer} ") == pytest.approx(expected + sigmas, abs=5.1e-3)
    assert figure(table, "assignments dropped") == [0]
    assert "in optimizer" in table and "in route" in table
    if comm.size > 1:
        sent = totals.bytes_of_link[~np.eye(comm.size, dtype=bool)]
        assert figure(table, "links between ranks") == [comm.size * (comm.size - 1)]
        least_mean_most = [round(size / 1e6, 2) for size in (sent.min(), sent.mean(), sent.max())]
        assert figure(table, "bytes carried")[:3] == least_mean_most
        plain, counted = (figure(table, f"required, {name}")[0] for name in ("BW_min", "counted"))
        assert counted == pytest.approx(plain * 2 * 4 * 2, abs=2e-3)
    else:
        assert "links between" not in table


@pytest.mark.mpi
def test_links_between_nodes_have_rows_of_their_own(comm, shared):
    if comm.size == 1:
        pytest.skip("needs two nodes")
    job, totals, table, _ = run_job(comm, shared, num_nodes=2)
    of_rank = job.topology.node_of_rank
    between = totals.bytes_of_link[np.ix_(of_rank == 0, of_rank == 1)].sum()
    assert figure(table, "links between nodes") == [2]
    assert figure(table, "n0 -> n1")[0] == figure(table, "n1 -> n0")[0] == round(between / 1e6, 2)


def test_of_many_layers_those_are_shown_that_kept_ranks_busy_least():
    of_layer = np.random.default_rng(0).random(20)
    totals = SimpleNamespace(
        utilisation=np.ones((20, 4)), balancedness_of_layer=of_layer, link_sigma_of_layer=of_layer,
        link_sigma_floor_of_layer=of_layer,
    )  # fmt: skip
    rows = rows_of_layers(totals)
    shown = [int(row[0]) for row in rows]
    assert len(shown) == 8 and shown == sorted(shown)
    assert of_layer[shown].max() < np.delete(of_layer, shown).min()
    assert [row[2] for row in rows] == [f"{value:.3f}" for value in of_layer[shown]]


@pytest.mark.mpi
def test_memory_is_shown_as_computed_and_as_measured(comm, shared):
    job, totals, table, _ = run_job(comm, shared)
    for label, name in LABELS.items():
        assert figure(table, label) == [
            round(getattr(memory, name) / 1e6, 3) for memory in (job.memory, totals.measured)
        ]
    assert figure(table, "resident set")[0] > 10


@pytest.mark.mpi
def test_the_log_tells_the_floors_before_a_step_is_taken(comm, shared):
    with open_small_job(comm, shared) as (job, optimizer, _):
        line = format_sampling_floors(job)
        train_step(job, optimizer, np.ones((2, 4)), 1)
        job.meter.read(job.stepper.run(job.training, np.arange(14), np.ones((2, 4)), "train").stats)
        totals = gather_totals(job, optimizer, {}, 0)
    least, most = totals.link_sigma_floor_of_layer.min(), totals.link_sigma_floor_of_layer.max()
    assert f": {totals.link_sigma_floor:.3f} a step, {least:.3f}-{most:.3f} a layer" in line


def test_bytes_are_shown_in_megabytes():
    assert format_bytes(1_234_567) == "1.235 MB"
