"""The placement problem that a run had, kept in its record, so that it can be placed again with the loads it saw."""

import dataclasses

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError
from hpcmoe.placement.demand import make_probability
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.write.hdf5 import raise_as_checkpoint_error, read_value
from hpcmoe.write.loads import read_loads

CHAPTER = "problem"
FIELDS = [field.name for field in dataclasses.fields(PlacementProblem) if field.name != "even"]  # every run's is


def record_problem(records, problem):
    """Keep a problem, field by field; where all nodes' probabilities are equal, one row for them all."""
    for name in FIELDS:
        value = getattr(problem, name)
        if name == "probability" and (value == value[:, :1]).all():
            value = value[:, :1]
        records.describe(CHAPTER, name, list(value) if isinstance(value, tuple) else value)


def read_run_problem(path, **changes):
    """Read a run.h5 -> (PlacementProblem with the loads that the run saw, notes); changes replace its other fields.

    Raises CheckpointError in one line where the file cannot be read or holds no problem.
    """
    with raise_as_checkpoint_error(path, "read"), h5py.File(path) as file:
        group = file.get(CHAPTER, {})
        if missing := [name for name in FIELDS if name not in group]:
            raise CheckpointError(f"{path}: holds no {CHAPTER}/{missing[0]}; must be the run.h5 of a finished start")
        facts = {name: read_value(group[name]) for name in FIELDS}

    facts["node_names"] = tuple(np.atleast_1d(facts["node_names"]))
    try:
        facts["probability"] = make_probability(read_loads(path), facts["node_names"])
        notes = ["probabilities are those of the tokens that the run routed"]
    except CheckpointError:
        notes = ["the run took no step: probabilities are those that it began with"]
        shape = facts["num_layers"], len(facts["rack_of_node"]), facts["num_experts"]
        facts["probability"] = np.broadcast_to(facts["probability"], shape)
    return PlacementProblem(**facts | changes), notes


def read_last_placement(path):
    """Read where the experts of a run were at last -> [L, S] int64; CheckpointError in one line."""
    with raise_as_checkpoint_error(path, "read"), h5py.File(path) as file:
        adopted = file.get("cluster/adopted/value", ())
        if len(adopted):
            return adopted[-1]
        return file["cluster/expert_of_replica"][:]
