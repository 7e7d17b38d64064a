"""One step over one batch: read it, run the schedule, add up what happened on all ranks."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.clock import Timer
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.errors import attempt, on_all, raise_or_return
from hpcmoe.model.language import RoutingStats
from hpcmoe.model.text import BlankText, read_micro_batches
from hpcmoe.pipeline.engine import Engine
from hpcmoe.pipeline.schedule import make_schedule
from hpcmoe.prepare.activations import ActivationTracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did, over all ranks."""

    loss: float | None  # mean cross-entropy, nats a byte; None where no head ran
    num_tokens: int
    stats: RoutingStats


class Stepper:
    """Runs a network over batches of text."""

    def __init__(self, config, mesh, network, dispatcher):
        self.config, self.mesh, self.network, self.dispatcher = config, mesh, network, dispatcher
        self.clock = dispatcher.clock
        self.engine = Engine(network, dispatcher)
        self.tracker = ActivationTracker(network)
        pipeline, num_layers = config.pipeline, config.model.num_layers
        self.schedules = {
            training: make_schedule(
                pipeline.schedule, num_layers, pipeline.micro_batches, dispatcher.sizes.num_in_flight, training
            )
            for training in (True, False)
        }

    def run(self, text, starts, load, purpose, watched_layers=()):
        """Run the sequences that start there -> Outcome. purpose: "train" (leaves gradients), "evaluate" or "infer".

        The network keeps the activations of watched_layers. Raises ConfigError on all ranks when one cannot read its
        text. Collective over all ranks.
        """
        length = self.config.model.sequence_length
        with self.clock.measure(Timer.DATA):
            batches, error = self.read(text, starts)
        num_tokens = len(starts) * length
        self.network.begin(batches, num_tokens, load, purpose, watched_layers)
        self.run_engine(purpose == "train")
        with self.clock.measure(Timer.WAITING):
            stats = self.network.wait_routing_stats()
            sums = all_reduce(self.mesh.world, np.array([float(self.network.loss_sum), error is not None]))
            loss_sum, num_faults = sums.tolist()
        if num_faults > 0:
            on_all(self.mesh.world, lambda: raise_or_return(None, error))
        loss = None if purpose == "infer" else loss_sum / num_tokens
        return Outcome(loss=loss, num_tokens=num_tokens, stats=stats)

    def read(self, text, starts):
        """Read this rank's share of a batch -> (its micro-batches, None), or (zeros in their place, what went wrong).

        So a step that some ranks cannot read ends on all, which then refuse it together.
        """
        rest = starts, self.config.model.sequence_length, self.config.pipeline.micro_batches, self.mesh
        batches, error = attempt(lambda: read_micro_batches(text, *rest))
        return (batches, None) if error is None else (read_micro_batches(BlankText(), *rest), error)

    def run_engine(self, training):
        """Run the schedule, and measure the activations in flight of the first step of the run's kind."""
        if training == (self.config.run.mode == "train") and self.tracker.peak_bytes == 0:
            with self.tracker.hooks():
                passing = self.engine.values
                self.engine.run(self.schedules[training], training, lambda held: self.tracker.observe(held, passing))
        else:
            self.engine.run(self.schedules[training], training)
