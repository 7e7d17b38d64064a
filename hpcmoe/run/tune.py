"""Training and inference of a Hugging Face model: batches of tokens in lanes, each step measured as in our own runs."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcmoe.clock import Timer
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.config import Config
from hpcmoe.errors import ConfigError, attempt, on_all, raise_or_return
from hpcmoe.model.routing_stats import RoutingStats
from hpcmoe.model.text import BlankText, Text, even_starts, read_micro_batches, share_of
from hpcmoe.pulse import busy, open_pulse
from hpcmoe.report.metrics import Recorder
from hpcmoe.run.display import open_display
from hpcmoe.run.finite import check_finite
from hpcmoe.run.replicas import check_shared_model
from hpcmoe.run.schedules import learning_rate_at
from hpcmoe.run.step import Outcome
from hpcmoe.run.tracing import Tracing
from hpcmoe.run.train import is_due, record_step
from hpcmoe.run.tuning_job import TuningJob

log = logging.getLogger(__name__)
SaveStep = Callable[[int], None]  # of a step


def tune(job: TuningJob, records: Recorder, first_step: int, save: SaveStep) -> dict[str, float]:
    """Train from first_step on, call save after each step -> losses by name. Collective over world."""
    config = job.config
    losses = {"validation loss, first": measure_loss(job)}
    if first_step == 0:  # a resumed run has recorded it
        records.append(0, "train", "validation_loss", losses["validation loss, first"], job.loss_unit)

    def take_step(step: int) -> Outcome:
        """Train one step."""
        rebalance_if_due(job, records, step, first_step)
        outcome, norm = tune_step(job, step)
        records.append(step, "train", "gradient_norm", norm)
        records.append(step, "train", "learning_rate", rate_of(job))
        return dataclasses.replace(outcome, norm=norm)

    def end_step(step: int) -> None:
        """Validate and write what is due."""
        if is_due(step, config.train.validate_every, config.run.steps):
            losses["validation loss, last"] = measure_loss(job)
            records.append(step, "train", "validation_loss", losses["validation loss, last"], job.loss_unit)
        save(step)

    measure_tuning(job, records, first_step, take_step, end_step)
    return losses


def infer_tokens(job: TuningJob, records: Recorder) -> dict[str, float]:
    """Run [run] warmup_steps, then the measured steps -> the validation text's loss and perplexity.

    Collective over world.
    """
    loss = measure_loss(job)
    for step in range(1, job.config.run.warmup_steps + 1):
        run_batch(job, job.training, draw_batch_of(job, step), "infer", step)
    measure_tuning(
        job,
        records,
        0,
        lambda step: run_batch(job, job.training, draw_batch_of(job, step), "infer", step),
        lambda _: None,
    )
    return {"validation loss": loss, "perplexity": math.exp(loss)}


def measure_tuning(
    job: TuningJob, records: Recorder, first_step: int, take_step: Callable[[int], Outcome], end_step: SaveStep
) -> None:
    """Run the steps after first_step: each is measured, recorded and shown. Collective over world."""
    num_steps, pulse = job.config.run.steps, open_pulse()
    tracing = Tracing(job.config.run, job.mesh, job.stepper.dispatcher, job.group.device)
    with open_display(job.config, first_step, job.mesh.world.rank) as show:
        for step in range(first_step + 1, num_steps + 1):
            pulse.begin_step(step)
            with tracing.step(step):
                job.meter.start()
                outcome = take_step(step)
                metrics = job.meter.read(outcome.stats)
            pulse.end_step(metrics.seconds)
            record_step(records, step, outcome, metrics, job.loss_unit)
            show(step, outcome.loss, rate_of(job), metrics, outcome.norm)
            end_step(step)
            if job.stepper.ending.is_agreed:
                break
        tracing.finish()
    job.meter.hidden_share = tracing.hidden_share
    pulse.end_run()


def rate_of(job: TuningJob) -> float | None:
    """Return the learning rate of the last step, None in inference."""
    return None if job.optimizer is None else float(job.optimizer.adamw.param_groups[0]["lr"])


def tune_step(job: TuningJob, step: int) -> tuple[Outcome, float]:
    """Run one batch forward and backward and update what is trained -> (Outcome, gradient norm before clipping)."""
    config, group, model, optimizer = job.config, job.group, job.model, job.optimizer
    assert optimizer is not None  # it trains
    for parameter in model.parameters():
        parameter.grad = None
    outcome = run_batch(job, job.training, draw_batch_of(job, step), "train", step)
    open_pulse().name("the optimizer")
    with group.engine.clock.measure(Timer.OPTIMIZER):
        group.sum_gradients(model)
        norm = group.clip_grad_norm_(model, config.train.clip_norm or math.inf)
        check_finite(step, config, loss=outcome.loss, norm_of_the_gradients=norm)
        rate, sums = learning_rate_at(step, config.train, config.run.steps), group.gradients[model].sums
        assert sums is not None  # the gradients are summed
        optimizer.step(step, rate, sums)
        if is_due(step, config.train.check_every, config.run.steps):
            check_shared_model(model, job.layers, job.mesh, step)
    return outcome, norm


def draw_batch_of(job: TuningJob, step: int) -> np.ndarray:
    """Draw where the sequences of a step start -> int64 [batch_sequences]."""
    config = job.config
    return job.training.draw(config.data.batch_sequences, config.model.sequence_length, config.run.seed, step)


def run_batch(job: TuningJob, text: Text, starts: np.ndarray, purpose: str, step: int) -> Outcome:
    """Run the sequences that start there. purpose: "train" (leaves gradients), "evaluate" or "infer".

    Raises ConfigError on all ranks where one cannot read its text. Collective over world.
    """
    # A step that some ranks cannot read runs on zeros there, ends on all, and is then rejected by all.
    config, world, clock = job.config, job.mesh.world, job.group.engine.clock
    rest = starts, config.model.sequence_length, config.pipeline.micro_batches, job.mesh
    with clock.measure(Timer.DATA):
        batches, error = attempt(lambda: read_micro_batches(text, *rest))
        if error is not None:
            batches = read_micro_batches(BlankText(), *rest)

    # Run the micro-batches in lanes; the random numbers of a step depend on it alone, so that a resumed run has them.
    num_tokens, trains = len(starts) * config.model.sequence_length, purpose == "train"
    seed_generators(config.run.seed, step, world.rank)
    job.model.train(trains)
    with torch.set_grad_enabled(trains), track_activations(job, purpose):
        losses = list(job.group.lanes(lambda rows: run_rows(job, rows, num_tokens, trains), batches))

    # Sum losses, routings, errors and whether to end over all ranks.
    with clock.measure(Timer.WAITING):
        stats = count_tokens(job, num_tokens)
        own = [sum(losses), error is not None, job.stepper.ending.asks()]
        loss, num_errors, num_asked = all_reduce(world, np.array(own, np.float64)).tolist()
    job.stepper.ending.agree(num_asked)
    if num_errors > 0:
        on_all(world, lambda: raise_or_return(None, error))
    return Outcome(loss=loss, stats=stats)


def run_rows(job: TuningJob, rows: np.ndarray, num_tokens: int, trains: bool) -> float:
    """Run a micro-batch's rows [n, length + 1], forward and if it trains backward -> this rank's part of the loss.

    The loss is the mean cross-entropy of num_tokens, those of all ranks and micro-batches. The auxiliary loss, if any,
    is the mean of the micro-batches', and not in what is returned.
    """
    tokens = torch.from_numpy(rows.astype(np.int64)).to(job.group.device.torch_device)
    targets = tokens[:, 1:].contiguous()
    asked = {"output_router_logits": True} if trains and job.config.model.aux_loss else {}
    output = job.model(
        input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, num_items_in_batch=num_tokens, use_cache=False,
        **asked,
    )  # fmt: skip
    loss, auxiliary = output.loss, getattr(output, "aux_loss", None)
    if isinstance(auxiliary, torch.Tensor):
        auxiliary = job.model.router_aux_loss_coef * auxiliary
        loss = loss - auxiliary
    if trains:
        whole = loss if auxiliary is None else loss + auxiliary / job.config.pipeline.micro_batches
        whole.backward()
    return loss.item()


@contextlib.contextmanager
def track_activations(job: TuningJob, purpose: str) -> Any:
    """Measure the activations in flight in the first step of the run's kind."""
    tracker, lanes = job.stepper.tracker, job.group.engine
    measures = purpose == job.config.run.mode and tracker.peak_bytes == 0
    lanes.observe = tracker.observe if measures else None
    with tracker.hooks() if measures else contextlib.nullcontext():
        yield


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Start torch's random numbers of a rank's step."""
    (drawn,) = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn))


def count_tokens(job: TuningJob, num_tokens: int) -> RoutingStats:
    """Count how a step's tokens were routed, over all ranks -> RoutingStats. Collective over world."""
    shape = len(job.layers), job.spec.model.num_experts
    own, total = np.zeros(shape, np.int64), np.zeros(shape)
    for index, layer in enumerate(job.layers):
        own[index, : layer.num_experts] = layer.tokens_of_expert.numpy(force=True)
    counts = job.group.counts.pop("loads")
    for index, layer in enumerate(job.layers):
        total[index, : layer.num_experts] = counts[layer.number]
    even = total.sum(axis=1, keepdims=True) / [[layer.num_experts] for layer in job.layers]
    return RoutingStats(
        num_tokens=num_tokens,
        num_dropped=0,
        tokens_of_expert=total,
        own_tokens=own,
        utilisation=total / np.maximum(even, 1e-9),
        aux_loss=None,
        z_loss=None,
    )


def measure_loss(job: TuningJob) -> float:
    """Measure the loss on validation sequences spread evenly over all -> nats a token. Collective over world."""
    data, length = job.config.data, job.config.model.sequence_length
    starts = even_starts(len(job.validation), data.validation_sequences, length)
    num_batches = max(len(starts) // data.batch_sequences, 1)
    parts = [starts[share_of(len(starts), index, num_batches)] for index in range(num_batches)]
    losses = [run_batch(job, job.validation, part, "evaluate", 0).loss for part in parts]
    return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(starts)


def rebalance_if_due(job: TuningJob, records: Recorder, step: int, first_step: int) -> None:
    """Move the experts to where their tokens would have them, before a step at which that is due.

    Collective over world.
    """
    if step == first_step + 1:
        records.append(
            step, "cluster", "migrated", job.placement.expert_of_replica, "expert of each slot, from here on"
        )
    every = job.config.rebalance.every
    if every == 0 or step == first_step + 1 or (step - 1) % every:
        return
    with job.group.engine.clock.measure(Timer.WAITING), busy("moving experts"):
        job.meter.batches.credit_experts(job.placement, job.mesh.expert_index)
        moved = job.group.rebalance(job.model, job.optimizer and job.optimizer.adamw)
    log.info("step %d: %d experts have moved to where their tokens come from", step, moved)
    records.append(step, "cluster", "moved", moved, "replicas")
    if moved:
        records.append(
            step, "cluster", "migrated", job.placement.expert_of_replica, "expert of each slot, from here on"
        )


def check_aux_loss(model: Any, config: Config) -> None:
    """Raise ConfigError where [model] aux_loss asks for a loss that the model's family has not."""
    if config.model.aux_loss and not hasattr(model, "router_aux_loss_coef"):
        raise ConfigError(f"[model] aux_loss = true: model type {model.config.model_type!r} has no auxiliary loss")
