"""The state is saved whole, each number once, and whoever takes it up holds the same state on any ranks."""

import numpy as np
import pytest
import torch
from small import gather_logical, gather_pieces, open_small_job

from hpcmoe.model.balance import read_biases, write_biases
from hpcmoe.model.text import draw_starts
from hpcmoe.run.state import BIAS, LOAD
from hpcmoe.wait import gather_to_all

SHAPES = {
    "one group": {},
    "biases, gated": {"experts__bias": True, "experts__kind": "swiglu"},
    "replicas": {"placement__replicate": True, "placement__spare_slots_per_rank": 1},
    "more experts": {"model__num_experts": 7},
    "tensor": {"parallel__tensor": 2, "experts__bias": True},
    "data": {"parallel__data": 2},
    "both": {"parallel__tensor": 2, "parallel__data": 2},
    "sharded": {"train__shard_optimizer": True, "experts__bias": True},
    "sharded, data": {"train__shard_optimizer": True, "parallel__data": 2},
}


def shape_for(comm, name):
    """The keys of a parallel shape, or skip where it does not fit the ranks."""
    changes = SHAPES[name]
    if comm.size % (changes.get("parallel__tensor", 1) * changes.get("parallel__data", 1)):
        pytest.skip("does not fit this number of ranks")
    return changes


def take_steps(job, optimizer, numbers):
    """Train on the batches of these steps."""
    model, data = job.config.model, job.config.data
    for number in numbers:
        starts = draw_starts(len(job.training), data.batch_sequences, model.sequence_length, 0, number)
        optimizer.zero_gradients()
        job.stepper.run(job.training, starts, np.ones((model.num_layers, model.num_experts)), "train")
        optimizer.step(number)


def moment_of(comm, optimizer, parameter, name):
    """A moment of a whole parameter, whoever has it. Collective for dense parameters: all ranks ask in one order."""
    pieces = [(p.first, optimizer.adamw.state[p.rows][name].numpy()) for p in optimizer.stepped_rows[parameter]]
    if optimizer.train.shard_optimizer and any(parameter is dense for dense in optimizer.dense.parameters):
        pieces = sorted(sum(gather_to_all(comm, pieces), []), key=lambda piece: piece[0])
    return torch.from_numpy(np.concatenate([rows for _, rows in pieces]))


def cut_out(arrays, wanted):
    """What a checkpoint would give for wanted()."""
    return {
        (w.name, w.start): arrays[w.name][tuple(slice(s, s + e) for s, e in zip(w.start, w.extent, strict=True))]
        for w in wanted
    }


@pytest.mark.mpi
@pytest.mark.parametrize("name", SHAPES)
def test_parts_tile_the_logical_arrays(comm, shared, name):
    with open_small_job(comm, shared, **shape_for(comm, name)) as (job, optimizer, state):
        load = np.random.default_rng(0).random(state.shared[LOAD].shape)
        take_steps(job, optimizer, [1])
        biases = np.random.default_rng(1).random(state.shared[BIAS].shape).astype(np.float32)
        write_biases(job.stepper.network.layers, biases)
        saved = gather_pieces(comm, state, {LOAD: load})
        for kind, array_of in (
            ("value", lambda p: p.data),
            ("first_moment", lambda p: moment_of(comm, optimizer, p, "exp_avg")),
            ("second_moment", lambda p: moment_of(comm, optimizer, p, "exp_avg_sq")),
        ):
            held = gather_logical(comm, state, array_of)
            for array, values in held.items():
                assert np.array_equal(saved.pop(f"{array}/{kind}"), values), array
                assert values.any() or array.endswith("_bias")
        assert np.array_equal(saved.pop("balance/load"), load)
        assert np.array_equal(saved.pop("balance/bias"), biases) and saved == {}


@pytest.mark.mpi
@pytest.mark.parametrize("name", SHAPES)
def test_a_state_taken_up_on_other_ranks_is_the_same_and_trains_on_alike(comm, shared, name):
    """All ranks save; each alone takes up, trains one step more as all do, and holds what they hold."""
    changes = shape_for(comm, name)
    model = {key: value for key, value in changes.items() if not key.startswith(("parallel", "placement"))}
    alone = comm.Split(comm.rank)
    (shared / str(comm.rank)).mkdir()
    with open_small_job(comm, shared, **changes) as (job, optimizer, state):
        take_steps(job, optimizer, [1, 2])
        biases = np.random.default_rng(1).normal(size=state.shared[BIAS].shape).astype(np.float32)
        write_biases(job.stepper.network.layers, biases)
        load = np.random.default_rng(0).random(state.shared[LOAD].shape)
        saved = gather_pieces(comm, state, {LOAD: load})
        take_steps(job, optimizer, [3])
        expected = gather_logical(comm, state, lambda p: p.data)
    with open_small_job(alone, shared / str(comm.rank), run__seed=5, **model) as (job, optimizer, state):
        assert np.array_equal(state.restore(cut_out(saved, state.list_wanted()), 2)[LOAD], load)
        assert np.array_equal(read_biases(job.stepper.network.layers), biases)
        again = gather_pieces(alone, state, {LOAD: load})
        assert again.keys() == saved.keys()
        assert all(np.array_equal(again[array], values) for array, values in saved.items())
        take_steps(job, optimizer, [3])
        for array, values in gather_logical(alone, state, lambda p: p.data).items():
            assert np.allclose(values, expected[array], atol=2e-4), array
    alone.Free()


@pytest.mark.mpi
def test_a_state_saved_alone_is_taken_up_by_all(comm, shared):
    alone = comm.Split(comm.rank)
    (shared / str(comm.rank)).mkdir()
    with open_small_job(alone, shared / str(comm.rank)) as (job, optimizer, state):
        take_steps(job, optimizer, [1])
        saved = gather_pieces(alone, state, {LOAD: np.ones((2, 4))})
    with open_small_job(comm, shared, run__seed=5) as (job, optimizer, state):
        state.restore(cut_out(saved, state.list_wanted()), 1)
        again = gather_pieces(comm, state, {LOAD: np.ones((2, 4))})
        assert all(np.array_equal(again[array], values) for array, values in saved.items())
        assert {entry["step"].item() for entry in optimizer.adamw.state.values()} == {1.0}
    alone.Free()


@pytest.mark.mpi
def test_without_an_optimizer_parameters_alone_are_wanted(comm, shared):
    with open_small_job(comm, shared, run__mode="infer") as (_, _, state):
        names = [part.name for part in state.list_wanted()]
        assert names[-2:] == ["balance/load", "balance/bias"]
        assert all(name.endswith("/value") for name in names[:-2])
        assert {part.name for part, _ in state.collect({})} <= set(names)


@pytest.mark.mpi
def test_each_axis_of_an_experts_weight_knows_its_key(comm, shared):
    with open_small_job(comm, shared, model__hidden=8, model__feed_forward=12) as (_, _, state):
        for part in state.list_wanted():
            if part.name.startswith("experts/"):
                sizes = {"[model] num_experts": 4, "[model] hidden": 8, "[model] feed_forward": 12}
                assert tuple(sizes[key] for key in part.keys[: len(part.shape)]) == part.shape, part.name


@pytest.mark.mpi
def test_inference_keeps_no_micro_batch_beyond_its_pass(comm, shared):
    """What is held does not grow with the number of micro-batches: at most two are in flight."""
    peaks = []
    for number in (2, 7):
        changes = {"run__mode": "infer", "pipeline__micro_batches": number, "data__batch_sequences": 4 * number}
        with open_small_job(comm, shared, **changes) as (job, _, _):
            job.stepper.run(job.training, np.arange(4 * number), np.ones((2, 4)), "infer")
            peaks.append(job.stepper.tracker.peak_bytes)
    assert peaks[1] <= 1.3 * peaks[0]
