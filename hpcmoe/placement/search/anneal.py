"""Local search over one layer's layouts: exchanges, moves and replacements of replicas, annealed.

Simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983, doi:10.1126/science.220.4598.671) of the sum of powers.
Proposals are counted, so that a search ends alike whenever its count ends it, and not the clock.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_state
from hpcmoe.placement.search.moves import compiled, crossing_change, find_busiest, max_seconds, move, rebuild, undo
from hpcmoe.placement.search.proposals import draw_integer, may_move, propose_move

CHUNK = 500  # proposals between two looks at the clock
PROPOSALS_BETWEEN_LOOKS = 8  # at the busiest resource
FEW_PROPOSALS = 50  # for each slot: too few for annealing
ROUND = 40  # proposals for each slot and expert: enough to cool down once
MOST_ROUNDS = 16
HOTTER, HOTTEST = 1.5, 2.0  # a round's temperatures over the last's; the highest of all
TIE_FACTOR = 1 + 1e-9  # figures closer than this are ties


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """One cooling: until which part of the search, between which temperatures, at which exponent 2 ** doublings.

    A temperature is the part by which the smooth maximum may rise in a proposal that is taken with probability 1/e.
    """

    until: float
    hot: float
    cold: float
    doublings: int


# Measured on the families of tests/placement/families.py: a low exponent finds where replicas go, a high one ends it.
FINISH = Cooling(until=1.0, hot=0.0, cold=0.0, doublings=7)
FEW = (Cooling(until=0.9, hot=1e-3, cold=1e-4, doublings=6), FINISH)
SINGLE = (Cooling(until=0.9, hot=0.05, cold=2e-3, doublings=6), FINISH)
REPLICATED = (
    Cooling(until=0.1, hot=1e-3, cold=1e-4, doublings=6),
    Cooling(until=0.55, hot=1e-2, cold=2e-4, doublings=2),
    Cooling(until=0.9, hot=3e-2, cold=1e-3, doublings=5),
    FINISH,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the search of one layer may spend; what ends first ends it."""

    seconds: float = math.inf
    proposals: int = 0  # 0: as many as the seconds allow
    goal: float = 0.0  # the cost at which nothing is left to gain


@compiled
def anneal(t, s, log, random, smooth_max, temperature, num_proposals):
    """Make proposals, taking those that lower the sum of powers, and others as the temperature allows."""
    total = rebuild(t, s, log, smooth_max)
    exponent, expert_at, busiest = 2.0**smooth_max.doublings, s.expert_at, find_busiest(s.power)
    for proposal in range(num_proposals):
        if proposal % PROPOSALS_BETWEEN_LOOKS == PROPOSALS_BETWEEN_LOOKS - 1:
            busiest = find_busiest(s.power)
        a, slot, b, other = propose_move(t, s, random, busiest)
        e = expert_at[a, slot]
        f = other if b == EMPTY else expert_at[b, other]
        if not may_move(t, s, e, a, f, b):
            continue

        # Take it, or take it back.
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
def lower_crossing(t, s, log, random, smooth_max, limit, num_proposals):
    """Make proposals, taking those that let fewer tokens leave their nodes and no resource be busier than the limit."""
    rebuild(t, s, log, smooth_max)
    least = -1e-9 * t.tokens.sum()  # what rounding makes
    for _ in range(num_proposals):
        a, slot, b, other = propose_move(t, s, random, draw_integer(random, len(s.busy)))
        e = s.expert_at[a, slot]
        f = other if b == EMPTY else s.expert_at[b, other]
        if not may_move(t, s, e, a, f, b) or crossing_change(t, s, e, a, f, b) >= least:
            continue
        move(t, s, log, smooth_max, e, a, f, b)
        if max_seconds(t, s, log, True) > limit:
            undo(t, s, log, e, a, f, b)
            continue
        s.expert_at[a, slot] = f
        if b != EMPTY:
            s.expert_at[b, other] = e


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search of a layer ended with."""

    expert_at: np.ndarray  # [P, s], the best layout
    num_proposals: int
    cut_short: bool  # did the clock end it before its proposals were made?


def search_layout(layer_data, expert_at, seed, budget):
    """Search from a layout [P, s] for one whose busiest resource is less busy -> SearchResult.

    A long search goes in rounds, each hotter than the last, by turns from the best layout known and from the first;
    within a round every cycle starts from the best.
    """
    state, log = make_state(layer_data, expert_at)
    random = start_random(seed)
    rebuild(layer_data, state, log, SmoothMax(1.0, 0))
    best, least = state.expert_at.copy(), max_seconds(layer_data, state, log, False)
    begun, made, part, now = time.perf_counter(), 0, 0.0, None
    while part < 1 and least > budget.goal * TIE_FACTOR:
        turn, cycle, cooled = find_cooling(layer_data, part, budget.proposals or made / max(part, 1e-9))
        if (turn, cycle) != now:
            is_fresh = turn % 2 == 1 and (now is None or turn != now[0])
            state.expert_at[:], now = expert_at if is_fresh else best, (turn, cycle)

        # Cool down from the cycle's hot end to its cold end.
        hot = min(cycle.hot * HOTTER**turn, HOTTEST)
        temperature = hot * (cycle.cold / hot) ** cooled if hot else 0.0
        anneal(layer_data, state, log, random, SmoothMax(least, cycle.doublings), temperature, CHUNK)
        found = max_seconds(layer_data, state, log, False)
        if found * TIE_FACTOR < least:
            best, least = state.expert_at.copy(), found

        # Tell how much is over: by proposals if they are counted, else by the clock, which ends it either way.
        made, spent = made + CHUNK, (time.perf_counter() - begun) / budget.seconds
        part = max(made / budget.proposals, float(spent >= 1)) if budget.proposals else spent
    short = part > 0 and made < budget.proposals and least > budget.goal * TIE_FACTOR
    return SearchResult(expert_at=best, num_proposals=made, cut_short=bool(short))


def find_cooling(layer_data, part, proposals):
    """Find where a search of so many proposals is after a part of it -> (round, Cooling, how much of that is over)."""
    slots = layer_data.most_of_rank.sum()
    if 0 < proposals < FEW_PROPOSALS * slots:
        cycles, num_rounds = FEW, 1
    else:
        cycles = REPLICATED if layer_data.replicate else SINGLE
        num_rounds = min(max(int(proposals / (ROUND * slots * len(layer_data.tokens))), 1), MOST_ROUNDS)
    turn, within = divmod(part * num_rounds, 1)
    begin = 0.0
    for cycle in cycles:
        if within < cycle.until:
            return int(turn), cycle, (within - begin) / (cycle.until - begin)
        begin = cycle.until
    raise ValueError(part)


def reduce_crossing(layer_data, expert_at, seed, num_proposals):
    """Lower the tokens that leave their nodes as long as the busiest resource is not busier: [P, s] -> [P, s]."""
    state, log = make_state(layer_data, expert_at)
    smooth_max = SmoothMax(1.0, 0)
    rebuild(layer_data, state, log, smooth_max)
    limit = max_seconds(layer_data, state, log, False) * TIE_FACTOR
    lower_crossing(layer_data, state, log, start_random(seed), smooth_max, limit, num_proposals)
    return state.expert_at


def start_random(seed):
    """Make the state of a generator, never zero -> [1] uint64."""
    return np.random.SeedSequence(seed).generate_state(1, np.uint64) | np.uint64(1)
