"""The batches that experts work on are counted as they are worked on, by expert, wherever that is."""

from types import SimpleNamespace

import numpy as np
import pytest
from moves import MOVES, force
from small import open_small_job

from hpcmoe.dispatch.traffic import make_traffic
from hpcmoe.model.balance import even_load
from hpcmoe.report.batches import Batches, BatchSizes, record_batches, rows_of_batches
from hpcmoe.report.tables import rows_of_balance
from hpcmoe.run.train import train_step


def test_batches_are_credited_to_the_experts_that_were_in_the_slots():
    traffic, batches = make_traffic(1), Batches()
    traffic.count_batches(0, [(0, 7), (1, 3)])
    traffic.count_batches(0, [(0, 5)])
    traffic.count_batches(1, [(1, 4)])
    assert traffic.batches == {(0, 0): (2, 12, 5, 7), (0, 1): (1, 3, 3, 3), (1, 1): (1, 4, 4, 4)}
    batches.add(traffic.batches)
    batches.credit_experts(SimpleNamespace(experts_of_rank=lambda layer, rank: np.array([4, 6])), 0)
    batches.add({(0, 0): (1, 9, 9, 9)})
    batches.credit_experts(SimpleNamespace(experts_of_rank=lambda layer, rank: np.array([6, 4])), 0)
    assert batches.of_expert == {(0, 4): (2, 12, 5, 7), (0, 6): (2, 12, 3, 9), (1, 6): (1, 4, 4, 4)}


def test_the_table_and_the_record_show_them():
    number = np.array([[2, 0], [1, 1]])
    sizes = BatchSizes(number=number, rows=np.array([[30, 0], [5, 9]]), least=number * 5, most=number * 9)
    ((name, value, unit),) = rows_of_batches(sizes, SimpleNamespace(batch_rows=256, works_at_once=True))
    assert (name, value, unit) == ("batch of an expert, B_e", "5 / 11 / 18", "rows, least / mean / most; not cut")
    kept = {}
    records = SimpleNamespace(describe=lambda chapter, name, value, unit: kept.update({f"{chapter}/{name}": value}))
    record_batches(records, sizes)
    assert kept["experts/batch_rows_most"].tolist() == [[18, 0], [9, 9]] and kept["experts/batches"] is number
    assert sizes.mean.tolist() == [[15, 0], [5, 9]]
    assert rows_of_batches(BatchSizes(number=number * 0, rows=number, least=number, most=number), None) == []


@pytest.mark.mpi
@pytest.mark.parametrize("gemm_rows", [0, 4])
@pytest.mark.parametrize("after", [(), (1,)])
def test_every_copy_is_in_one_batch_none_larger_than_asked_for(comm, shared, gemm_rows, after):
    """Also where experts move between the steps."""
    changes = MOVES | {"experts__gemm_rows": gemm_rows, "model__num_experts": 5, "comm__shared_memory": False}
    with open_small_job(comm, shared, **changes) as (job, optimizer, _):
        load, tokens = even_load(2, 5), 0
        for step in (1, 2, 3):
            job.meter.start()
            if step - 1 in after:
                force(job, optimizer, step)
            outcome, _ = train_step(job, optimizer, load, step)
            job.meter.read(outcome.stats)
            tokens = tokens + outcome.stats.tokens_of_expert
        job.meter.batches.credit_experts(job.placement, job.mesh.expert_index)
        batches = job.meter.batches.sum_over(comm, 2, 5)
    assert np.array_equal(batches.rows, tokens)
    worked = batches.number > 0
    assert (batches.least <= batches.mean).all() and (batches.mean <= batches.most).all()
    assert (batches.least[worked] >= 1).all() and not batches.most[~worked].any()
    if gemm_rows:
        assert batches.most.max() <= 6  # 1.5 times


@pytest.mark.parametrize(("sigma", "ending"), [(0.199, "aim < 0.2: met"), (0.2, "aim < 0.2: not met")])
def test_sigma_is_held_against_its_aim(sigma, ending):
    totals = SimpleNamespace(
        utilisation=np.ones((1, 2)), balancedness=1.0, link_sigma=sigma, link_sigma_floor=0.1, num_dropped=0
    )
    (row,) = [row for row in rows_of_balance(totals, []) if row[0] == "link balance sigma"]
    assert row[2].endswith(ending)
