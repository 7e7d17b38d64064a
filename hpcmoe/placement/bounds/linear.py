"""The linear program over choices, by column generation, whose prices prove a bound whatever rounding did to them.

Any prices of resources that sum to one, and of room, give a bound: the busiest resource is at least their priced mean,
which is least where each expert takes its own cheapest choice (weak duality). HiGHS finds good prices from the choices
met so far (Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5); the cheapest ones join them.
"""

import itertools
import time
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import block_array, coo_array, csr_array, eye_array

from hpcmoe.placement.bounds.choices import Choices, cost_alone, cost_at_will, make_rates

NEW_COLUMNS = 6  # an expert and round
MISSING = 100.0  # what an expert without a choice costs, in units of the scale
GAP = 1e-5  # between the program and the bound that its prices prove
_ROUNDING = 1e-9
_MILP_TOLERANCE = 1e-6  # of HiGHS, in whole numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a program pays for each resource and each place for a replica, and what it makes of each expert."""

    resource: np.ndarray  # [resources], at most 1 together
    room: np.ndarray  # [nodes + 1] seconds a replica, on each node and anywhere
    expert: np.ndarray  # [E] seconds

    def mix(self, other, weight):
        """Go some way, by weight, to other prices -> Prices."""
        parts = (part.name for part in fields(self))
        return Prices(**{part: (1 - weight) * getattr(self, part) + weight * getattr(other, part) for part in parts})


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Choices that a program chooses from, one column each."""

    expert: np.ndarray  # [n]
    seconds: np.ndarray  # [resources, n]
    replicas: np.ndarray  # [nodes + 1, n], on each node and in all

    def join(self, other):
        """Put two sets of columns side by side -> Columns."""
        return Columns(
            expert=np.concatenate([self.expert, other.expert]),
            seconds=np.concatenate([self.seconds, other.seconds], axis=1),
            replicas=np.concatenate([self.replicas, other.replicas], axis=1),
        )

    def pick(self, chosen):
        """Keep some of the columns, chosen [n] bool -> Columns."""
        return Columns(expert=self.expert[chosen], seconds=self.seconds[:, chosen], replicas=self.replicas[:, chosen])

    def choose_one(self, num_experts):
        """Write that each expert has one choice in all -> sparse [E, n]."""
        num = len(self.expert)
        return coo_array((np.ones(num), (self.expert, np.arange(num))), shape=(num_experts, num))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What the programs of one layer share."""

    demand: np.ndarray  # [nodes, E] tokens
    room: np.ndarray  # [nodes + 1] replicas, on each node and in all
    choices: Choices
    rates: csr_array  # [resources, nodes * nodes] seconds a token
    alone: np.ndarray  # [C + A, E] seconds, what a choice of an expert costs at least with nothing beside it
    scale: float  # seconds, about what a layer costs

    def bound(self, limit, deadline):
        """Bound the layouts in which no expert alone costs more than the limit -> seconds; by the deadline, or less.

        More than the limit: there is no such layout.
        """
        allowed = self.alone <= limit * (1 + _ROUNDING)
        columns, best, middle = self.make_columns(*np.nonzero(allowed[: self.choices.num_single])), 0.0, None
        for turn in itertools.count(2):
            value, prices = self.solve(columns, deadline)
            if prices is None:
                return best

            # Prices jump from corner to corner, and their mean proves more sooner: try both.
            middle = prices if middle is None else middle.mix(prices, 2 / turn)
            for near in (middle, prices):
                proven, new = self.prove(near, prices, allowed)
                best, columns = max(best, proven), columns.join(new)
            if best >= min(value * (1 - GAP), limit) or len(new.expert) == 0:
                return best

    def prove(self, near, prices, allowed):
        """Prove a bound by the prices `near` -> seconds, and the Columns met that a program with `prices` lacks."""
        cost, at_will = self.price(near)
        cost[~allowed] = np.inf
        proven = cost.min(axis=0).sum() * (1 - _ROUNDING) - near.room @ self.room * (1 + _ROUNDING)

        # Of each expert's cheapest choices take those that the program would use.
        choice = np.argsort(cost, axis=0)[:NEW_COLUMNS]
        experts = np.broadcast_to(np.arange(cost.shape[1]), choice.shape)
        is_open = np.isfinite(np.take_along_axis(cost, choice, axis=0))
        new = self.make_columns(choice[is_open], experts[is_open], at_will)
        priced = prices.resource @ new.seconds + prices.room @ new.replicas
        return proven, new.pick(priced < prices.expert[new.expert] - GAP * self.scale / len(prices.expert))

    def make_columns(self, choice, experts, at_will=None):
        """Compute what the choices [n] of experts [n] take, at_will = (splits, replicas) -> Columns."""
        shares, replicas = self.choices.shares, self.choices.replicas
        if at_will is not None:
            shares, replicas = np.concatenate([shares, at_will[0]]), np.concatenate([replicas, at_will[1]])
        flows = shares[choice] * self.demand.T[experts][:, :, None]
        seconds = self.rates @ flows.reshape(len(choice), self.demand.shape[0] ** 2).T
        replicas = replicas[choice].T
        return Columns(expert=experts, seconds=seconds, replicas=np.vstack([replicas, replicas.sum(axis=0)]))

    def solve(self, columns, deadline):
        """Solve the program of some columns -> seconds, Prices, or None when the time is over."""
        num_resources, num = columns.seconds.shape
        num_nodes, num_experts = self.demand.shape
        most = [[columns.seconds / self.scale, -np.ones((num_resources, 1)), None], [columns.replicas, None, None]]
        one = [[columns.choose_one(num_experts), np.zeros((num_experts, 1)), eye_array(num_experts)]]
        most[1][2] = csr_array((num_nodes + 1, num_experts))

        # Variables: the columns, the time of the busiest resource, and experts that miss a choice.
        answer = linprog(
            np.concatenate([np.zeros(num), [1.0], np.full(num_experts, MISSING)]),
            A_ub=block_array([[sparse(part) for part in row] for row in most]),
            b_ub=np.concatenate([np.zeros(num_resources), self.room]),
            A_eq=block_array(one),
            b_eq=np.ones(num_experts),
            method="highs",
            options={"time_limit": max(deadline - time.perf_counter(), 0.0)},
        )
        if answer.status != 0:
            return np.inf, None
        resource = np.maximum(-answer.ineqlin.marginals[:num_resources], 0)
        room = np.maximum(-answer.ineqlin.marginals[num_resources:], 0) * self.scale
        prices = Prices(
            resource=resource / max(resource.sum(), 1.0), room=room, expert=answer.eqlin.marginals * self.scale
        )
        return answer.fun * self.scale, prices

    def price(self, prices):
        """Price every choice of every expert -> seconds [C + A, E], and the splits and replicas of those at will."""
        num_nodes, choices = len(self.demand), self.choices
        of_token = (self.rates.T @ prices.resource).reshape(num_nodes, num_nodes)  # [from, to]
        of_replica = prices.room[:num_nodes] + prices.room[num_nodes]
        even = np.einsum("cij,ij->ci", choices.shares, of_token) @ self.demand
        even += (choices.replicas @ of_replica)[:, None]

        # At will all goes to the cheapest replica of the tier; the one replica more than nodes is where room is cheapest.
        open_tokens = np.where(choices.within_at_will, of_token, np.inf)
        split = open_tokens.argmin(axis=2)[:, :, None] == np.arange(num_nodes)
        second = np.where(choices.sets_at_will, of_replica, np.inf).argmin(axis=1)
        replicas = choices.sets_at_will + (second[:, None] == np.arange(num_nodes))
        at_will = open_tokens.min(axis=2) @ self.demand + (replicas @ of_replica)[:, None]
        return np.concatenate([even, at_will]), (split, replicas)

    def bound_whole(self, limit, seconds):
        """Bound in whole numbers the layouts of single replicas that each alone cost the limit at most -> seconds.

        More than the limit: no layout is within it.
        """
        columns = self.make_columns(*np.nonzero(self.alone <= limit * (1 + _ROUNDING)))
        num_resources, num = columns.seconds.shape
        num_nodes, num_experts = self.demand.shape
        busiest = np.append(np.zeros(num), 1.0)
        answer = milp(
            busiest,
            constraints=[
                LinearConstraint(pad(columns.seconds / self.scale, -np.ones((num_resources, 1))), ub=0),
                LinearConstraint(pad(columns.replicas, np.zeros((num_nodes + 1, 1))), ub=self.room),
                LinearConstraint(pad(columns.choose_one(num_experts), np.zeros((num_experts, 1))), lb=1, ub=1),
            ],
            bounds=Bounds(
                0, np.where(busiest, np.inf, 1.0)
            ),  # a cap at the limit only keeps HiGHS from finding layouts
            integrality=1 - busiest,
            options={"time_limit": max(seconds, 0.0), "mip_rel_gap": _MILP_TOLERANCE},
        )
        if answer.status == 2:
            return np.inf
        return 0.0 if answer.mip_dual_bound is None else (answer.mip_dual_bound - _MILP_TOLERANCE) * self.scale


def make_program(problem, demand, room, choices, floor=None):
    """Prepare the programs of a layer with demand [nodes, E] -> Program; room [nodes + 1] on each node and in all.

    floor [nodes, E]: seconds that an expert's only replica on a node costs at least, where there are single replicas alone.
    """
    rates = make_rates(problem)
    alone = np.concatenate([cost_alone(problem, demand, choices, rates), cost_at_will(problem, demand, choices)])
    if floor is not None:
        alone = np.maximum(alone, floor[choices.replicas.argmax(axis=1)])
    evenly = np.repeat(demand.sum(axis=1) / len(demand), len(demand))  # [nodes * nodes] tokens
    return Program(
        demand=demand,
        room=room.astype(np.float64),
        choices=choices,
        rates=rates,
        alone=alone,
        scale=float((rates @ evenly).max(initial=0.0)),
    )


def sparse(part):
    """Turn a block of a matrix into a sparse one; None stays."""
    return None if part is None else csr_array(part)


def pad(matrix, column):
    """Put one more column to the right of a matrix -> sparse."""
    return block_array([[csr_array(matrix), csr_array(column)]])
