"""What a checkpoint tells besides arrays: what shapes leave open of the model, and where data and randomness stand.

No generator has a state of its own: what a step reads is drawn from seed and step, weights from the seed.
"""

import logging

from hpcmoe.errors import CheckpointError

log = logging.getLogger(__name__)


def describe_state(job, step):
    """Name what a checkpoint of a step is of -> flat dict."""
    position = {"step": step, "num_ranks": job.mesh.world.size}
    return position | describe_model(job.config) | describe_data(job.config, len(job.training))


def describe_model(config):
    """Name what shapes alone do not tell of a model -> dict key: value."""
    return {
        "[experts] kind": config.experts.kind,
        "[experts] bias": int(config.experts.bias),
        "[model] attention": int(config.model.attention),
        "[model] num_heads": config.model.num_heads,
        "[model] top_k": config.model.top_k,
    }


def describe_data(config, text_bytes):
    """Name what, with the step, tells which sequences come next -> dict key: value."""
    return {
        "[run] seed": config.run.seed,
        "[data] batch_sequences": config.data.batch_sequences,
        "[data] files, bytes to train on": text_bytes,
    }


def check_facts(facts, config, checkpoint, step):
    """Refuse a checkpoint of another model, or one whose facts are not whole."""
    if facts.get("step") != step or "num_ranks" not in facts:
        raise CheckpointError(f"{checkpoint}: its step is not the one in its name; it is not whole")
    for key, wants in describe_model(config).items():
        if facts.get(key) != wants:
            raise CheckpointError(f"{checkpoint}: was written with {key} = {facts.get(key)}, this run has {wants}")


def tell_other_data(facts, config, text_bytes):
    """Log in one line what makes this run read other sequences from here on than the one that wrote the checkpoint."""
    now = describe_data(config, text_bytes)
    changes = [f"{key} = {value}, was {facts.get(key)}" for key, value in now.items() if facts.get(key) != value]
    if changes:
        log.info("the sequences from here on are not those that would have come: %s", "; ".join(changes))
