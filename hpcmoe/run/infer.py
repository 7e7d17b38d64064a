"""Inference: forward throughput of the stack, over a warm-up and then a measured window."""

from hpcmoe.run.data import draw_starts
from hpcmoe.run.progress import open_progress
from hpcmoe.run.train import is_due, report_step


def infer(job, records, load, save):
    """Run [run] warmup_steps, then the measured steps. Collective over all ranks."""
    run = job.config.run
    for number in range(1, run.warmup_steps + 1):
        infer_step(job, load, -number)
    with open_progress(run.steps, 0, job.mesh.world.rank == 0) as progress:
        for step in range(1, run.steps + 1):
            job.meter.start()
            outcome = infer_step(job, load, step)
            report_step(records, progress, step, outcome, job.meter.read(outcome))
            save(step, load, job.stepper.network.take_activations())


def infer_step(job, load, step):
    """Run one batch forward -> Outcome; warm-up steps are numbered below zero."""
    config, write = job.config, job.config.write
    starts = draw_starts(
        len(job.training), config.data.batch_sequences, config.model.sequence_length, config.run.seed, abs(step)
    )
    watched = write.activations_of_layers if is_due(step, write.activations_every, config.run.steps) else ()
    return job.stepper.run(job.training, starts, load, "infer", watched)
