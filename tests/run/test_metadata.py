"""A checkpoint knows the function that its weights are for: another is rejected, other training and data are logged."""

import dataclasses
import logging
import pathlib
import shutil

import numpy as np
import pytest
from mpi4py import MPI
from small import make_config, open_small_job

from hpcmoe.config import Config
from hpcmoe.errors import CheckpointError
from hpcmoe.main import make_start
from hpcmoe.resuming import check_checkpoint
from hpcmoe.run.metadata import (
    check_metadata,
    describe_checkpoint,
    describe_data,
    describe_function,
    describe_shapes,
    describe_training,
    log_changes,
)
from hpcmoe.write.boxes import Piece
from hpcmoe.write.checkpoint import read_metadata, save_checkpoint
from hpcmoe.write.pieces import run_tasks

OLD = pathlib.Path(__file__).with_name("checkpoint_without_gate.tar.xz")  # as written before gates were recorded
OF_OLD = {
    "model__hidden": 2, "model__feed_forward": 2, "model__num_layers": 1, "model__num_experts": 3,
    "model__num_heads": 1, "model__sequence_length": 5, "data__batch_sequences": 2,
}  # fmt: skip
SAME_FUNCTION = {
    "restart": "*",  # keys that change when, where or in what order the same is computed, or what is read and kept
    "run": "name mode warmup_steps output threads_per_rank log_seconds log_json tensorboard trace trace_ranks",
    "cluster": "*",
    "parallel": "*",
    "placement": "*",
    "rebalance": "*",
    "comm": "*",
    "experts": "gemm_rows",
    "model": "source path make_tiny trains lora_rank lora_alpha lora_targets aux_loss gradient_checkpointing",  # of hf
    "pipeline": "schedule in_flight deterministic",
    "data": "files exclude text_field validation_share validation_sequences",  # the bytes that these leave are recorded
    "train": "bucket_bytes shard_optimizer check_every validate_every",
    "write": "*",
}
FUNCTION = {  # what differs: (in the checkpoint, in the run, the line's words)
    "renormalize": ({"dispatch__renormalize": False}, {}, "[dispatch] renormalize = false, this run has true"),
    "kind": ({"experts__kind": "relu"}, {}, '[experts] kind = "relu", this run has "gelu"'),
    "gated": ({"experts__kind": "swiglu"}, {}, '[experts] kind = "swiglu", this run has "gelu"'),
    "bias": ({}, {"experts__bias": True}, "[experts] bias = false, this run has true"),
    "load": ({"dispatch__load_feedback": 0.1}, {}, "[dispatch] load_feedback = 0.1, this run has 0.2"),
    "load on": ({}, {"dispatch__load_feedback_on": "both"}, '[dispatch] load_feedback_on = "selection", '),
    "capacity": ({"dispatch__capacity_factor": 1.25}, {}, "[dispatch] capacity_factor = 1.25, this run has 0.0"),
    "top_k": ({"model__top_k": 3}, {}, "[model] top_k = 3, this run has 2"),
    "attention": ({"model__attention": False}, {}, "[model] attention = false, this run has true"),
    "heads": ({"model__num_heads": 1}, {}, "[model] num_heads = 1, this run has 2"),
    "positions": ({"model__sequence_length": 9}, {}, "[model] sequence_length = 9, this run has 5"),
    "hidden": ({"model__hidden": 16}, {}, "[model] hidden = 16, this run has 8"),
}  # fmt: skip


def make_metadata(config, step=3, text_bytes=4000):
    """Return the metadata that a run of a config would write."""
    return describe_checkpoint(config, step, 1, text_bytes)


def test_every_key_is_of_the_function_of_its_training_of_the_data_or_of_none():
    config = make_config(train__learning_rate_schedule="cosine")  # to the last of [run] steps
    known = {
        *describe_shapes(config),
        *describe_function(config),
        *describe_training(config),
        *describe_data(config, 1),
    }
    for section in dataclasses.fields(Config):
        free = SAME_FUNCTION.get(section.name, "").split()
        for key in dataclasses.fields(section.default_factory):
            named = f"[{section.name}] {key.name}" in known
            assert named != ("*" in free or key.name in free), f"[{section.name}] {key.name}"


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("case", FUNCTION)
def test_another_function_is_refused_in_training_and_inference(case, mode):
    before, now, words = FUNCTION[case]
    metadata, config = make_metadata(make_config(**before)), make_config(run__mode=mode, **now)
    with pytest.raises(CheckpointError) as caught:
        check_metadata(metadata, config, "out/run/checkpoint-3", 3)
    (line,) = [line for line in str(caught.value).splitlines() if words in line]
    key, value = words.split(",")[0].replace("[", "").replace("] ", ".").split(" = ")
    assert line.startswith(f"out/run/checkpoint-3: was written with {words}") and f": --set {key}={value}, or" in line


def test_each_key_that_differs_has_a_line():
    before = {"dispatch__capacity_factor": 2.0, "dispatch__load_feedback": 0.0, "experts__kind": "relu"}
    with pytest.raises(CheckpointError) as caught:
        check_metadata(make_metadata(make_config(**before)), make_config(), "c", 3)
    lines = str(caught.value).splitlines()
    assert [line.split("with ")[1].split(" = ")[0] for line in lines] == [
        "[experts] kind", "[dispatch] load_feedback", "[dispatch] capacity_factor",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"model__attention": False}, {"model__attention": False, "model__num_heads": 4}),
        ({"dispatch__load_feedback": 0.0}, {"dispatch__load_feedback": 0.0, "dispatch__load_feedback_on": "both"}),
        ({"model__top_k": 1}, {"model__top_k": 1, "dispatch__renormalize": False}),
        ({"model__dtype": "bfloat16"}, {"run__mode": "infer"}),
        ({}, {"pipeline__micro_batches": 2, "pipeline__schedule": "serial", "placement__replicate": True}),
        ({}, {"dispatch__bias_update_speed": 0.1, "train__learning_rate": 1.0, "data__batch_sequences": 5}),
    ],
)
def test_what_has_no_effect_on_the_function_is_not_refused(before, now):
    check_metadata(make_metadata(make_config(**before)), make_config(**now), "c", 3)


@pytest.mark.parametrize("metadata", [{}, {"step": 2, "num_ranks": 1}, {"step": 3}])
def test_incomplete_metadata_is_refused(metadata):
    with pytest.raises(CheckpointError, match="it is not whole"):
        check_metadata(metadata, make_config(), "c", 3)


def test_other_training_is_one_line_and_other_data_another(caplog):
    metadata = make_metadata(make_config())
    with caplog.at_level(logging.INFO):
        log_changes(metadata, make_config(), 4000)
        assert caplog.messages == []
        changes = {"train__beta1": 0.5, "dispatch__z_loss_weight": 0.0, "model__dtype": "bfloat16", "run__seed": 7}
        log_changes(metadata, make_config(**changes), 4000)
    assert caplog.messages == [
        "the same function, from here on with other settings: [model] dtype = bfloat16, was float32; "
        "[dispatch] z_loss_weight = 0.0, was 0.001; [train] beta1 = 0.5, was 0.9",
        "the sequences from here on are not those that would have come: [run] seed = 7, was 0",
    ]


def test_inference_is_not_told_how_training_would_go_on(caplog):
    with caplog.at_level(logging.INFO):
        log_changes(make_metadata(make_config()), make_config(run__mode="infer", train__learning_rate=9.0), 4000)
    assert caplog.messages == []


def test_inference_is_told_of_other_micro_batches_where_each_has_a_capacity(caplog):
    capped = make_config(dispatch__capacity_factor=1.5)
    with caplog.at_level(logging.INFO):
        log_changes(make_metadata(capped), dataclasses.replace(capped, run=make_config(run__mode="infer").run), 4000)
        assert caplog.messages == []
        other = {"dispatch__capacity_factor": 1.5, "run__mode": "infer"}
        log_changes(make_metadata(capped), make_config(**other, pipeline__micro_batches=2), 4000)
    assert len(caplog.messages) == 1 and "[pipeline] micro_batches = 2, was 3" in caplog.messages[0]


def test_metadata_come_back_from_a_checkpoint_as_they_were(tmp_path):
    config = make_config(dispatch__load_feedback=0.3, experts__kind="swiglu", model__top_k=1)
    piece = Piece(name="x", shape=(1,), start=(0,), array=np.ones(1))
    run_tasks(save_checkpoint(MPI.COMM_SELF, tmp_path, 3, [piece], make_metadata(config), 1))
    metadata = read_metadata(tmp_path / "checkpoint-3")
    assert metadata == make_metadata(config)
    check_metadata(metadata, config, tmp_path, 3)


@pytest.fixture
def old(tmp_path):
    """A checkpoint that an earlier version wrote."""
    shutil.unpack_archive(OLD, tmp_path / "old")
    return tmp_path / "old" / "checkpoint-1"


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_an_old_checkpoint_still_loads_and_says_what_it_does_not_know(comm, tmp_path, old, mode, caplog):
    assert not [key for key in read_metadata(old) if "[dispatch]" in key]
    with open_small_job(comm, tmp_path, run__mode=mode, **OF_OLD) as (job, *_):
        check_checkpoint(old, tmp_path / "run", job.config, may_have_ended=False)
        with caplog.at_level(logging.INFO):
            start = make_start(job, old)
    assert start.step == 1 and start.load.shape == (1, 3) and not np.allclose(start.load, 1)
    (known,) = [message for message in caplog.messages if "before its gate was recorded" in message]
    assert known.endswith(
        "this run takes [dispatch] renormalize = true, [dispatch] load_feedback = 0.2, [dispatch] capacity_factor = "
        '0.0, [dispatch] load_feedback_on = "selection"'
    )


def test_what_an_old_checkpoint_knows_is_still_refused_before_anything_is_built(old, tmp_path):
    config = make_config(**OF_OLD | {"experts__kind": "relu"})
    with pytest.raises(CheckpointError, match=r'\[experts\] kind = "gelu", this run has "relu"'):
        check_checkpoint(old, tmp_path / "run", config, may_have_ended=False)


def test_of_an_old_checkpoint_with_one_choice_it_is_told_that_gates_were_1(caplog):
    metadata = {
        key: fact for key, fact in make_metadata(make_config(model__top_k=1)).items() if "[dispatch]" not in key
    }
    with caplog.at_level(logging.INFO):
        log_changes(metadata, make_config(model__top_k=1), 4000)
    assert "at top_k = 1 renormalize once made every gate 1" in caplog.text
