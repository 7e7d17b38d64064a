"""Training: steps of forward, backward and AdamW over real text, each one measured."""

import logging

from hpcmoe.clock import Timer
from hpcmoe.model.balance import update_biases, update_load
from hpcmoe.model.text import draw_starts, even_starts, share_of
from hpcmoe.report.progress import open_progress
from hpcmoe.run.finite import check_finite
from hpcmoe.run.rebalance import Rebalancer
from hpcmoe.run.replicas import check_replicas

log = logging.getLogger(__name__)


def train(job, records, optimizer, start, save):
    """Take the steps after start = (first step, load [L, E]) -> losses by name. Collective over all ranks.

    records takes append(step, chapter, name, value, unit); save(step, load, activations) is called after each step.
    """
    config, network = job.config, job.stepper.network
    first_step, load = start
    losses = {"validation loss, first": measure_validation_loss(job, load, first_step)}
    if first_step == 0:  # a resumed run has recorded it
        records.append(0, "train", "validation_loss", losses["validation loss, first"], "nats/byte")
    rebalancer = Rebalancer(job, optimizer, records)
    with open_progress(config.run.steps, first_step, job.mesh.world.rank == 0) as progress:
        for step in range(first_step + 1, config.run.steps + 1):
            job.meter.start()
            rebalancer.start_if_due(step - 1)
            outcome, norm = train_step(job, optimizer, load, step)
            metrics, activations = job.meter.read(outcome), network.take_activations()
            records.append(step, "train", "gradient_norm", norm)
            report_step(records, progress, step, outcome, metrics)
            rebalancer.end_step(step, outcome.stats)

            # What was measured acts on the next step's routers.
            load = update_load(load, outcome.stats.utilisation, config.dispatch.load_window_steps)
            update_biases(network.layers, outcome.stats.utilisation, config.dispatch.bias_update_speed)
            if is_due(step, config.train.validate_every, config.run.steps):
                losses["validation loss, last"] = measure_validation_loss(job, load, step)
                records.append(step, "train", "validation_loss", losses["validation loss, last"], "nats/byte")
            save(step, load, activations)
    return losses


def train_step(job, optimizer, load, step):
    """Run one batch forward and backward and update the parameters -> (Outcome, gradient norm before clipping)."""
    config = job.config
    length = config.model.sequence_length
    starts = draw_starts(len(job.training), config.data.batch_sequences, length, config.run.seed, step)
    optimizer.zero_gradients()
    outcome = job.stepper.run(job.training, starts, load, "train", layers_to_write(config, step))
    with job.stepper.clock.measure(Timer.OPTIMIZER):
        norm = optimizer.step(step)
    check_finite(step, config, loss=outcome.loss, norm_of_the_gradients=norm)
    if is_due(step, config.train.check_every, config.run.steps):
        with job.stepper.clock.measure(Timer.OPTIMIZER):
            check_replicas(job.stepper.network, optimizer.shared, job.mesh, step)
    return outcome, norm


def measure_validation_loss(job, load, step):
    """Measure the loss on validation sequences spread evenly over their text -> nats a byte. Collective."""
    data, length = job.config.data, job.config.model.sequence_length
    starts = even_starts(len(job.validation), data.validation_sequences, length)
    num_batches = -(-len(starts) // data.batch_sequences)
    parts = [starts[share_of(len(starts), index, num_batches)] for index in range(num_batches)]
    losses = [job.stepper.run(job.validation, part, load, "evaluate").loss for part in parts]
    loss = sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(starts)
    check_finite(step, job.config, validation_loss=loss)
    log.info("step %d: validation loss %.4f nats a byte", step, loss)
    return loss


def layers_to_write(config, step):
    """Name the layers whose activations a step writes: those asked for, where it is their turn -> tuple."""
    write = config.write
    return write.activations_of_layers if is_due(step, write.activations_every, config.run.steps) else ()


def is_due(step, every, last):
    """Whether something done every so many steps, and at the last, is due; every = 0 means never."""
    return every > 0 and (step % every == 0 or step == last)


def report_step(records, progress, step, outcome, metrics):
    """Record a step's figures and show them."""
    stats = outcome.stats
    figures = [
        ("run", "tokens_per_second", metrics.tokens_per_second, "tokens/s"),
        ("run", "seconds", metrics.seconds, "s"),
        ("dispatch", "link_sigma", metrics.links.sigma, "1"),
        ("dispatch", "link_sigma_of_layer", metrics.link_sigma_of_layer, "1"),
        ("dispatch", "link_tokens_mean", metrics.links.mean, "tokens"),
        ("dispatch", "dropped", stats.num_dropped, "assignments"),
        ("dispatch", "aux_loss", stats.aux_loss, "1"),
        ("dispatch", "z_loss", stats.z_loss, "1"),
        ("experts", "utilisation", stats.utilisation, "actual/expected tokens"),
        ("experts", "balancedness", metrics.balancedness, "mean/max tokens of a rank"),
        ("experts", "balancedness_of_layer", metrics.balancedness_of_layer, "mean/max tokens of a rank"),
    ]
    if outcome.loss is not None:
        figures.append(("train", "loss", outcome.loss, "nats/byte"))
    figures += [("run", f"seconds_{stage}", seconds, "s") for stage, seconds in metrics.seconds_of_stage.items()]
    for chapter, name, value, unit in figures:
        records.append(step, chapter, name, value, unit)
    records.flush_if_due()
    progress.show(step, outcome, metrics)
