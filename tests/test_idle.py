"""A key that was set and does nothing beside others is told with the reason; one that acts, or was not set, is not."""

import pytest

from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.idle import find_ineffective, list_cluster, list_comm, list_modes, list_routing, list_sources, list_turns


@pytest.fixture
def notes(tmp_path):
    """Read an empty run.toml with some --set -> the lines told."""
    (tmp_path / "run.toml").write_text("")
    return lambda *overrides: list(find_ineffective(read_config(tmp_path / "run.toml", overrides)[0]))


@pytest.mark.parametrize(
    ("idle", "because"),
    [
        ("run.warmup_steps=3", []),
        ("model.num_heads=8", ["model.attention=false"]),
        ("cluster.measure_seconds=9.0", ["cluster.links=a.json"]),
        ("placement.compare_eplb=true", ["placement.method=eplb"]),
        ("placement.search_iterations=7", ["placement.method=contiguous"]),
        ("rebalance.horizon=7", []),
        ("rebalance.margin=0.7", []),
        ("rebalance.moves=7", []),
        ("placement.spare_slots_per_rank=1", []),
        ("placement.replicate=true", ["parallel.expert=1"]),
        ("comm.transport=mpi", ["comm.device=host"]),
        ("comm.buffers=staged", ["comm.transport=nccl"]),
        ("comm.message_rows=7", ["comm.device=cuda"]),
        ("experts.gemm_rows=7", ["comm.device=cuda"]),
        ("comm.pool_bytes=7", ["parallel.expert=1", "parallel.tensor=1"]),
        ("comm.once_per_node=on", ["comm.shared_memory=false"]),
        ("dispatch.renormalize=false", ["model.top_k=16"]),
        ("dispatch.aux_loss_weight=0.5", ["model.top_k=16"]),
        ("dispatch.bias_update_speed=0.5", ["model.top_k=16"]),
        ("dispatch.load_feedback=0.5", ["model.top_k=16"]),
        ("dispatch.load_feedback_on=both", ["dispatch.load_feedback=0"]),
        ("dispatch.load_window_steps=7", ["dispatch.load_feedback=0"]),
        ("dispatch.capacity_factor=8.0", []),
        ("pipeline.schedule=serial", ["pipeline.micro_batches=1"]),
        ("pipeline.in_flight=3", ["pipeline.schedule=serial"]),
        ("write.checkpoints_kept=7", ["write.checkpoint_every=0"]),
        ("write.asynchronous=true", ["write.checkpoint_every=0"]),
        ("write.activations_every=7", []),
        ("train.learning_rate=0.5", ["run.mode=infer"]),
        ("train.validate_every=7", ["run.mode=infer"]),
        ("train.learning_rate_final=0.5", []),
        ("train.learning_rate_decay_steps=5", ["train.learning_rate_schedule=cosine"]),
        ("train.learning_rate_schedule=linear", ["run.mode=infer"]),
        ("write.checkpoint_every=7", ["run.mode=infer"]),
        ("dispatch.z_loss_weight=0.5", ["run.mode=infer"]),
        ("data.validation_sequences=7", ["run.mode=infer"]),
        ("model.trains=lora", []),
        ("write.hf_every=7", []),
        ("model.lora_rank=7", ["model.source=hf", "model.path=a"]),
        ("experts.kind=relu", ["model.source=hf", "model.path=a"]),
        ("rebalance.margin=0.7", ["model.source=hf", "model.path=a", "rebalance.every=10"]),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_told_and_without_it_nothing_is(notes, idle, because):
    section, _, rest = idle.partition(".")
    key = f"[{section}] {rest.partition('=')[0]} = "
    (line,) = [note for note in notes(idle, *because) if key in note]
    assert line.startswith("no effect: ") and line.isprintable()
    assert not any(key in note and note.startswith("no effect") for note in notes(*because))


@pytest.mark.parametrize(
    ("acts", "beside"),
    [
        ("run.warmup_steps=3", ["run.mode=infer"]),
        ("rebalance.moves=7", ["rebalance.every=10"]),
        ("placement.spare_slots_per_rank=1", ["placement.replicate=true"]),
        ("placement.spare_slots_per_rank=1", ["placement.method=./a"]),
        ("placement.search_iterations=7", ["placement.method=contiguous", "rebalance.every=10"]),
        ("placement.count_latency=true", []),
        ("dispatch.load_feedback=0.5", ["model.top_k=16", "dispatch.load_feedback_on=both"]),
        ("dispatch.bias_update_speed=0.5", ["model.top_k=16", "dispatch.capacity_factor=0.5"]),
        ("dispatch.capacity_factor=7.9", []),
        ("comm.transport=mpi", []),
        ("write.activations_every=7", ["write.activations_of_layers=[0]"]),
        ("pipeline.in_flight=3", ["pipeline.micro_batches=3"]),
        ("dispatch.load_window_steps=7", []),
        ("data.validation_sequences=7", ["train.validate_every=0"]),
        ("train.learning_rate_final=0.5", ["train.learning_rate_schedule=linear"]),
        ("train.learning_rate_decay_steps=5", ["train.learning_rate_schedule=warmup-stable-decay"]),
    ],
)
def test_a_key_that_acts_is_not_told(notes, acts, beside):
    assert not any(acts.partition("=")[0].split(".")[1] in note for note in notes(acts, *beside))


def test_keys_of_one_reason_are_told_in_one_line(notes):
    assert notes("rebalance.moves=7", "rebalance.margin=1.0") == [
        "no effect: [rebalance] margin = 1.0, [rebalance] moves = 7: [rebalance] every = 0"
    ]
    assert notes() == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pipeline.in_flight=5"], "[pipeline] in_flight = 5 acts as micro_batches = 2"),
        (
            ["rebalance.every=120"],
            "[rebalance] every = 120: [run] steps = 120 end before the first time",
        ),
        (["model.sequence_length=1"], "[model] sequence_length = 1 leaves queries and keys untrained"),
        (["model.num_experts=1", "model.top_k=1", "dispatch.z_loss_weight=0"], "leaves the routers untrained"),
        (
            ["model.num_experts=9000"],
            "batch_sequences 64 x sequence_length 64 x top_k 2 = 8192 assignments leave some untrained",
        ),
        (["train.learning_rate_warmup_steps=240"], "in [run] steps = 120 the rate rises to 0.5 of learning_rate"),
        (
            ["run.steps=20", "train.learning_rate_schedule=cosine"],
            "[run] steps = 20 less learning_rate_warmup_steps = 20 leave 0 in which the rate falls",
        ),
        (
            ["train.learning_rate_schedule=warmup-stable-decay", "train.learning_rate_decay_steps=101"],
            "leave 100 in which the rate falls",
        ),
        (["train.weight_decay=1e-7"], "is less than float32 can take off a weight: nothing decays"),
        (["train.learning_rate=1e-8"], "a step is about 1e-08 at most"),
        (["train.clip_norm=1e-20"], "a step is about 1e-14 at most"),
        (["train.epsilon=1e30"], "a step is about 1e-32 at most"),
    ],
)
def test_what_acts_in_part_and_what_stays_untrained_is_told(notes, overrides, said):
    assert sum(said in note for note in notes(*overrides)) == 1
    assert not any("untrained" in note or "the rate falls" in note for note in notes("run.mode=infer", *overrides))


def test_every_key_that_is_named_is_a_key():
    known = {f"{name}.{key}" for name, key, _ in list_keys()}
    parts = (list_modes, list_sources, list_cluster, list_comm, list_routing, list_turns)
    named = {key for part in parts for _, _, keys in part(Config()) for key in keys.split()}
    assert named <= known and len(named) > 40
