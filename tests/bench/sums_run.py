"""What the sums bench runs on every rank: training steps with buckets and without, by turns, into a JSON file."""

import contextlib
import dataclasses
import json
import pathlib
import sys

from bench.pairs import compare, take_turns
from bench.sums import AFTER, BESIDE
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    PlacementConfig,
    RunConfig,
    TrainConfig,
)
from hpcmoe.errors import exit_with, on_root
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import find_text
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.run.job import open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.train import train_step
from hpcmoe.write.problem import read_loads

CONFIG = Config(
    run=RunConfig(threads_per_rank=1),
    model=ModelConfig(hidden=384, feed_forward=768, num_layers=4, num_experts=4, top_k=2, sequence_length=64),
    cluster=ClusterConfig(racks=("left", "left", "right", "right")),
    parallel=ParallelConfig(data=4),
    placement=PlacementConfig(method="contiguous", seconds_per_token=1e-6),
    pipeline=PipelineConfig(micro_batches=2),
    data=DataConfig(batch_sequences=64),
)  # fmt: skip
BUCKET_BYTES = {BESIDE: 1_000_000, AFTER: 0}


def main(path, budget_seconds):
    """Measure and write path on rank 0. Collective over all ranks."""
    comm = MPI.COMM_WORLD
    topology = read_topology(comm, CONFIG.cluster)
    split = on_root(comm, lambda: find_text(CONFIG.data, CONFIG.model.sequence_length))
    load, calls = even_load(CONFIG.model.num_layers, CONFIG.model.num_experts), {}
    with open_mesh(comm, CONFIG.parallel) as mesh, contextlib.ExitStack() as stack:
        for name, bucket_bytes in BUCKET_BYTES.items():
            config = dataclasses.replace(CONFIG, train=TrainConfig(bucket_bytes=bucket_bytes))
            job = stack.enter_context(
                open_job(config, topology, mesh, split, find_loads(config.placement.loads, config.model, read_loads))
            )
            optimizer = Optimizer(job.stepper.network, job.placement, config, mesh)
            calls[name] = lambda job=job, optimizer=optimizer: train_step(job, optimizer, load, 1)
        figures = compare(take_turns(comm, calls, budget_seconds), BESIDE, AFTER)
        figures["gradient_bytes"] = optimizer.dense.flat.nbytes + optimizer.shared.flat.nbytes
    if comm.rank == 0:
        pathlib.Path(path).write_text(json.dumps(figures))


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except Exception as error:
        exit_with(MPI.COMM_WORLD, error, read_host_name())
