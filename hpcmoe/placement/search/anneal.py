"""Simulated annealing of one layer's layout: swaps, moves and replacements of replicas.

It lowers the sum of powers (Kirkpatrick, Gelatt and Vecchi 1983, doi:10.1126/science.220.4598.671). Proposals are
counted: a search that its count ends, and not the clock, is reproducible.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, LayerData, LayerState, SmoothMax, UndoLog, make_state
from hpcmoe.placement.search.moves import compiled, crossing_change, find_busiest, max_seconds, move, rebuild, undo
from hpcmoe.placement.search.proposals import draw_integer, may_move, propose_move

_CHUNK = 500  # proposals between two looks at the clock
_PROPOSALS_BETWEEN_LOOKS = 8  # at the busiest resource
_FEW_PROPOSALS = 50  # for each slot: too few for annealing
ROUND = 40  # proposals for each slot and expert: enough to cool down once
MOST_ROUNDS = 16
_HOTTER, _HOTTEST = 1.5, 2.0  # a round's temperatures over the last's; the highest of all
TIE_FACTOR = 1 + 1e-9  # figures closer than this are ties


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """One cooling of a round.

    A temperature is the relative rise of the smooth maximum that a proposal is accepted with at probability 1/e.
    """

    until: float  # part of the round
    hot: float  # temperature at its beginning
    cold: float  # temperature at its end
    doublings: int  # the exponent is 2 to this


# Measured on the families of tests/placement/families.py: a low exponent finds where replicas go, a high one ends it.
_FINISH = Cooling(until=1.0, hot=0.0, cold=0.0, doublings=7)
FEW: tuple[Cooling, ...] = (Cooling(until=0.9, hot=1e-3, cold=1e-4, doublings=6), _FINISH)
SINGLE = (Cooling(until=0.9, hot=0.05, cold=2e-3, doublings=6), _FINISH)
REPLICATED = (
    Cooling(until=0.1, hot=1e-3, cold=1e-4, doublings=6),
    Cooling(until=0.55, hot=1e-2, cold=2e-4, doublings=2),
    Cooling(until=0.9, hot=3e-2, cold=1e-3, doublings=5),
    _FINISH,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits of one layer's search, which ends at the first of them."""

    seconds: float = math.inf
    proposals: int = 0  # 0: as many as the seconds allow
    goal: float = 0.0  # the cost at which nothing is left to gain


@compiled
def _anneal(t, s, log, random, smooth_max, temperature):
    """Make a chunk of proposals; accept those that lower the sum of powers, and others as the temperature allows."""
    total = rebuild(t, s, log, smooth_max)
    exponent, expert_at, busiest = 2.0**smooth_max.doublings, s.expert_at, find_busiest(s.power)
    for proposal in range(_CHUNK):
        # Propose a move, most often one that relieves the busiest resource.
        if proposal % _PROPOSALS_BETWEEN_LOOKS == _PROPOSALS_BETWEEN_LOOKS - 1:
            busiest = find_busiest(s.power)
        a, slot, b, other = propose_move(t, s, random, busiest)
        e = expert_at[a, slot]
        f = other if b == EMPTY else expert_at[b, other]
        if not may_move(t, s, e, a, f, b):
            continue

        # Accept it, or undo it.
        change, allowed = move(t, s, log, smooth_max, e, a, f, b), 0.0
        if change > 0.0 and temperature > 0.0:
            chance = (draw_integer(random, 1 << 30) + 1) / (1 << 30)
            allowed = total * (chance ** (-exponent * temperature) - 1.0)
        if change > allowed:
            undo(t, s, log, e, a, f, b)
            continue
        total += change
        expert_at[a, slot] = f
        if b != EMPTY:
            expert_at[b, other] = e


@compiled
def _lower_crossing(t, s, log, random, smooth_max, limit, num_proposals):
    """Make proposals; accept those by which fewer tokens leave their nodes and no resource exceeds the limit."""
    rebuild(t, s, log, smooth_max)
    least = -1e-9 * t.tokens.sum()  # what rounding makes
    for _ in range(num_proposals):
        # Propose a move by which fewer tokens cross.
        a, slot, b, other = propose_move(t, s, random, draw_integer(random, len(s.busy)))
        e = s.expert_at[a, slot]
        f = other if b == EMPTY else s.expert_at[b, other]
        if not may_move(t, s, e, a, f, b) or crossing_change(t, s, e, a, f, b) >= least:
            continue

        # Accept it, or undo it.
        move(t, s, log, smooth_max, e, a, f, b)
        if max_seconds(t, s, log, True) > limit:
            undo(t, s, log, e, a, f, b)
            continue
        s.expert_at[a, slot] = f
        if b != EMPTY:
            s.expert_at[b, other] = e


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The outcome of one layer's search."""

    expert_at: np.ndarray  # [P, s], the best layout
    num_proposals: int
    cut_short: bool  # did the clock end it before its proposals were made?


def search_layout(data: LayerData, expert_at: np.ndarray, seed: int | Sequence[int], budget: Budget) -> SearchResult:
    """Search from a layout [P, s] for one whose busiest resource is less busy.

    A long search goes in rounds, each hotter than the last. Odd rounds start from the first layout, even ones from the
    best; within a round every cooling starts from the best.
    """
    random = make_generator(seed)
    state, log, least = open_layout(data, expert_at)
    best, begun, made, part, now = state.expert_at.copy(), time.perf_counter(), 0, 0.0, None
    while part < 1 and least > budget.goal * TIE_FACTOR:
        # Start each cooling from the best layout, each odd round from the first.
        number, cooling, cooled = find_cooling(data, part, budget.proposals or made / max(part, 1e-9))
        if (number, cooling) != now:
            is_fresh = number % 2 == 1 and (now is None or number != now[0])
            state.expert_at[:], now = expert_at if is_fresh else best, (number, cooling)

        # Anneal at this temperature, and keep what is better.
        hot = min(cooling.hot * _HOTTER**number, _HOTTEST)
        temperature = hot * (cooling.cold / hot) ** cooled if hot else 0.0
        _anneal(data, state, log, random, SmoothMax(least, cooling.doublings), temperature)
        found = max_seconds(data, state, log, False)
        if found * TIE_FACTOR < least:
            best, least = state.expert_at.copy(), found

        # Measure progress by proposals if they are counted, else by the clock, which ends the search either way.
        made, spent = made + _CHUNK, (time.perf_counter() - begun) / budget.seconds
        part = max(made / budget.proposals, float(spent >= 1)) if budget.proposals else spent
    short = part > 0 and made < budget.proposals and least > budget.goal * TIE_FACTOR
    return SearchResult(expert_at=best, num_proposals=made, cut_short=bool(short))


def find_cooling(data: LayerData, part: float, proposals: float) -> tuple[int, Cooling, float]:
    """Find where a search of so many proposals is after a part of it -> (round, Cooling, part of that Cooling)."""
    # Divide the proposals into rounds.
    slots = data.most_of_rank.sum()
    if 0 < proposals < _FEW_PROPOSALS * slots:
        coolings, num_rounds = FEW, 1
    else:
        coolings = REPLICATED if data.replicate else SINGLE
        num_rounds = min(max(int(proposals / (ROUND * slots * len(data.tokens))), 1), MOST_ROUNDS)

    # Find the cooling within the round.
    number, within = divmod(part * num_rounds, 1)
    begin = 0.0
    for cooling in coolings:
        if within < cooling.until:
            return int(number), cooling, (within - begin) / (cooling.until - begin)
        begin = cooling.until
    raise ValueError(part)


def reduce_crossing(
    data: LayerData, expert_at: np.ndarray, seed: int | Sequence[int], num_proposals: int
) -> np.ndarray:
    """Reduce the tokens that leave their nodes while the busiest resource is not busier: [P, s] -> [P, s]."""
    state, log, seconds = open_layout(data, expert_at)
    _lower_crossing(data, state, log, make_generator(seed), SmoothMax(1.0, 0), seconds * TIE_FACTOR, num_proposals)
    return state.expert_at


def open_layout(data: LayerData, expert_at: np.ndarray) -> tuple[LayerState, UndoLog, float]:
    """Build the state of a layout [P, s] -> (LayerState, UndoLog, seconds of its busiest resource)."""
    state, log = make_state(data, expert_at)
    rebuild(data, state, log, SmoothMax(1.0, 0))
    return state, log, max_seconds(data, state, log, False)


def make_generator(seed: int | Sequence[int]) -> np.ndarray:
    """Make the state of a random generator, never zero -> [1] uint64."""
    return np.random.SeedSequence(seed).generate_state(1, np.uint64) | np.uint64(1)
