"""Runs of tiny Hugging Face models in one process group, and the same training by transformers alone on one process."""

import contextlib
import itertools

import numpy as np
import torch
from small import Notes, make_config, make_topology
from tiny_families import make_model

import hpcmoe
from hpcmoe.finetune import open_run_group, read_state, save_state
from hpcmoe.model.order import number_sequences
from hpcmoe.run.model_optimizer import is_decayed
from hpcmoe.run.schedules import learning_rate_at
from hpcmoe.run.trained_parts import checkpoint_activations, set_trained
from hpcmoe.run.tune import tune
from hpcmoe.run.tuned_state import TunedState
from hpcmoe.run.tuning_job import make_tuning_job
from hpcmoe.wait import gather_to_all
from hpcmoe.write.writer import open_writer

LENGTH, VOCABULARY = 10, 90
QUICK = {
    "model.source": "hf", "model.path": "tiny", "model.hidden": 64, "model.feed_forward": 128, "model.num_experts": 16,
    "model.num_heads": 4, "model.sequence_length": LENGTH, "run.steps": 4, "data.batch_sequences": 12,
    "data.validation_sequences": 12, "pipeline.micro_batches": 2, "train.learning_rate": 0.003,
    "train.learning_rate_warmup_steps": 2, "train.learning_rate_schedule": "cosine", "train.clip_norm": 0.5,
    "train.check_every": 2, "train.validate_every": 0, "write.checkpoint_every": 0, "run.threads_per_rank": 1,
}  # fmt: skip


class DrawnText:
    """Random tokens in place of a TokenText."""

    def __init__(self, seed):
        self.tokens = np.random.default_rng(seed).integers(3, VOCABULARY, 600)

    def __len__(self):
        return len(self.tokens)

    def sequences(self, starts, length):
        return np.stack([self.tokens[start : start + length + 1] for start in starts]).astype(np.int64)

    def draw(self, num_sequences, length, seed, step):
        return number_sequences(step, num_sequences, (len(self) - 1) // length, seed) * length


def make_tuning_config(**changes):
    """Make the Config of a small run, some keys changed, as section__key=value."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return make_config(**{key.replace(".", "__"): value for key, value in (QUICK | changes).items()})


@contextlib.contextmanager
def open_tuning(comm, family="mixtral", num_nodes=1, placement=None, **changes):
    """Open a group and a job in it -> TuningJob. Collective over comm."""
    config = make_tuning_config(**changes)
    with open_run_group(comm, config, make_topology(comm.size, min(num_nodes, comm.size))) as group:
        model = make_model(family).to(getattr(torch, config.model.dtype))
        hpcmoe.hf.spread(model, group, placement=placement)
        set_trained(model, config.model, 0)
        if config.model.gradient_checkpointing:
            checkpoint_activations(model)
        yield make_tuning_job(config, group, model, DrawnText(1), DrawnText(2), 0)


def run_tuning(comm, **options):
    """Train -> what was recorded, by name and step."""
    with open_tuning(comm, **options) as job:
        return train_job(job)[0]


def train_job(job, folder=None, resume=None):
    """Train a job, from a checkpoint if there is one, each step's going to the folder if any -> (values, numbers)."""
    notes, comm = Notes(), job.mesh.world
    first_step = 0 if resume is None else read_state(job, resume)
    if folder is None:
        tune(job, notes, first_step, lambda step: None)
    else:
        with open_writer(comm, folder, 9, asynchronous=job.config.write.asynchronous) as writer:
            tune(job, notes, first_step, lambda step: save_state(job, writer, step))
    return notes.values, gather_numbers(job)


def gather_numbers(job):
    """Put together what all ranks hold of a job's state -> array by logical name. Collective."""
    held = [
        (part.name, part.shape, part.start, part.extent, tensor.float().numpy(force=True).reshape(part.extent).copy())
        for part, tensor in TunedState(job.mesh, job.model, job.optimizer).list_held()
    ]
    whole = {}
    for name, shape, start, extent, array in itertools.chain(*gather_to_all(job.mesh.world, held)):
        box = tuple(slice(first, first + count) for first, count in zip(start, extent, strict=True))
        whole.setdefault(name, np.full(shape, np.nan, np.float32))[box] = array
    assert not any(np.isnan(array).any() for array in whole.values())
    return whole


def tune_plainly(family="mixtral", trained=lambda name: True, **changes):
    """Train by transformers alone, on one process -> (losses, gradient norms, the model)."""
    config, text = make_tuning_config(**changes), DrawnText(1)
    model = make_model(family)
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    train, losses, norms = config.train, [], []
    groups = [
        {
            "params": [p for name, p in named if is_decayed(name, p) == decays],
            "weight_decay": train.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon)
    for step in range(1, config.run.steps + 1):
        starts = text.draw(config.data.batch_sequences, LENGTH, config.run.seed, step)
        rows = torch.from_numpy(text.sequences(starts, LENGTH))
        targets = rows[:, 1:]
        asked = {"output_router_logits": True} if config.model.aux_loss else {}
        parts = rows.split(len(rows) // (config.pipeline.micro_batches if asked else 1))  # each has an auxiliary loss
        total = 0.0
        for part in parts:
            output = model(input_ids=part[:, :-1], labels=part[:, 1:], shift_labels=part[:, 1:].contiguous(),
                           num_items_in_batch=targets.numel(), **asked)  # fmt: skip
            auxiliary = model.router_aux_loss_coef * output.aux_loss if asked else torch.zeros(())
            (output.loss - auxiliary + auxiliary / len(parts)).backward()
            total += (output.loss - auxiliary).item()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in named], train.clip_norm)))
        for group in adamw.param_groups:
            group["lr"] = learning_rate_at(step, train, config.run.steps)
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses, norms, model
