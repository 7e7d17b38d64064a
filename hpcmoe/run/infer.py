"""Inference: forward throughput of the stack, over a warm-up and then a measured window."""

from hpcmoe.model.balance import update_load
from hpcmoe.model.text import draw_starts
from hpcmoe.report.progress import open_progress
from hpcmoe.run.rebalance import Rebalancer
from hpcmoe.run.train import layers_to_write, report_step


def infer(job, records, load, save):
    """Run [run] warmup_steps, then the measured steps -> no losses, for no head runs. Collective over all ranks.

    load [L, E] is what routers feel at first; save(step, load, activations) is called after each measured step.
    """
    run = job.config.run
    for number in range(1, run.warmup_steps + 1):
        _, load = infer_step(job, load, -number)
    rebalancer = Rebalancer(job, None, records)
    with open_progress(run.steps, 0, job.mesh.world.rank == 0) as progress:
        for step in range(1, run.steps + 1):
            job.meter.start()
            rebalancer.start_if_due(step - 1)
            outcome, load = infer_step(job, load, step)
            report_step(records, progress, step, outcome, job.meter.read(outcome))
            rebalancer.end_step(step, outcome.stats)
            save(step, load, job.stepper.network.take_activations())
    return {}


def infer_step(job, load, step):
    """Run one batch forward -> (Outcome, load for the next); warm-up steps are numbered below zero."""
    config = job.config
    starts = draw_starts(
        len(job.training), config.data.batch_sequences, config.model.sequence_length, config.run.seed, abs(step)
    )
    outcome = job.stepper.run(job.training, starts, load, "infer", layers_to_write(config, step))
    return outcome, update_load(load, outcome.stats.utilisation, config.dispatch.load_window_steps)
