"""A placement that moves: loads are measured, rank 0 solves anew, experts move where that gains more than it costs."""

import dataclasses
import logging
from typing import Any

import numpy as np

from hpcmoe.clock import Timer
from hpcmoe.experts.shapes import estimate_expert, make_expert_shape
from hpcmoe.model.routing_stats import RoutingStats
from hpcmoe.placement.demand import Loads, make_probability
from hpcmoe.placement.groups import fold_groups, fold_probability, list_groups
from hpcmoe.placement.migrate import (
    MigrationDecision,
    Moves,
    estimate_layer_seconds,
    estimate_move_seconds,
    list_moves,
    should_migrate,
    standard_error,
)
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.result import Placement
from hpcmoe.prepare.placement import RunPlacement, compare_with_methods, evaluate_layouts
from hpcmoe.pulse import busy
from hpcmoe.report.meter import gather_by_node
from hpcmoe.report.metrics import Recorder
from hpcmoe.run.job import Job
from hpcmoe.run.migrate import start_migration
from hpcmoe.run.move_experts import Migration
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.wait import broadcast, gather_to_all

log = logging.getLogger(__name__)

_PARTS = 4  # of an interval's steps: the search sees every other part, the others evaluate what it found
_MIN_STEPS = 2  # of an interval


class Rebalancer:
    """Counts the loads of a run, and every [rebalance] every steps decides whether its experts move."""

    def __init__(self, job: Job, optimizer: Optimizer | None, records: Recorder):
        """optimizer: None in inference."""
        self.job, self.optimizer, self.records = job, optimizer, records
        self.every = job.config.rebalance.every
        self.parts: Any = 0  # [_PARTS, L, E] assignments whose home is this rank
        self.num_steps = 0  # that are counted in them
        self.migration: Migration | None = None  # under way
        self.decision: MigrationDecision | None = None  # on it
        self.is_new = True  # is the placement of the next step to be recorded?

    def start_if_due(self, step: int) -> None:
        """Solve anew after `step` steps, where it is due, and start to move the experts. Collective over world."""
        if self.every == 0 or self.num_steps < _MIN_STEPS or step % self.every:
            return
        with self.job.stepper.clock.measure(Timer.WAITING), busy("solving for the placement"):
            tokens = gather_by_node(self.job.mesh.world, self.parts, self.job.topology.node_of_rank)
            num_parts = min(self.num_steps, _PARTS)
            self.parts, self.num_steps = 0, 0
            mine = None if tokens is None else propose_migration(self.job, tokens[:num_parts], step)
            decision, layout = broadcast(self.job.mesh.world, mine)
        log_decision(step, decision)
        if decision.accepted:
            self.decision, self.is_new = decision, True
            self.migration = start_migration(self.job, self.optimizer, layout, decision.moves)
            self.job.stepper.dispatcher.register(self.migration)

    def end_step(self, step: int, stats: RoutingStats) -> None:
        """Count a step's tokens, and record the migration that it began with. Collective over world."""
        if self.is_new:
            self.record_placement(step)
        if self.every == 0:
            return
        if np.ndim(self.parts) == 0:
            self.parts = np.zeros((_PARTS, *stats.own_tokens.shape), np.int64)
        self.parts[self.num_steps % _PARTS] += stats.own_tokens
        self.num_steps += 1
        if self.migration is not None and self.decision is not None:
            seconds = max(gather_to_all(self.job.mesh.world, self.migration.seconds))
            self.job.staged_bytes = max(self.job.staged_bytes, self.migration.staged_bytes)
            self.record_migration(step, seconds, self.decision)
            self.migration = None

    def record_migration(self, step: int, seconds: float, decision: MigrationDecision) -> None:
        """Log and record the migration that a step began with."""
        log.info(
            "step %d: %d experts, %.3g MB, have moved in %.3g s beside the step's work, predicted %.3g s alone",
            step, len(decision.moves), decision.num_bytes / 1e6, seconds, decision.cost_seconds,
        )  # fmt: skip
        for name, value, unit in (
            ("moved", len(decision.moves), "replicas"),
            ("moved_bytes", decision.num_bytes, "B, of an expert-parallel group"),
            ("move_seconds", seconds, "s, beside the step's work"),
            ("move_seconds_predicted", decision.cost_seconds, "s, alone"),
            ("gain_seconds_predicted", decision.gain_seconds, "s, over the horizon"),
            ("gain_seconds_noise", decision.noise_seconds, "s, over the horizon"),
        ):
            self.records.append(step, "cluster", name, value, unit)

    def record_placement(self, step: int) -> None:
        """Record the placement from a step on."""
        placement, settings, self.is_new = self.job.placement, self.job.config.placement, False
        experts = placement.expert_of_replica
        self.records.append(step, "cluster", "migrated", experts, "expert of each slot, from here on")
        if self.every > 0 and settings.replicate and settings.objective == "step":
            split = placement.split
            if split is None:
                split = np.full((len(experts), len(placement.distance), experts.shape[1]), np.nan)
            self.records.append(step, "cluster", "migrated_split", split, "share of a node's tokens; NaN: the nearest")


def propose_migration(job: Job, tokens: np.ndarray, step: int) -> tuple[MigrationDecision, RunPlacement | None]:
    """Solve anew for the tokens [parts, L, nodes, E] of the last interval -> (decision, the placement if accepted).

    The search sees every other part; the rest predict its gain.
    """
    config, rebalance = job.config, job.config.rebalance
    solved = make_measured_problem(job, tokens[0::2].sum(axis=0))
    layout, moves = search_nearby(job, solved)
    (before, after), noise = predict_gain(job, tokens, layout.placement)

    # Compare the gain in the steps for which the loads are trusted with the cost.
    one_expert, states = estimate_expert(make_expert_shape(job.spec), job.spec.trains)
    num_bytes = one_expert * (states - job.spec.trains) // job.mesh.tensor_parallel  # without gradients
    cost = estimate_move_seconds(solved, moves, num_bytes)
    horizon = min(rebalance.horizon or rebalance.every, config.run.steps - step)
    accepted = len(moves) > 0 and should_migrate(before - after, noise, cost, horizon, rebalance.margin)
    decision = MigrationDecision(
        moves=moves,
        num_bytes=num_bytes * len(moves),
        seconds_before=before,
        seconds_after=after,
        gain_seconds=horizon * (before - after),
        noise_seconds=horizon * noise,
        cost_seconds=cost,
        accepted=bool(accepted),
    )
    return decision, layout if accepted else None


def search_nearby(job: Job, problem: PlacementProblem) -> tuple[RunPlacement, Moves]:
    """Search from the present placement on for a better one."""
    from hpcmoe.placement.refine import refine  # imports numba and scipy, on rank 0 alone
    from hpcmoe.placement.solve import SearchOptions

    settings, present = job.config.placement, job.placement.expert_of_replica
    options = SearchOptions(
        seconds=settings.search_seconds, iterations=settings.search_iterations, seed=job.config.run.seed
    )
    layouts = refine(problem, present, job.config.rebalance.moves, options)
    layout = compare_with_methods(problem, settings, evaluate_layouts(problem, settings, layouts, "packed", 0.0))
    return layout, list_moves(problem, present, layouts)


def predict_gain(job: Job, tokens: np.ndarray, placement: Placement) -> tuple[list[float], float]:
    """Predict a step's seconds under the present placement and another, by every other part -> ([s, s], noise).

    The noise is the gain's standard error in seconds, from the differences between all parts [parts, L, nodes, E].
    """
    counts = (4, 3) if job.spec.trains else (2, 1)  # transfers, and computation in forward passes: backward takes two
    both = [(p.expert_of_replica, p.split) for p in (job.placement, placement)]
    problems = [make_measured_problem(job, some) for some in (tokens[1::2].sum(axis=0), *tokens)]
    predicted, *parts = (
        [float(estimate_layer_seconds(problem, *experts, counts).sum()) for experts in both] for problem in problems
    )
    return predicted, standard_error([before - after for before, after in parts], len(tokens[1::2]))


def make_measured_problem(job: Job, tokens: np.ndarray) -> PlacementProblem:
    """Build the run's placement problem with the measured tokens [L, nodes, E]."""
    topology = job.topology
    nodes, _ = fold_groups(topology, list_groups(job.mesh))
    probability = make_probability(Loads(tokens=tokens, node_names=topology.node_names), topology.node_names)
    assert job.problem is not None  # the search is on rank 0
    return dataclasses.replace(job.problem, probability=fold_probability(probability, nodes))


def log_decision(step: int, decision: MigrationDecision) -> None:
    """Log a decision and its figures."""
    if len(decision.moves) == 0:
        log.info("step %d: the experts stay: no placement nearby is better", step)
        return
    log.info(
        "step %d: %s: %d copies, %.3g MB, cost %.3g s; gain %.3g s +- %.2g s over the horizon (%.4g -> %.4g ms a step)",
        step, "experts move" if decision.accepted else "the experts stay",
        len(decision.moves), decision.num_bytes / 1e6, decision.cost_seconds, decision.gain_seconds,
        decision.noise_seconds, 1e3 * decision.seconds_before, 1e3 * decision.seconds_after,
    )  # fmt: skip
