"""Two runs with [pipeline] deterministic agree bit for bit, whichever way rows travel and however late ranks are."""

import random
import time

import numpy as np
import pytest
import torch
from covering import usually
from small import open_small_job

from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.model.text import draw_starts

NODES = {"num_nodes": 2, "comm__message_rows": 3}
MODES = {
    "serial": {"pipeline__schedule": "serial"},
    "overlap": {"pipeline__in_flight": 3, "experts__gemm_rows": 7},
    "messages": {"comm__shared_memory": False, "comm__message_rows": 3, "comm__pool_bytes": 5000},
    "nodes": NODES | {"comm__once_per_node": "off"},
    "once a node": NODES | {"comm__once_per_node": "on", "comm__pool_bytes": 5000, "experts__gemm_rows": 9},
    "replicas": NODES | {"placement__replicate": True, "placement__spare_slots_per_rank": 2},
    "bfloat16": NODES | {"model__dtype": "bfloat16"},
    "small buckets": {"placement__replicate": True, "placement__spare_slots_per_rank": 2, "train__bucket_bytes": 100},
}


def run_steps(comm, folder, seed, monkeypatch, **changes):
    """Three steps, each rank late in its own way -> losses, and all gradients and parameters of this rank."""
    delay, look, values = random.Random(f"{comm.rank} {seed}"), Arrivals.poll, []

    def look_late(arrivals):
        if delay.random() < 0.1:
            time.sleep(2e-4)
        return look(arrivals)

    with monkeypatch.context() as patch, open_small_job(comm, folder, **changes) as (job, optimizer, _):
        patch.setattr(Arrivals, "poll", look_late)
        config = job.config
        load = np.ones((config.model.num_layers, config.model.num_experts))
        for step in range(1, 4):
            length, count = config.model.sequence_length, config.data.batch_sequences
            starts = draw_starts(len(job.training), count, length, config.run.seed, step)
            optimizer.zero_gradients()
            outcome = job.stepper.run(job.training, starts, load, "train")
            optimizer.sums.finish()
            values += [p.grad.clone() for p in job.stepper.network.parameters() if p.grad is not None]
            optimizer.step(step)
            values += [p.detach().clone() for p in job.stepper.network.parameters()] + [torch.tensor(outcome.loss)]
    return values


@pytest.mark.mpi
@pytest.mark.parametrize("mode", usually(MODES, "overlap", "messages", "once a node", "small buckets"))
def test_two_runs_agree_bit_for_bit(comm, shared, monkeypatch, mode):
    first, second = (run_steps(comm, shared, seed, monkeypatch, **MODES[mode]) for seed in range(2))
    assert len(first) == len(second) > 30
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
