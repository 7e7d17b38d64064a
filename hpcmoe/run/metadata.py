"""Metadata of a checkpoint: which function its weights were trained as, how, and on which data.

A checkpoint of another function is rejected; other settings of training and other data are logged. No generator has a
state of its own: a step's sequences are drawn from seed and step, weights from the seed.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from hpcmoe.config import Config
from hpcmoe.dispatch.gate import renormalizes
from hpcmoe.errors import CheckpointError

log = logging.getLogger(__name__)


def describe_checkpoint(config: Config, step: int, num_ranks: int, text_bytes: int) -> dict[str, Any]:
    """Return the metadata of a checkpoint of a step; text_bytes: of the text for training."""
    function = describe_shapes(config) | describe_function(config)
    return (
        {"step": step, "num_ranks": num_ranks}
        | function
        | describe_training(config)
        | describe_data(config, text_bytes)
    )


def describe_shapes(config: Config) -> dict[str, Any]:
    """Return the keys that the shapes of the arrays tell too."""
    if config.model.source == "hf":  # of any length of sequence
        return {}
    return read_keys(config, {"model": ["hidden", "feed_forward", "num_layers", "num_experts", "sequence_length"]})


def describe_function(config: Config) -> dict[str, Any]:
    """Return the keys that shapes do not tell of the function of the weights; keys without effect are left out.

    The biases of the choice act as the checkpoint holds them, whatever [dispatch] bias_update_speed moves them.
    """
    if config.model.source == "hf":  # the rest is in the model's config.json
        return read_keys(config, {"model": ["source"]})
    names_of_section = {
        "experts": ["kind", "bias"],
        "model": ["attention", "top_k"],
        "dispatch": ["load_feedback", "capacity_factor"],
    }
    if config.model.attention:
        names_of_section["model"].append("num_heads")
    if config.dispatch.load_feedback > 0:
        names_of_section["dispatch"].append("load_feedback_on")
    renormalize = renormalizes(config.dispatch, config.model.top_k)
    return {"[dispatch] renormalize": renormalize} | read_keys(config, names_of_section)


def describe_training(config: Config) -> dict[str, Any]:
    """Return the settings by which the function is trained, or rounded; in inference those that remain."""
    names_of_section = {"model": ["dtype"], "dispatch": ["load_window_steps"]}
    if config.run.mode == "train" or config.dispatch.capacity_factor > 0:
        names_of_section["pipeline"] = ["micro_batches"]  # each has its own load-balancing loss and capacity
    if config.run.mode == "train":
        names_of_section["dispatch"] += ["aux_loss_weight", "z_loss_weight", "bias_update_speed"]
        names_of_section["train"] = [
            "learning_rate", "learning_rate_schedule", "learning_rate_warmup_steps", "weight_decay", "beta1", "beta2",
            "epsilon", "clip_norm",
        ]  # fmt: skip
        if config.train.learning_rate_schedule != "constant":  # the rate falls to the last of the steps
            names_of_section["run"] = ["steps"]
            names_of_section["train"] += ["learning_rate_decay_steps", "learning_rate_final"]
    if config.model.source == "hf":
        names_of_section["model"] += ["trains", "aux_loss", "sequence_length"]
        del names_of_section["dispatch"]
    return read_keys(config, names_of_section)


def describe_data(config: Config, text_bytes: int) -> dict[str, Any]:
    """Return what determines, with the step, the sequences that come next."""
    keys = read_keys(config, {"run": ["seed"], "data": ["batch_sequences"]})
    return keys | {"[data] files, bytes to train on": text_bytes}


def read_keys(config: Config, names_of_section: dict[str, list[str]]) -> dict[str, Any]:
    """Return the values of some keys of a config, by "[section] key"."""
    return {
        f"[{section}] {name}": getattr(getattr(config, section), name)
        for section, names in names_of_section.items()
        for name in names
    }


def check_metadata(metadata: Mapping[str, Any], config: Config, checkpoint: str | os.PathLike, step: int) -> None:
    """Raise CheckpointError for a checkpoint of another function, a line for each key, or for incomplete metadata."""
    if metadata.get("step") != step or "num_ranks" not in metadata:
        raise CheckpointError(f"{checkpoint}: its step is not the one in its name; it is not whole")
    wanted = describe_shapes(config) | describe_function(config)
    differing = [(key, wants) for key, wants in wanted.items() if metadata.get(key, wants) != wants]
    if differing:
        lines = [format_mismatch(checkpoint, key, metadata[key], wants) for key, wants in differing]
        raise CheckpointError("\n".join(lines))


def format_mismatch(checkpoint: str | os.PathLike, key: str, was: Any, wants: Any) -> str:
    """Format the line on a key of the function that differs from the checkpoint's."""
    was, option = type(wants)(was), key.replace("[", "").replace("] ", ".")
    return (
        f"{checkpoint}: was written with {key} = {json.dumps(was)}, this run has {json.dumps(wants)}, which is another "
        f"function: --set {option}={json.dumps(was)}, or begin anew without --resume"
    )


def log_changes(metadata: Mapping[str, Any], config: Config, text_bytes: int) -> None:
    """Log what of the function a checkpoint does not know, and what is set differently from here on."""
    unknown = {key: value for key, value in describe_function(config).items() if key not in metadata}
    if unknown:
        taken = ", ".join(f"{key} = {json.dumps(value)}" for key, value in unknown.items())
        one = "; at top_k = 1 renormalize once made every gate 1, which now is p" * (config.model.top_k == 1)
        log.info("the checkpoint was written before its gate was recorded; this run takes %s%s", taken, one)
    for message, now in (
        ("the same function, from here on with other settings", describe_training(config)),
        ("the sequences from here on are not those that would have come", describe_data(config, text_bytes)),
    ):
        if changes := [f"{key} = {v}, was {metadata[key]}" for key, v in now.items() if metadata.get(key, v) != v]:
            log.info("%s: %s", message, "; ".join(changes))
