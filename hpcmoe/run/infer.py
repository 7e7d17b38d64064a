"""Inference: forward throughput of the stack, over a warm-up and then a measured window."""

import numpy as np

from hpcmoe.model.balance import update_load
from hpcmoe.report.metrics import Recorder
from hpcmoe.run.job import Job
from hpcmoe.run.step import Outcome
from hpcmoe.run.train import Save, draw_batch, layers_to_write, measure_steps


def infer(job: Job, records: Recorder, load: np.ndarray, save: Save) -> dict[str, float]:
    """Run [run] warmup_steps, then the measured steps, and call save after each of these -> {}: no head, no loss.

    load [L, E] is what routers feel at first. Collective over world.
    """

    def take_step(step: int) -> Outcome:
        nonlocal load
        watched = layers_to_write(job.config, step)
        outcome = job.stepper.run(job.training, draw_batch(job, abs(step)), load, "infer", watched)
        load = update_load(load, outcome.stats.utilisation, job.config.dispatch.load_window_steps)
        return outcome

    for step in range(1, job.config.run.warmup_steps + 1):
        take_step(-step)
    measure_steps(job, records, None, 0, take_step, lambda step, _, activations: save(step, load, activations))
    return {}
