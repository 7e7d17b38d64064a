"""The linear program over choices, by column generation, whose prices prove a bound whatever rounding did to them.

Any prices of resources that sum to one, and of capacity, give a bound: the busiest resource is at least their priced
mean, which is least where each expert takes its own cheapest choice (weak duality). HiGHS finds good prices from the
choices met so far (Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5); the cheapest ones join them.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import block_array, coo_array, csr_array, eye_array, hstack

from hpcmoe.placement.bounds.choices import Choices, bound_free, evaluate_alone, make_rates
from hpcmoe.placement.problem import PlacementProblem

_NEW_COLUMNS = 6  # an expert and round
_MISSING = 100.0  # what an expert without a choice costs, in units of the scale
_GAP = 1e-5  # between the program and the bound that its prices prove
_ROUNDING = 1e-9
_MILP_TOLERANCE = 1e-6


class Prices(NamedTuple):
    """The dual values of a program: of each resource, of capacity for a replica, and of each expert."""

    resource: np.ndarray  # [resources], at most 1 together
    capacity: np.ndarray  # [nodes + 1] seconds a replica, on each node and anywhere
    expert: np.ndarray  # [E] seconds

    def mix(self, other: "Prices", weight: float) -> "Prices":
        """Return the mean with other prices of this weight."""
        return Prices(*((1 - weight) * mine + weight * its for mine, its in zip(self, other, strict=True)))


class Columns(NamedTuple):
    """The choices of a program, one column each."""

    expert: np.ndarray  # [n]
    seconds: np.ndarray  # [resources, n]
    replicas: np.ndarray  # [nodes + 1, n], on each node and in all

    def join(self, other: "Columns") -> "Columns":
        """Return both sets of columns side by side."""
        return Columns(*(np.concatenate(pair, axis=-1) for pair in zip(self, other, strict=True)))

    def pick(self, chosen: np.ndarray) -> "Columns":
        """Return some of the columns, chosen [n] bool."""
        return Columns(*(array[..., chosen] for array in self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The data that all programs of one layer share."""

    demand: np.ndarray  # [nodes, E] tokens
    capacity: np.ndarray  # [nodes + 1] replicas, on each node and in all
    choices: Choices
    rates: csr_array  # [resources, nodes * nodes] seconds a token
    alone: np.ndarray  # [C + A, E] seconds, what a choice of an expert costs at least with nothing beside it
    scale: float  # seconds, about what a layer costs

    def bound(self, limit: float, deadline: float) -> float:
        """Compute a bound of layouts in which no expert alone costs more than the limit -> seconds.

        More than the limit: there is no such layout. At the deadline it is what was proven so far.
        """
        allowed = self.alone <= limit * (1 + _ROUNDING)
        choice, experts = np.nonzero(allowed[: self.choices.num_single])
        columns, best, middle, turn = self.make_columns(choice, experts), 0.0, None, 1
        while True:
            turn += 1
            value, prices = self.solve(columns, deadline)
            if prices is None:
                return best

            # Prices jump from corner to corner, and their mean proves more sooner: try both.
            middle = prices if middle is None else middle.mix(prices, 2 / turn)
            for near in (middle, prices):
                proven, new = self.prove(near, prices, allowed)
                best, columns = max(best, proven), columns.join(new)
            if best >= min(value * (1 - _GAP), limit) or len(new.expert) == 0:
                return best

    def prove(self, near: Prices, prices: Prices, allowed: np.ndarray) -> tuple[float, Columns]:
        """Prove a bound by the prices `near` -> seconds, and the Columns met that a program with `prices` lacks."""
        cost, free = self.price(near)
        cost[~allowed] = np.inf
        proven = cost.min(axis=0).sum() * (1 - _ROUNDING) - near.capacity @ self.capacity * (1 + _ROUNDING)

        # Take those of each expert's cheapest choices that the program would use.
        choice = np.argsort(cost, axis=0)[:_NEW_COLUMNS]
        experts = np.broadcast_to(np.arange(cost.shape[1]), choice.shape)
        is_open = np.isfinite(np.take_along_axis(cost, choice, axis=0))
        new = self.make_columns(choice[is_open], experts[is_open], free)
        priced = prices.resource @ new.seconds + prices.capacity @ new.replicas
        return proven, new.pick(priced < prices.expert[new.expert] - _GAP * self.scale / len(prices.expert))

    def make_columns(
        self, choice: np.ndarray, experts: np.ndarray, free: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Columns:
        """Build the columns of choices [n] of experts [n], free: (shares, replicas) of the free choices."""
        shares, replicas = self.choices.shares, self.choices.replicas
        if free is not None:
            shares, replicas = np.concatenate([shares, free[0]]), np.concatenate([replicas, free[1]])
        flows = shares[choice] * self.demand.T[experts][:, :, None]
        seconds = self.rates @ flows.reshape(len(choice), self.demand.shape[0] ** 2).T
        replicas = replicas[choice].T
        return Columns(experts, seconds, np.vstack([replicas, replicas.sum(axis=0)]))

    def make_rows(self, columns: Columns) -> tuple[csr_array, csr_array, csr_array]:
        """Build the rows of resources, capacity and experts over all columns and the time of the busiest resource."""
        num, num_experts = len(columns.expert), self.demand.shape[1]
        one = coo_array((np.ones(num), (columns.expert, np.arange(num))), shape=(num_experts, num))
        busy = hstack([csr_array(columns.seconds / self.scale), csr_array(-np.ones((len(columns.seconds), 1)))])
        held = hstack([csr_array(columns.replicas), csr_array((len(columns.replicas), 1))])
        return busy, held, hstack([one, csr_array((num_experts, 1))])

    def solve(self, columns: Columns, deadline: float) -> tuple[float, Prices | None]:
        """Solve the program of some columns -> seconds, Prices, or None when the time is over."""
        busy, held, one = self.make_rows(columns)
        num_experts, num_rows = one.shape[0], busy.shape[0]

        # Add an expensive variable for each expert, which it may take in place of a choice.
        answer = linprog(
            np.concatenate([np.zeros(len(columns.expert)), [1.0], np.full(num_experts, _MISSING)]),
            A_ub=block_array([[busy, None], [held, csr_array((len(self.capacity), num_experts))]]),
            b_ub=np.concatenate([np.zeros(num_rows), self.capacity]),
            A_eq=block_array([[one, eye_array(num_experts)]]),
            b_eq=np.ones(num_experts),
            method="highs",
            options={"time_limit": max(deadline - time.perf_counter(), 0.0)},
        )
        if answer.status != 0:
            return np.inf, None

        # Scale the dual values to prices.
        resource = np.maximum(-answer.ineqlin.marginals[:num_rows], 0)
        capacity = np.maximum(-answer.ineqlin.marginals[num_rows:], 0) * self.scale
        expert = answer.eqlin.marginals * self.scale
        return answer.fun * self.scale, Prices(resource / max(resource.sum(), 1.0), capacity, expert)

    def price(self, prices: Prices) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Compute the price of each choice of each expert -> seconds [C + A, E], shares and replicas of free ones."""
        num_nodes, choices = len(self.demand), self.choices
        of_token = (self.rates.T @ prices.resource).reshape(num_nodes, num_nodes)  # [from, to]
        of_replica = prices.capacity[:num_nodes] + prices.capacity[num_nodes]
        even = np.einsum("cij,ij->ci", choices.shares, of_token) @ self.demand
        even += (choices.replicas @ of_replica)[:, None]

        # Send all freely to the tier's cheapest replica, and put the one beyond one a node where capacity is cheapest.
        open_tokens = np.where(choices.free_within, of_token, np.inf)
        shares = open_tokens.argmin(axis=2)[:, :, None] == np.arange(num_nodes)
        second = np.where(choices.free_sets, of_replica, np.inf).argmin(axis=1)
        replicas = choices.free_sets + (second[:, None] == np.arange(num_nodes))
        free = open_tokens.min(axis=2) @ self.demand + (replicas @ of_replica)[:, None]
        return np.concatenate([even, free]), (shares, replicas)

    def bound_whole(self, limit: float, seconds: float) -> float:
        """Compute a bound in whole numbers of layouts whose single replicas alone cost the limit at most -> seconds.

        More than the limit: no layout is within it.
        """
        # Use each choice once or not at all, and minimize the time of the busiest resource.
        choice, experts = np.nonzero(self.alone <= limit * (1 + _ROUNDING))
        columns = self.make_columns(choice, experts)
        busy, held, one = self.make_rows(columns)
        busiest = np.append(np.zeros(len(columns.expert)), 1.0)
        answer = milp(
            busiest,
            constraints=[
                LinearConstraint(busy, ub=0),
                LinearConstraint(held, ub=self.capacity),
                LinearConstraint(one, lb=1, ub=1),
            ],
            # A cap at the limit would only keep HiGHS from finding layouts.
            bounds=Bounds(0, np.where(busiest, np.inf, 1.0)),
            integrality=1 - busiest,
            options={"time_limit": max(seconds, 0.0), "mip_rel_gap": _MILP_TOLERANCE},
        )
        if answer.status == 2:
            return np.inf
        return 0.0 if answer.mip_dual_bound is None else (answer.mip_dual_bound - _MILP_TOLERANCE) * self.scale


def make_program(
    problem: PlacementProblem, demand: np.ndarray, capacity: np.ndarray, choices: Choices, floor: np.ndarray | None
) -> Program:
    """Build what a layer's programs share: demand [nodes, E], capacity [nodes + 1] on each node and in all.

    floor [nodes, E]: seconds that an expert's only replica on a node costs at least, where all are single.
    """
    # Find what each choice costs alone.
    rates = make_rates(problem)
    alone = np.concatenate([evaluate_alone(problem, demand, choices, rates), bound_free(problem, demand, choices)])
    if floor is not None:
        alone = np.maximum(alone, floor[choices.replicas.argmax(axis=1)])

    # Scale by a layer whose tokens go everywhere evenly.
    evenly = np.repeat(demand.sum(axis=1) / len(demand), len(demand))  # [nodes * nodes] tokens
    return Program(
        demand=demand,
        capacity=capacity.astype(np.float64),
        choices=choices,
        rates=rates,
        alone=alone,
        scale=float((rates @ evenly).max(initial=0.0)),
    )
