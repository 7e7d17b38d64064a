"""What the overlap bench runs on every rank: steps whole, without work, and the work alone, into a JSON file."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
import torch
from bench.overlap import LANES, WAYS
from mpi4py import MPI
from torch import nn

from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.config import (
    ClusterConfig,
    CommConfig,
    Config,
    DataConfig,
    DispatchConfig,
    ModelConfig,
    PipelineConfig,
    PlacementConfig,
    RunConfig,
)
from hpcmoe.errors import exit_with, on_root
from hpcmoe.experts.timing import MOST_ROWS
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import draw_starts, find_text
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.prepare.placement import time_expert
from hpcmoe.run.job import open_job
from hpcmoe.wait import barrier
from hpcmoe.write.problem import read_loads

CONFIG = Config(
    run=RunConfig(mode="infer", threads_per_rank=1),
    model=ModelConfig(
        hidden=512, feed_forward=512, num_layers=2, num_experts=4, top_k=2, attention=False, sequence_length=64
    ),
    cluster=ClusterConfig(racks=("left", "left", "right", "right"), measure_seconds=4.0),
    placement=PlacementConfig(method="contiguous", seconds_per_token=1e-6),
    comm=CommConfig(once_per_node="off"),
    dispatch=DispatchConfig(load_feedback=0.0),
    pipeline=PipelineConfig(micro_batches=8, deterministic=False),
    data=DataConfig(batch_sequences=256),
)  # fmt: skip
STEP = 256  # between widths
TRANSFER_SECONDS = 3.0  # that a step's rows take over these hosts' links


class Recorder(nn.Module):
    """Experts that work, and remember on how many rows of which."""

    awaits_weights = False

    def __init__(self, experts, log):
        super().__init__()
        self.experts, self.log = experts, log

    def forward(self, slots, rows, kept):
        """rows [m, H] -> results [m, H]."""
        self.log.append((self.experts, slots, len(rows)))
        return self.experts(slots, rows, kept)


class Idle(nn.Module):
    """Experts that do nothing."""

    awaits_weights = False

    def forward(self, slots, rows, kept):
        """rows [m, H] -> the same."""
        return rows


def main(path, what, rounds):
    """Measure and write path on rank 0. Collective over all ranks."""
    comm = MPI.COMM_WORLD
    topology = read_topology(comm, CONFIG.cluster)
    split = on_root(comm, lambda: find_text(CONFIG.data, CONFIG.model.sequence_length))
    with open_mesh(comm, CONFIG.parallel) as mesh, contextlib.ExitStack() as stack:
        jobs = {}
        for name, config in (make_schedules(mesh) if what == "schedules" else make_ways()).items():
            loads = find_loads(config.placement.loads, config.model, read_loads)
            jobs[name] = stack.enter_context(open_job(config, topology, mesh, split, loads))
        figures = measure(jobs, comm, rounds, apart=what == "schedules")
        for name, job in jobs.items():
            figures[name]["feed_forward"] = job.config.model.feed_forward
        if comm.rank == 0:
            pathlib.Path(path).write_text(json.dumps(figures))


def make_schedules(mesh):
    """Vary the order of work -> dict name: Config. Collective over mesh.world."""
    model, configs = dataclasses.replace(CONFIG.model, feed_forward=choose_width(mesh)), {}
    for name in LANES:
        kind, _, in_flight = name.partition(" ")
        pipeline = dataclasses.replace(CONFIG.pipeline, schedule=kind, in_flight=int(in_flight or 1))
        configs[name] = dataclasses.replace(CONFIG, model=model, pipeline=pipeline)
    return configs


def choose_width(mesh):
    """Choose how wide experts are, so that their work takes about as long as transfers. Collective over mesh.world."""
    torch.set_num_threads(CONFIG.run.threads_per_rank)
    wide = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, feed_forward=8192), placement=PlacementConfig()
    )
    seconds_per_token = time_expert(wide.spec, mesh, MOST_ROWS, HostDevice())
    tokens = CONFIG.data.batch_sequences * CONFIG.model.sequence_length // mesh.world.size
    seconds = seconds_per_token * tokens * CONFIG.model.top_k * CONFIG.model.num_layers
    return max(round(8192 * TRANSFER_SECONDS / seconds / STEP), 1) * STEP


def make_ways():
    """Vary how a token goes to another node -> dict name: Config."""
    model = dataclasses.replace(CONFIG.model, num_experts=16, top_k=4)
    pipeline = dataclasses.replace(CONFIG.pipeline, schedule="arrival", in_flight=4)
    configs = {}
    for name in WAYS:
        comm = dataclasses.replace(CONFIG.comm, once_per_node=name)
        configs[name] = dataclasses.replace(CONFIG, model=model, pipeline=pipeline, comm=comm)
    return configs


def measure(jobs, comm, rounds, apart):
    """Take turns with the jobs, and with the parts of each -> {name: {part: seconds of each round}}."""
    figures = {name: {"whole": [], "transfers": [], "work": []} for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            log = []
            seconds = {"whole": clock(comm, lambda job=job, log=log: step(job, lambda experts: Recorder(experts, log)))}
            rows = job.stepper.dispatcher.pop_traffic().rows.sum(axis=0)
            if apart:
                seconds["transfers"] = clock(comm, lambda job=job: step(job, lambda experts: Idle()))
                seconds["work"] = clock(comm, lambda log=log: repeat(log))
            for part, taken in seconds.items():
                if number > 0:  # the first warms up
                    figures[name][part].append(taken)
            elsewhere = job.topology.node_of_rank != job.topology.node_of_rank[comm.rank]
            figures[name]["rows_between_nodes"] = int(all_reduce(comm, np.array([rows[elsewhere].sum()]))[0])
    return figures


def step(job, stand_in):
    """Run one batch forward, another module standing in for the experts of each layer."""
    network, model = job.stepper.network, job.config.model
    experts = [layer.experts.local for layer in network.layers]
    for layer in network.layers:
        layer.experts.local = stand_in(layer.experts.local)
    starts = draw_starts(len(job.training), job.config.data.batch_sequences, model.sequence_length, 0, 1)
    job.stepper.run(job.training, starts, even_load(model.num_layers, model.num_experts), "infer")
    for layer, own in zip(network.layers, experts, strict=True):
        layer.experts.local = own


def repeat(log):
    """Do an experts' log of work again, without anything around it."""
    x = torch.randn(max((rows for _, _, rows in log), default=1), CONFIG.model.hidden)
    for experts, slots, rows in log:
        experts(slots, x[:rows], None)


def clock(comm, call):
    """Call on all ranks -> seconds until the last is done. Collective over comm."""
    barrier(comm)
    begin = time.perf_counter()
    call()
    barrier(comm)
    return time.perf_counter() - begin


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except Exception as error:
        exit_with(MPI.COMM_WORLD, error, read_host_name())
