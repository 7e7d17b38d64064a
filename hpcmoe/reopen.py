"""A run's network built anew from one of its checkpoints, at any number of ranks, without the run's config and text."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import Config, make_config
from hpcmoe.errors import CheckpointError, ConfigError, on_root
from hpcmoe.model.language import LanguageModel
from hpcmoe.model.split import Split
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.run.job import Job, open_job
from hpcmoe.run.ranks import read_group_topology
from hpcmoe.run.state import LOAD, TrainingState
from hpcmoe.write.boxes import PieceSpec
from hpcmoe.write.checkpoint import read_metadata
from hpcmoe.write.pieces import read_pieces
from hpcmoe.write.problem import read_loads

_KEY = re.compile(r"\[(model|experts|dispatch)\] (\w+)")  # of the metadata, in which it names a key of the network


@contextlib.contextmanager
def open_network(
    comm: MPI.Intracomm, checkpoint: Path, sequences_per_rank: int, threads: int = 0
) -> Iterator[LanguageModel]:
    """Open the network of a checkpoint, its weights read -> LanguageModel, which keeps its routers' last loads.

    It drops no tokens: what exceeds an expert's capacity in training does so by what else is in the batch.
    sequences_per_rank: the most that go through it at once; threads: of torch, 0: a rank's share of the cores.
    Collective over comm, both ends. Raises ConfigError, ClusterError, PlacementError or CheckpointError on all ranks.
    """
    config = on_root(comm, lambda: make_network_config(checkpoint, sequences_per_rank * comm.size, threads))
    topology, nothing = read_group_topology(comm, ""), Split(training=(), validation=())
    loads = find_loads(config.placement.loads, config.model, read_loads)
    with open_mesh(comm, config.parallel) as mesh, open_job(config, topology, mesh, nothing, loads) as job:
        load = read_parameters(job, checkpoint)
        job.stepper.network.begin([], 0, load, "infer")
        yield job.stepper.network


def make_network_config(checkpoint: Path, num_sequences: int, threads: int) -> Config:
    """Make the Config of inference with a checkpoint's network. Raises CheckpointError where its metadata say none."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in read_metadata(checkpoint).items():
        if match := _KEY.fullmatch(name):
            plain = value.item() if isinstance(value, np.generic) else value
            tree.setdefault(match[1], {})[match[2]] = plain
    if "num_experts" not in tree.get("model", {}):
        raise CheckpointError(f"{checkpoint}: is no checkpoint of a run of this program: it names no num_experts")
    tree.setdefault("dispatch", {})["capacity_factor"] = 0.0
    tree |= {
        "run": {"mode": "infer", "threads_per_rank": threads},
        "parallel": {"tensor": 1},
        "pipeline": {"micro_batches": 1, "schedule": "serial"},
        "data": {"batch_sequences": num_sequences},
    }
    try:
        return make_config(tree, lambda *_: str(checkpoint))
    except ConfigError as error:
        raise CheckpointError(f"{error}") from None


def read_parameters(job: Job, checkpoint: Path) -> np.ndarray:
    """Read the parameters of this rank from a checkpoint -> the load that the routers feel, [L, E]. Collective."""
    state = TrainingState(job, None)
    wanted = [
        PieceSpec(name=part.name, shape=part.shape, start=part.start, extent=part.extent, keys=part.keys)
        for part in state.list_wanted()
    ]
    arrays, metadata = read_pieces(job.mesh.world, checkpoint, wanted)
    return state.restore(arrays, int(metadata["step"]))[LOAD]
