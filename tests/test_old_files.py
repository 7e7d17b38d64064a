"""Files that version 0.2.0 wrote, kept in tests/old, still load: a run's record, a checkpoint, a topology."""

import json

import h5py
import numpy as np
import pytest
from launch import ROOT
from small import Notes, open_small_job

from hpcmoe.cluster.topology import load_topology
from hpcmoe.config import Config
from hpcmoe.main import make_start
from hpcmoe.place import main as place
from hpcmoe.run.train import train
from hpcmoe.write.checkpoint import find_checkpoint, read_metadata
from hpcmoe.write.problem import read_last_placement, read_loads, read_run_problem

OLD = ROOT / "tests/old"
SAME = {
    "model__hidden": 16, "model__feed_forward": 16, "model__sequence_length": 16, "run__steps": 4,
    "data__batch_sequences": 8, "data__validation_sequences": 8, "train__validate_every": 2,
    "pipeline__micro_batches": Config().pipeline.micro_batches, "comm__buffer_factor": Config().comm.buffer_factor,
}  # fmt: skip


def test_a_record_gives_its_problem_loads_and_last_placement():
    problem, notes = read_run_problem(OLD / "run.h5")
    loads, layouts = read_loads(OLD / "run.h5"), read_last_placement(OLD / "run.h5")
    assert (problem.num_layers, problem.num_experts, problem.slots_per_rank, problem.replicate) == (2, 4, 3, True)
    assert loads.tokens.shape == (2, 1, 4) and loads.node_names == problem.node_names
    np.testing.assert_allclose(problem.probability, loads.tokens / loads.tokens.sum(axis=2, keepdims=True))
    assert notes == ["probabilities are those of the tokens that the run routed"]
    with h5py.File(OLD / "run.h5") as file:
        assert np.array_equal(layouts, file["cluster/adopted/value"][-1])


def test_hpcmoe_place_starts_from_a_record(tmp_path, capsys):
    record, answer = str(OLD / "run.h5"), tmp_path / "out.json"
    assert place([record, "--start", record, "--moves", "0", "-o", str(answer)]) == 0
    layouts = np.reshape(json.loads(answer.read_text())["expert_of_slot"], (2, -1))
    assert np.array_equal(layouts, read_last_placement(OLD / "run.h5"))


def test_a_topology_loads():
    topology = load_topology(OLD / "topology.json")
    assert topology.bytes_per_second.tolist() == [[1e9]] and topology.latency_seconds.tolist() == [[1e-6]]


def test_a_checkpoint_gives_its_metadata():
    metadata = read_metadata(OLD / "checkpoint-2")
    assert (metadata["step"], metadata["num_ranks"], metadata["[model] hidden"]) == (2, 2, 16)


@pytest.mark.mpi
def test_a_checkpoint_resumes_into_the_same_steps(comm, shared):
    notes = Notes()
    with open_small_job(comm, shared, text=(OLD / "text.txt").read_bytes(), **SAME) as (job, *_):
        start = make_start(job, find_checkpoint(comm, OLD))
        train(job, notes, start.optimizer, (start.step, start.load), lambda *_: None)
    with h5py.File(OLD / "run.h5") as file:
        for name in ("train/loss", "train/gradient_norm"):
            expected = dict(zip(file[name]["step"], file[name]["value"], strict=True))
            assert notes.values[name] == pytest.approx({step: expected[step] for step in (3, 4)}, rel=1e-5)
