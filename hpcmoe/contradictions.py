"""Values of run.toml that are each allowed, but not together."""

from collections.abc import Iterator
from typing import Any

from hpcmoe.messages import show_value
from hpcmoe.paths import WORDS_OR_PATH, is_path

_SIZES = ("hidden", "feed_forward", "num_layers", "num_experts", "top_k", "attention", "num_heads")


def find_contradictions(config: Any) -> list[tuple[tuple[str, str], str]]:
    """Find values of a Config that do not fit together -> list of ((section, key), what its value must be)."""
    model, pipeline, data, train = config.model, config.pipeline, config.data, config.train

    # Check what is a word or a path.
    words = [
        (getattr(getattr(config, name), key) in allowed or is_path(getattr(getattr(config, name), key)), name, key,
         f"must be {', '.join(map(show_value, allowed))}, or a file, whose path has a / or a . in it")
        for (name, key), allowed in WORDS_OR_PATH.items()
    ]  # fmt: skip

    # Compare keys with each other.
    checks = [
        (model.top_k <= model.num_experts, "model", "top_k",
         f"must be at most num_experts = {model.num_experts}"),
        (not model.attention or model.hidden % model.num_heads == 0, "model", "num_heads",
         f"must divide hidden = {model.hidden}"),
        (model.source == "hf" or model.feed_forward % max(config.parallel.tensor, 1) == 0, "parallel", "tensor",
         f"must divide [model] feed_forward = {model.feed_forward}"),
        (pipeline.schedule != "arrival" or not pipeline.deterministic, "pipeline", "schedule",
         "needs deterministic = false: whichever micro-batch has rows goes on"),
        (pipeline.schedule != "arrival" or config.comm.transport != "nccl", "comm", "transport",
         'needs another [pipeline] schedule than "arrival": NCCL wants one order on all ranks'),
        (config.comm.device != "host" or config.comm.transport != "nccl", "comm", "transport",
         'needs GPUs: [comm] device = "host" has none'),
        (train.learning_rate_decay_steps <= config.run.steps, "train", "learning_rate_decay_steps",
         f"must be at most [run] steps = {config.run.steps}"),
        (not 0 < config.restart.wall_seconds <= config.restart.grace_seconds, "restart", "wall_seconds",
         f"must be 0, or more than grace_seconds = {config.restart.grace_seconds:g}"),
        (config.run.traced_steps is not None, "run", "trace", 'must be two steps, such as "5:8", or empty'),
        (is_within(config.run.traced_steps, config.run.steps), "run", "trace",
         f"must be from a step to the same or a later one, at most [run] steps = {config.run.steps}"),
        (pipeline.micro_batches <= data.batch_sequences, "pipeline", "micro_batches",
         f"must be at most [data] batch_sequences = {data.batch_sequences}"),
        (model.source == "hf" or all(layer < model.num_layers for layer in config.write.activations_of_layers), "write",
         "activations_of_layers", f"must be layers below [model] num_layers = {model.num_layers}"),
        (len(set(config.write.activations_of_layers)) == len(config.write.activations_of_layers), "write",
         "activations_of_layers", "must name each layer once"),
    ]  # fmt: skip
    of_source = find_hf_contradictions(config) if model.source == "hf" else ()
    return [*(((name, key), text) for fits, name, key, text in [*words, *checks] if not fits), *of_source]


def is_within(steps: range | None, last: int) -> bool:
    """Return True if steps that were named are some, the last of them at most `last`; also where none were."""
    return steps is None or steps.start == 0 or (len(steps) > 0 and steps[-1] <= last)


def find_hf_contradictions(config: Any) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the values of a Config that a model of Hugging Face transformers cannot have, as find_contradictions()."""
    model, source = config.model, '[model] source = "hf"'
    if not model.path:
        yield ("model", "path"), f"must be the folder of a checkpoint, for {source}"
    for key in _SIZES:
        if getattr(model, key) != getattr(type(model)(), key):
            yield ("model", key), f"must be left out: {source} has it from the config.json of the model"
    if config.write.activations_of_layers:
        yield ("write", "activations_of_layers"), f"must be empty for {source}"
    if config.placement.method not in ("packed", "contiguous"):
        yield (
            ("placement", "method"),
            f'must be "packed" or "contiguous" for {source}: experts are dealt evenly at first',
        )
