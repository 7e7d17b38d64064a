"""Training: steps of forward, backward and AdamW over real text, each one measured."""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from hpcmoe.clock import Timer
from hpcmoe.config import Config
from hpcmoe.model.balance import update_biases, update_load
from hpcmoe.model.text import even_starts, share_of
from hpcmoe.pulse import open_pulse
from hpcmoe.report.meter import StepMetrics
from hpcmoe.report.metrics import Recorder
from hpcmoe.run.display import open_display
from hpcmoe.run.finite import check_finite
from hpcmoe.run.job import Job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.rebalance import Rebalancer
from hpcmoe.run.replicas import check_shared_parameters
from hpcmoe.run.step import Outcome
from hpcmoe.run.tracing import Tracing

log = logging.getLogger(__name__)
Activations = dict[str, np.ndarray]
Save = Callable[[int, np.ndarray, Activations], None]  # of step, load [L, E] and the watched layers' activations


def train(
    job: Job, records: Recorder, optimizer: Optimizer, start: tuple[int, np.ndarray], save: Save
) -> dict[str, float]:
    """Train from start = (first step, load [L, E]) on, call save after each step -> losses by name.

    Collective over world.
    """
    config, (first_step, load) = job.config, start
    losses = {"validation loss, first": measure_validation_loss(job, load, first_step)}
    if first_step == 0:  # a resumed run has recorded it
        records.append(0, "train", "validation_loss", losses["validation loss, first"], "nats/byte")

    def take_step(step: int) -> Outcome:
        outcome, norm = train_step(job, optimizer, load, step)
        records.append(step, "train", "gradient_norm", norm)
        records.append(step, "train", "learning_rate", optimizer.learning_rate)
        return dataclasses.replace(outcome, norm=norm)

    def end_step(step: int, outcome: Outcome, activations: Activations) -> None:
        # The measured load acts on the next step's routers.
        nonlocal load
        load = update_load(load, outcome.stats.utilisation, config.dispatch.load_window_steps)
        update_biases(job.stepper.network.layers, outcome.stats.utilisation, config.dispatch.bias_update_speed)
        if is_due(step, config.train.validate_every, config.run.steps):
            losses["validation loss, last"] = measure_validation_loss(job, load, step)
            records.append(step, "train", "validation_loss", losses["validation loss, last"], "nats/byte")
        save(step, load, activations)

    measure_steps(job, records, optimizer, first_step, take_step, end_step)
    return losses


def measure_steps(
    job: Job,
    records: Recorder,
    optimizer: Optimizer | None,
    first_step: int,
    take_step: Callable[[int], Outcome],
    end_step: Callable[[int, Outcome, Activations], None],
) -> None:
    """Run the steps after first_step: each is measured, recorded and shown, and experts may move before it.

    Collective over world.
    """
    config = job.config
    rebalancer, pulse = Rebalancer(job, optimizer, records), open_pulse()
    tracing = Tracing(config.run, job.mesh, job.stepper.dispatcher, job.stepper.network.device)
    with open_display(config, first_step, job.mesh.world.rank) as show:
        for step in range(first_step + 1, config.run.steps + 1):
            pulse.begin_step(step)
            with tracing.step(step):
                job.meter.start()
                rebalancer.start_if_due(step - 1)
                outcome = take_step(step)
                metrics, activations = job.meter.read(outcome.stats), job.stepper.network.take_activations()
            record_step(records, step, outcome, metrics)
            show(step, outcome.loss, None if optimizer is None else optimizer.learning_rate, metrics, outcome.norm)
            pulse.end_step(metrics.seconds)
            rebalancer.end_step(step, outcome.stats)
            end_step(step, outcome, activations)
            if job.stepper.ending.is_agreed:
                break
        tracing.finish()
    job.meter.hidden_share = tracing.hidden_share
    pulse.end_run()


def train_step(job: Job, optimizer: Optimizer, load: np.ndarray, step: int) -> tuple[Outcome, float]:
    """Run one batch forward and backward and update the parameters -> (Outcome, gradient norm before clipping)."""
    config = job.config
    optimizer.zero_gradients()
    outcome = job.stepper.run(job.training, draw_batch(job, step), load, "train", layers_to_write(config, step))
    open_pulse().name("the optimizer")
    with job.stepper.clock.measure(Timer.OPTIMIZER):
        norm = optimizer.step(step)
    check_finite(step, config, loss=outcome.loss, norm_of_the_gradients=norm)
    if is_due(step, config.train.check_every, config.run.steps):
        with job.stepper.clock.measure(Timer.OPTIMIZER):
            check_shared_parameters(job.stepper.network, optimizer.shared, job.mesh, step)
    return outcome, norm


def draw_batch(job: Job, step: int) -> np.ndarray:
    """Draw where the sequences of a step start -> int64 [batch_sequences]."""
    config = job.config
    length = config.model.sequence_length
    return job.training.draw(config.data.batch_sequences, length, config.run.seed, step)


def measure_validation_loss(job: Job, load: np.ndarray, step: int) -> float:
    """Measure the loss on validation sequences spread evenly over their text -> nats a byte. Collective over world."""
    data, length = job.config.data, job.config.model.sequence_length
    starts = even_starts(len(job.validation), data.validation_sequences, length)
    num_batches = -(-len(starts) // data.batch_sequences)
    parts = [starts[share_of(len(starts), index, num_batches)] for index in range(num_batches)]
    losses = [job.stepper.run(job.validation, part, load, "evaluate").loss for part in parts]
    loss = sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(starts)
    check_finite(step, job.config, validation_loss=loss)
    log.info("step %d: validation loss %.4f nats a byte", step, loss)
    return loss


def layers_to_write(config: Config, step: int) -> tuple[int, ...]:
    """Return the layers whose activations are due to be written at a step."""
    write = config.write
    return write.activations_of_layers if is_due(step, write.activations_every, config.run.steps) else ()


def is_due(step: int, every: int, last: int) -> bool:
    """Return True if something done every so many steps, and at the last, is due; every = 0 means never."""
    return every > 0 and (step % every == 0 or step == last)


def record_step(
    records: Recorder, step: int, outcome: Outcome, metrics: StepMetrics, loss_unit: str = "nats/byte"
) -> None:
    """Record a step's figures."""
    # List the figures with their units.
    figures = [
        ("run", "tokens_per_second", metrics.tokens_per_second, "tokens/s"),
        ("run", "seconds", metrics.seconds, "s"),
        ("dispatch", "link_sigma", metrics.link_sigma, "1"),
        ("dispatch", "link_sigma_of_layer", metrics.link_sigma_of_layer, "1"),
        ("dispatch", "link_tokens_mean", metrics.link_tokens_mean, "tokens"),
        ("dispatch", "dropped", metrics.num_dropped, "assignments"),
        ("dispatch", "aux_loss", outcome.stats.aux_loss, "1"),
        ("dispatch", "z_loss", outcome.stats.z_loss, "1"),
        ("experts", "utilisation", metrics.utilisation, "actual/expected tokens"),
        ("experts", "balancedness", metrics.balancedness, "mean/max tokens of a rank"),
        ("experts", "balancedness_of_layer", metrics.balancedness_of_layer, "mean/max tokens of a rank"),
        *(("run", f"seconds_{stage}", seconds, "s") for stage, seconds in metrics.seconds_of_stage.items()),
    ]
    if outcome.loss is not None:
        figures.append(("train", "loss", outcome.loss, loss_unit))

    # Record them.
    for chapter, name, value, unit in figures:
        if isinstance(value, np.ndarray):
            records.sample(step, chapter, name, value, unit)
        elif value is not None:
            records.append(step, chapter, name, value, unit)
    records.flush_if_due()
