"""What the placement bench runs on every rank: pairs of training steps, and the exchanges alone, into a JSON file."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
import torch
from bench.skew import DrawnRouter, count_choices, make_weights
from bench.stages import carry
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import ClusterConfig, Config, DataConfig, ModelConfig, PipelineConfig, RunConfig
from hpcmoe.errors import exit_with, on_root
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import draw_starts, find_text, read_micro_batches
from hpcmoe.placement.cost import layer_seconds, tokens_on_links
from hpcmoe.placement.demand import Loads
from hpcmoe.run.job import open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.train import train_step
from hpcmoe.wait import barrier

METHODS = ("packed", "contiguous")
WARMUP = 1  # pairs that do not count
SEED = 5
CONFIG = Config(
    run=RunConfig(threads_per_rank=1),
    model=ModelConfig(
        hidden=1024, feed_forward=16, num_layers=2, num_experts=16, top_k=2, attention=False, sequence_length=64
    ),
    cluster=ClusterConfig(racks=("left", "left", "right", "right"), measure_seconds=8.0),
    pipeline=PipelineConfig(micro_batches=2),
)


def main(path, pairs, sequences):
    """Measure and write path on rank 0. Collective over all ranks."""
    comm, config = MPI.COMM_WORLD, dataclasses.replace(CONFIG, data=DataConfig(batch_sequences=sequences))
    topology = read_topology(comm, config.cluster)
    split = on_root(comm, lambda: find_text(config.data, config.model.sequence_length))
    weights = make_weights(topology.rack_of_node, config.model.num_layers, config.model.num_experts, SEED)
    counts = count_choices(weights, config.model.top_k, SEED)
    loads = Loads(tokens=counts, node_names=topology.node_names)
    with open_mesh(comm, config.parallel) as mesh:
        with open_jobs(config, topology, mesh, split, (loads, weights)) as jobs:
            steppers = {method: make_stepper(job) for method, job in jobs.items()}
            figures = {"step_seconds": time_pairs(steppers, comm, pairs)}

        # A whole batch at once: what goes out is then as much as the links carry while one waits for the other.
        whole = dataclasses.replace(config, pipeline=PipelineConfig(micro_batches=1))
        with open_jobs(whole, topology, mesh, split, (loads, weights)) as jobs:
            exchangers = {method: make_exchanger(job) for method, job in jobs.items()}
            figures |= {"exchange_seconds": time_pairs(exchangers, comm, pairs)}
            if comm.rank == 0:
                figures |= describe(jobs, topology)
                pathlib.Path(path).write_text(json.dumps(figures, indent=1))


@contextlib.contextmanager
def open_jobs(config, topology, mesh, split, skew):
    """Open a job for each placement -> {method: Job}, their routers drawn; skew is (Loads, weights [L, nodes, E])."""
    loads, weights = skew
    with contextlib.ExitStack() as stack:
        jobs = {}
        for method in METHODS:
            placed = dataclasses.replace(config, placement=dataclasses.replace(config.placement, method=method))
            jobs[method] = stack.enter_context(open_job(placed, topology, mesh, split, loads))
            for number, layer in enumerate(jobs[method].stepper.network.layers):
                of_node = weights[number, topology.node_of_rank[mesh.world.rank]]
                layer.router = DrawnRouter(layer.router, of_node, [SEED, number, mesh.world.rank])
        yield jobs


def make_stepper(job):
    """Make a call that takes the training step of a number, optimizer and all."""
    optimizer = Optimizer(job.stepper.network, job.placement, job.config, job.mesh)
    load = even_load(job.config.model.num_layers, job.config.model.num_experts)
    return lambda step: train_step(job, optimizer, load, step)


def make_exchanger(job):
    """Make a call that sends every layer's tokens to their experts and straight home, and does no more -> seconds."""
    config, network, length = job.config, job.stepper.network, job.config.model.sequence_length

    def exchange(step):
        starts = draw_starts(len(job.training), config.data.batch_sequences, length, config.run.seed, step)
        batches = read_micro_batches(job.training, starts, length, config.pipeline.micro_batches, job.mesh)
        network.begin(batches, len(starts) * length, even_load(len(network.layers), config.model.num_experts), "infer")
        with torch.no_grad():
            return sum(
                time_carry(job, number, batch) for number in range(len(network.layers)) for batch in network.batches
            )

    return exchange


def time_carry(job, number, batch):
    """Route a micro-batch in a layer; then send its rows out and home -> seconds from the first to the last rank."""
    network, dispatcher = job.stepper.network, job.stepper.dispatcher
    block = network.layers[number]
    _, x = block.dense((network.embedding[batch[:, :-1]] + network.positions).flatten(0, 1))
    routing = block.router(x, network.load[number])
    plan = dispatcher.plan(routing.experts, routing.kept, block.experts.chooser)
    barrier(job.mesh.world)
    begin = time.perf_counter()
    carry(dispatcher, x, plan, routing.gates)
    barrier(job.mesh.world)
    return time.perf_counter() - begin


def time_pairs(calls, comm, pairs):
    """Take turns with the calls -> {method: seconds of each}, what a call returns or else its time on the wall."""
    seconds = {method: [] for method in calls}
    for number in range(1, 1 + WARMUP + pairs):
        for method in METHODS[:: 1 if number % 2 else -1]:
            barrier(comm)
            begin = time.perf_counter()
            told = calls[method](number)
            barrier(comm)
            taken = told if isinstance(told, float) else time.perf_counter() - begin
            if number > WARMUP:
                seconds[method].append(taken)
    return seconds


def predict(job):
    """Predict the seconds of a step's exchanges out and home, forward: what the busiest link, port or uplink takes."""
    problem = dataclasses.replace(job.problem, objective="ports")
    trips = 2 * job.config.pipeline.micro_batches * problem.num_layers
    shares = [all_shares(job.placement, layer) for layer in range(problem.num_layers)]
    carrying = sum(
        layer_seconds(problem, layer, experts, shares[layer])
        for layer, experts in enumerate(job.placement.expert_of_replica)
    )
    return 2 * carrying + trips * float(problem.latency_seconds.max())


def all_shares(placement, layer):
    """Collect every node's shares of a layer -> [nodes, S]."""
    return np.stack([placement.shares_of_node(layer, node) for node in range(max(placement.node_of_rank) + 1)])


def cross_rack_share(job):
    """Find the share of assignments that leave their rack."""
    problem, racks = job.problem, job.problem.rack_of_node
    crossing, total = 0.0, 0.0
    for layer, experts in enumerate(job.placement.expert_of_replica):
        sent = tokens_on_links(problem, layer, experts, all_shares(job.placement, layer))
        crossing += sent[racks[:, None] != racks].sum()
        total += sent.sum()
    return float(crossing / total)


def describe(jobs, topology):
    """Tell what was predicted, placed and measured of the cluster -> dict for JSON."""
    return {
        "predicted_seconds": {method: predict(job) for method, job in jobs.items()},
        "cross_rack_share": {method: cross_rack_share(job) for method, job in jobs.items()},
        "objective_seconds": {method: job.placement.objective_seconds for method, job in jobs.items()},
        "lower_bound_seconds": jobs["packed"].placement.lower_bound_seconds,
        "seconds_per_token": jobs["packed"].problem.seconds_per_token,
        "expert_of_replica": {method: job.placement.expert_of_replica.tolist() for method, job in jobs.items()},
        "bytes_per_second": topology.bytes_per_second.tolist(),
        "latency_seconds": topology.latency_seconds.tolist(),
        "egress_bytes_per_second": topology.egress_bytes_per_second.tolist(),
        "ingress_bytes_per_second": topology.ingress_bytes_per_second.tolist(),
        "uplink_bytes_per_second": topology.uplink_bytes_per_second.tolist(),
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except Exception as error:
        exit_with(MPI.COMM_WORLD, error, read_host_name())
