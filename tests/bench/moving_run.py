"""What the moving bench runs on every rank: the same steps twice by turns, with experts that may move and that stay."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time

from bench.placement_run import CONFIG, SEED
from bench.skew import DrawnRouter, count_choices, make_weights, shift_weights
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import RebalanceConfig
from hpcmoe.errors import exit_with, on_root
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import find_text
from hpcmoe.placement.demand import Loads
from hpcmoe.run.job import open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.rebalance import Rebalancer
from hpcmoe.run.train import train_step
from hpcmoe.wait import barrier

NAMES = ("moves", "stays")
SECONDS_PER_TOKEN = 5e-7  # an expert's; timed, it would tell of what else runs on this machine
HOT = 4  # experts of each rack that change places with the other rack's


class Notes:
    """Records of what a Rebalancer tells: name -> (step, value)."""

    def __init__(self):
        self.values = {}

    def append(self, step, chapter, name, value, unit=""):
        """Keep the last value."""
        self.values[name] = (step, value)

    sample = append


def main(path, every, sequences):
    """Train for three intervals, the shift after the first; write path on rank 0. Collective over all ranks."""
    comm = MPI.COMM_WORLD
    config = make_config(sequences)
    topology = read_topology(comm, config.cluster)
    split = on_root(comm, lambda: find_text(config.data, config.model.sequence_length))
    before = make_weights(topology.rack_of_node, config.model.num_layers, config.model.num_experts, SEED)
    after = shift_weights(before, topology.rack_of_node, HOT)
    loads = Loads(tokens=count_choices(before, config.model.top_k, SEED), node_names=topology.node_names)
    with open_mesh(comm, config.parallel) as mesh, contextlib.ExitStack() as stack:
        runs = {}
        for name in NAMES:
            own = make_config(sequences, every if name == "moves" else 2**30)
            job = stack.enter_context(open_job(own, topology, mesh, split, loads))
            draw_routers(job, before)
            runs[name] = (job, *make_step(job))
        figures = {name: {"seconds": [], "losses": []} for name in NAMES}
        for step in range(1, 3 * every + 1):
            for name in NAMES[:: 1 if step % 2 else -1]:
                job, take, _ = runs[name]
                if step == every + 1:
                    draw_routers(job, after)
                barrier(comm)
                begin = time.perf_counter()
                loss = take(step)
                barrier(comm)
                figures[name]["seconds"].append(time.perf_counter() - begin)
                figures[name]["losses"].append(float(loss))
                if comm.rank == 0:  # also what there is so far, for whoever waits
                    pathlib.Path(path).write_text(json.dumps(figures | describe(runs, every), indent=1))


def describe(runs, every):
    """Tell what moved -> dict for JSON."""
    told = {name: entry for name, entry in runs["moves"][2].values.items() if not name.startswith("migrated")}
    return {"every": every, "told": told}


def make_config(sequences, every=0):
    """Make the placement bench's config with a smaller batch, rebalanced every so many steps."""
    data = dataclasses.replace(CONFIG.data, batch_sequences=sequences)
    placement = dataclasses.replace(CONFIG.placement, seconds_per_token=SECONDS_PER_TOKEN)
    return dataclasses.replace(CONFIG, data=data, placement=placement, rebalance=RebalanceConfig(every=every))


def make_step(job):
    """Make a call that takes the training step of a number as hpcmoe.run.train does -> (call, what was recorded)."""
    optimizer, notes = Optimizer(job.stepper.network, job.placement, job.config, job.mesh), Notes()
    rebalancer = Rebalancer(job, optimizer, notes)
    load = even_load(job.config.model.num_layers, job.config.model.num_experts)

    def take(step):
        rebalancer.start_if_due(step - 1)
        outcome, _ = train_step(job, optimizer, load, step)
        rebalancer.end_step(step, outcome.stats)
        return outcome.loss

    return take, notes


def draw_routers(job, weights):
    """Have the tokens of this rank choose experts by weights [L, nodes, E] from now on."""
    rank = job.mesh.world.rank
    for number, layer in enumerate(job.stepper.network.layers):
        of_node = weights[number, job.topology.node_of_rank[rank]]
        if isinstance(layer.router, DrawnRouter):
            layer.router.weights = of_node
        else:
            layer.router = DrawnRouter(layer.router, of_node, [SEED, number, rank])


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except Exception as error:
        exit_with(MPI.COMM_WORLD, error, read_host_name())
