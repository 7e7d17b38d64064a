"""What an earlier run's record holds for placement: its problem, the loads that it saw, its last placement."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError
from hpcmoe.placement.demand import Loads, make_probability
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.write.hdf5 import read_entry
from hpcmoe.write.trust import damage_errors, find_own

if TYPE_CHECKING:
    from hpcmoe.write.records import Records  # which would start MPI

_CHAPTER = "problem"
_FIELDS = [field.name for field in dataclasses.fields(PlacementProblem) if field.name != "even"]  # every run's is
_BY_NODE, _BY_STEP, _NODE_NAMES = "experts/tokens_of_node", "experts/utilisation/value", "cluster/node_names"
_MIGRATED = "cluster/migrated/value", "cluster/adopted/value"  # of today, and of 0.2 and earlier
_PLACED = "cluster/expert_of_replica"
_UNITS = {"bytes_per_second": "B/s", "seconds": "s", "bytes": "B"}  # of fields whose names hold the word, first match
_LAST_STEPS = 10  # of a record without tokens by node


def record_problem(records: "Records", problem: PlacementProblem) -> None:
    """Record a problem, field by field; where all nodes' probabilities are equal, one row for them all."""
    for name in _FIELDS:
        value = getattr(problem, name)
        if name == "probability" and (value == value[:, :1]).all():
            value = value[:, :1]
        unit = next((unit for part, unit in _UNITS.items() if part in name), "")
        records.describe(_CHAPTER, name, list(value) if isinstance(value, tuple) else value, unit)


def read_run_problem(path: Path, **changes: Any) -> tuple[PlacementProblem, list[str]]:
    """Read a run.h5 -> (PlacementProblem with the loads that the run saw, notes); changes replace its other fields.

    Raises CheckpointError in one line where the file cannot be read or holds no problem.
    """
    # Read the fields.
    with damage_errors(path), h5py.File(path) as file:
        found = {name: find_own(file, f"{_CHAPTER}/{name}", path) for name in _FIELDS}
        if missing := [name for name, dataset in found.items() if dataset is None]:
            raise CheckpointError(f"{path}: holds no {_CHAPTER}/{missing[0]}; must be the run.h5 of a finished start")
        fields = {name: read_entry(dataset) for name, dataset in found.items()}

    # Take the probabilities from the loads, else as the run began.
    fields["node_names"] = tuple(np.atleast_1d(fields["node_names"]))
    try:
        fields["probability"] = make_probability(read_loads(path), fields["node_names"])
        notes = ["probabilities are those of the tokens that the run routed"]
    except CheckpointError:
        notes = ["the run took no step: probabilities are those that it began with"]
        shape = fields["num_layers"], len(fields["rack_of_node"]), fields["num_experts"]
        fields["probability"] = np.broadcast_to(fields["probability"], shape)
    return PlacementProblem(**fields | changes), notes


def read_loads(path: str | Path) -> Loads:
    """Read a run.h5 -> Loads: by node where they were recorded so, else of the last steps and all nodes together.

    Raises CheckpointError in one line where the file cannot be read or holds neither.
    """
    with damage_errors(path), h5py.File(path) as file:
        by_node, names, by_step = (find_own(file, name, path) for name in (_BY_NODE, _NODE_NAMES, _BY_STEP))
        if by_node is not None and by_node.ndim == 3 and names is not None:
            return Loads(tokens=by_node[:], node_names=tuple(np.atleast_1d(read_entry(names))))
        if by_step is not None and by_step.ndim == 3 and len(by_step) > 0:
            return Loads(tokens=by_step[-_LAST_STEPS:].mean(axis=0)[:, None], node_names=())
    raise CheckpointError(f"{path}: holds no tokens of experts; must be the run.h5 of a run that took a step")


def read_last_placement(path: Path) -> np.ndarray:
    """Read where the experts of a run were at last -> [L, S] int64; CheckpointError in one line."""
    with damage_errors(path), h5py.File(path) as file:
        for name in _MIGRATED:
            if (migrated := find_own(file, name, path)) is not None and len(migrated):
                return migrated[-1]
        if (first := find_own(file, _PLACED, path)) is not None:
            return first[:]
    raise CheckpointError(f"{path}: holds no {_PLACED}; must be the run.h5 of a finished start")
