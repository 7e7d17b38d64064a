"""What a checkpoint tells besides arrays: which function its weights were trained as, how, and on which data.

Other values of what makes the function are refused, other ways to train it and other data are logged. No generator has
a state of its own: what a step reads is drawn from seed and step, weights from the seed.
"""

import json
import logging

from hpcmoe.config import Config
from hpcmoe.dispatch.gate import renormalizes
from hpcmoe.errors import CheckpointError

log = logging.getLogger(__name__)


def describe_checkpoint(job, step):
    """Name what a checkpoint of a step is of -> flat dict."""
    position = {"step": step, "num_ranks": job.mesh.world.size}
    model = describe_sizes(job.config) | describe_function(job.config)
    return position | model | describe_training(job.config) | describe_data(job.config, len(job.training))


def describe_sizes(config: Config) -> dict:
    """Return what the shapes of the arrays tell too."""
    names = ("hidden", "feed_forward", "num_layers", "num_experts", "sequence_length")
    return {f"[model] {name}": getattr(config.model, name) for name in names}


def describe_function(config: Config) -> dict:
    """Return what shapes leave open of the function that the weights are for; keys without effect are left out.

    The biases of the choice act as the checkpoint holds them, whatever [dispatch] bias_update_speed moves them.
    """
    model, dispatch, experts = config.model, config.dispatch, config.experts
    function = {
        "[experts] kind": experts.kind,
        "[experts] bias": experts.bias,
        "[model] attention": model.attention,
        "[model] top_k": model.top_k,
        "[dispatch] renormalize": renormalizes(dispatch, model.top_k),
        "[dispatch] load_feedback": dispatch.load_feedback,
        "[dispatch] capacity_factor": dispatch.capacity_factor,
    }
    if model.attention:
        function["[model] num_heads"] = model.num_heads
    if dispatch.load_feedback > 0:
        function["[dispatch] load_feedback_on"] = dispatch.load_feedback_on
    return function


def describe_training(config: Config) -> dict:
    """Return what changes how the function is trained, or rounded; in inference what is left of that."""
    names_of_section = {"model": ["dtype"], "dispatch": ["load_window_steps"]}
    if config.run.mode == "train" or config.dispatch.capacity_factor > 0:
        names_of_section["pipeline"] = ["micro_batches"]  # each has a load-balancing loss, and a capacity, of its own
    if config.run.mode == "train":
        names_of_section["dispatch"] += ["aux_loss_weight", "z_loss_weight", "bias_update_speed"]
        names_of_section["train"] = [
            "learning_rate", "learning_rate_warmup_steps", "weight_decay", "beta1", "beta2", "epsilon", "clip_norm",
        ]  # fmt: skip
    return {
        f"[{section}] {name}": getattr(getattr(config, section), name)
        for section, names in names_of_section.items()
        for name in names
    }


def describe_data(config, text_bytes):
    """Name what, with the step, tells which sequences come next -> dict key: value."""
    return {
        "[run] seed": config.run.seed,
        "[data] batch_sequences": config.data.batch_sequences,
        "[data] files, bytes to train on": text_bytes,
    }


def check_metadata(metadata, config, checkpoint, step):
    """Refuse a checkpoint of another function, a line for each key, or one whose metadata are not whole."""
    if metadata.get("step") != step or "num_ranks" not in metadata:
        raise CheckpointError(f"{checkpoint}: its step is not the one in its name; it is not whole")
    wanted = describe_sizes(config) | describe_function(config)
    differing = [(key, wants) for key, wants in wanted.items() if metadata.get(key, wants) != wants]
    if differing:
        raise CheckpointError(
            "\n".join(format_mismatch(checkpoint, key, metadata[key], wants) for key, wants in differing)
        )


def format_mismatch(checkpoint, key, was, wants) -> str:
    """Return the line on a key of the function that is not what the checkpoint was written with."""
    was, option = type(wants)(was), key.replace("[", "").replace("] ", ".")
    return (
        f"{checkpoint}: was written with {key} = {json.dumps(was)}, this run has {json.dumps(wants)}, which is another "
        f"function: --set {option}={json.dumps(was)}, or begin anew without --resume"
    )


def log_changes(metadata, config, text_bytes):
    """Log what of a checkpoint is not known, and what is otherwise from here on, a line for each of these."""
    unknown = {key: value for key, value in describe_function(config).items() if key not in metadata}
    if unknown:
        taken = ", ".join(f"{key} = {json.dumps(value)}" for key, value in unknown.items())
        one = "; at top_k = 1 renormalize once made every gate 1, which now is p" * (config.model.top_k == 1)
        log.info("the checkpoint was written before its gate was recorded; this run takes %s%s", taken, one)
    changes = list_changes(metadata, describe_training(config))
    if changes:
        log.info("the same function, from here on with other settings: %s", "; ".join(changes))
    changes = list_changes(metadata, describe_data(config, text_bytes))
    if changes:
        log.info("the sequences from here on are not those that would have come: %s", "; ".join(changes))


def list_changes(metadata, now) -> list[str]:
    """List the values of `now` that the checkpoint, where it tells, has otherwise."""
    return [f"{key} = {value}, was {metadata[key]}" for key, value in now.items() if metadata.get(key, value) != value]
