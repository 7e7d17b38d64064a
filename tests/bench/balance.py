"""How each mechanism evens the load of a router that prefers experts Zipf-like, and what it costs the loss.

The same small language model trains on the same text from the same weights, once by each mechanism alone, on sixteen
ranks of this machine. Its routers' weights lean towards some experts (bench/skew.py).
"""

import statistics
from dataclasses import replace

import numpy as np
from bench import ranks
from bench.skew import skew_routers
from tabulate import tabulate

from hpcmoe.cluster.discover import read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import Config, DispatchConfig, PipelineConfig, PlacementConfig, RunConfig, TrainConfig
from hpcmoe.errors import on_root
from hpcmoe.model.balance import even_load
from hpcmoe.model.text import find_text
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.report.totals import compute_sampling_floors
from hpcmoe.run.job import open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.train import train
from hpcmoe.write.problem import read_loads

RANKS, STEPS = 16, 60
LAST = 10  # steps at the end that count as after
EXPONENT, COMMON = (
    0.5,
    1.0,
)  # of the routers' skew: at first the k-th expert then has about k ** -1 of the first's tokens
OFF = DispatchConfig(load_feedback=0.0, aux_loss_weight=0.0)
MECHANISMS = {
    "none": OFF,
    "feedback 0.1 on selection": replace(OFF, load_feedback=0.1),
    "feedback 0.3 on selection": replace(OFF, load_feedback=0.3),
    "feedback 0.3 on both": replace(OFF, load_feedback=0.3, load_feedback_on="both"),
    "auxiliary loss 0.05": replace(OFF, aux_loss_weight=0.05),
    "bias 0.03": replace(OFF, bias_update_speed=0.03),
}
CONFIG = Config(
    placement=PlacementConfig(method="contiguous", seconds_per_token=1e-6),
    pipeline=PipelineConfig(micro_batches=1),
    train=TrainConfig(learning_rate=0.001, validate_every=10**6),  # validates at the last step
)
SERIES = {"loss": "train/loss", "sigma": "dispatch/link_sigma", "balancedness": "experts/balancedness",
          "utilisation": "experts/utilisation", "seconds": "run/seconds"}  # fmt: skip


def measure(folder, num_ranks=RANKS, steps=STEPS, names=tuple(MECHANISMS)):
    """Train by each of some mechanisms, "none" among them -> figures."""
    return summarize(ranks.run_ranks(num_ranks, "balance", folder, steps, *names))


def work(comm, steps, *names):
    """Train by each mechanism, one after the other -> figures by mechanism, and the floor. Collective over comm."""
    config = replace(CONFIG, run=RunConfig(steps=int(steps), threads_per_rank=1))
    topology = read_topology(comm, config.cluster)
    split = on_root(comm, lambda: find_text(config.data, config.model.sequence_length))
    loads = find_loads(config.placement.loads, config.model, read_loads)  # all experts alike
    figures = {"ranks": comm.size, "steps": config.run.steps, "mechanisms": {}}
    with open_mesh(comm, config.parallel) as mesh:
        for name in names:
            with open_job(replace(config, dispatch=MECHANISMS[name]), topology, mesh, split, loads) as job:
                figures["mechanisms"][name] = train_skewed(job)
                figures["sigma_floor"] = compute_sampling_floors(job)[0]
    return figures


def train_skewed(job):
    """Train with skewed routers -> {name: its value at each step}, and the last validation loss. Collective."""
    model, notes = job.config.model, Notes()
    skew_routers(job, EXPONENT, COMMON)
    optimizer = Optimizer(job.stepper.network, job.placement, job.config, job.mesh)
    start = (0, even_load(model.num_layers, model.num_experts))
    losses = train(job, notes, optimizer, start, lambda *state: None)
    return {name: notes.series[key] for name, key in SERIES.items()} | {"validation": losses["validation loss, last"]}


class Notes:
    """Records that keep each metric as a list."""

    def __init__(self):
        self.series = {}

    def append(self, step, chapter, name, value, unit=""):
        """Keep a value as JSON can hold it."""
        self.series.setdefault(f"{chapter}/{name}", []).append(np.asarray(value).tolist())

    sample = append

    def flush_if_due(self):
        """Nothing waits."""


def summarize(figures):
    """Add what the series say: the first step, the mean of the last ones, and the loss against none's -> figures."""
    none = figures["mechanisms"]["none"]
    for series in figures["mechanisms"].values():
        busy = np.mean(series["utilisation"][-LAST:], axis=0)
        apart = [ours - theirs for ours, theirs in zip(series["loss"], none["loss"], strict=True)]
        series["summary"] = {
            "balancedness": [series["balancedness"][0], statistics.mean(series["balancedness"][-LAST:])],
            "sigma": [series["sigma"][0], statistics.mean(series["sigma"][-LAST:])],
            "utilisation": [busy.min(), busy.max()],
            "loss_against_none": statistics.mean(apart[-LAST:]),
            "validation_against_none": series["validation"] - none["validation"],
            "seconds": statistics.median(series["seconds"]),
        }
    return figures


def make_table(figures):
    """Lay the figures out -> text."""
    rows = []
    for name, series in figures["mechanisms"].items():
        told = series["summary"]
        rows.append((
            name,
            *(f"{value:.3f}" for value in told["balancedness"]),
            "{:.2f} - {:.2f}".format(*told["utilisation"]),
            *(f"{value:.3f}" for value in told["sigma"]),
            f"{told['loss_against_none']:+.4f}",
            f"{told['validation_against_none']:+.4f}",
            f"{1e3 * told['seconds']:.0f}",
        ))  # fmt: skip
    headers = (
        "mechanism", "balancedness, first", "last", "U_e, last", "sigma, first", "last",
        "loss - none's", "validation", "step, ms",
    )  # fmt: skip
    none = figures["mechanisms"]["none"]
    return (
        f"{tabulate(rows, headers=headers, disable_numparse=True)}\n\n"
        f"{figures['ranks']} ranks; step 1, and the mean of the last {LAST} of {figures['steps']}; sampling floor of "
        f"sigma {figures['sigma_floor']:.3f}; none's loss {statistics.mean(none['loss'][-LAST:]):.4f}, "
        f"validation {none['validation']:.4f} nats/byte"
    )


if __name__ == "__main__":
    ranks.main(work)
