"""One step over one batch: read it, run its micro-batches in lanes, sum the results over all ranks."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcmoe.clock import Timer
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.mpi import all_reduce
from hpcmoe.config import Config
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.ending import Ending
from hpcmoe.errors import attempt, on_all, raise_or_return
from hpcmoe.model.language import LanguageModel
from hpcmoe.model.routing_stats import RoutingStats
from hpcmoe.model.text import BlankText, Text, read_micro_batches
from hpcmoe.pipeline.lanes import Lanes
from hpcmoe.prepare.activations import ActivationTracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a step, over all ranks."""

    loss: Any  # float, mean cross-entropy, nats a byte; None where no head ran
    stats: RoutingStats
    norm: float | None = None  # of the gradients, before clipping; None where there are none


class Stepper:
    """Runs a network over batches of text."""

    def __init__(
        self, config: Config, mesh: Mesh, network: LanguageModel, dispatcher: TokenDispatcher, lanes: Lanes
    ) -> None:
        self.config, self.mesh, self.network, self.dispatcher = config, mesh, network, dispatcher
        self.clock, self.tracker, self.lanes = dispatcher.clock, ActivationTracker(network), lanes
        self.ending = Ending()

    def run(
        self, text: Text, starts: np.ndarray, load: np.ndarray, purpose: str, watched: Sequence[int] = ()
    ) -> Outcome:
        """Run the sequences that start there. purpose: "train" (leaves gradients), "evaluate" or "infer".

        The network keeps the activations of the watched layers. Raises ConfigError on all ranks where one cannot read
        its text. Collective over world.
        """
        # A step that some ranks cannot read runs on zeros there, ends on all, and is then rejected by all.
        rest = starts, self.config.model.sequence_length, self.config.pipeline.micro_batches, self.mesh
        with self.clock.measure(Timer.DATA):
            batches, error = attempt(lambda: read_micro_batches(text, *rest))
            if error is not None:
                batches = read_micro_batches(BlankText(), *rest)

        num_tokens = len(starts) * self.config.model.sequence_length
        self.network.begin(batches, num_tokens, load, purpose, watched)
        self.run_network(training=purpose == "train")

        # Sum routings, losses, errors and whether to end over all ranks.
        with self.clock.measure(Timer.WAITING):
            stats = self.network.routing.wait_stats()
            own = [self.network.sum_own_losses(), error is not None, self.ending.asks()]
            sums = all_reduce(self.mesh.world, np.array(own, np.float64))
            loss_sum, num_errors, num_asked = sums.tolist()
        self.ending.agree(num_asked)
        if num_errors > 0:
            on_all(self.mesh.world, lambda: raise_or_return(None, error))
        loss = None if purpose == "infer" else loss_sum / num_tokens
        return Outcome(loss=loss, stats=stats)

    def run_network(self, training: bool) -> None:
        """Run all micro-batches; measure the activations in flight in the first step of the run's kind."""
        lanes, num_micro_batches = self.lanes, self.config.pipeline.micro_batches
        measures = training == (self.config.run.mode == "train") and self.tracker.peak_bytes == 0
        lanes.observe = self.tracker.observe if measures else None

        def take(micro_batch: int) -> None:
            with self.tracker.hooks() if measures else contextlib.nullcontext():
                self.network.run(micro_batch)

        with torch.set_grad_enabled(training):
            lanes.run(take, num_micro_batches, self.dispatcher.sizes.num_in_flight)
