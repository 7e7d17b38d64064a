"""One layer's replicas and the seconds of every resource, changed move by move; compiled by numba.

Every resource, link, port, uplink or rank, is one number in one vector. A search lowers the sum of these numbers to a
high power: a smooth maximum that sees all that are nearly as busy. A move takes one or two experts' tokens off the
vector, relocates their replicas, and puts the tokens back. What it touched is logged, so that undoing it restores every
number bit for bit. Tests hold the vector against the definition in placement/resources.py.

Arrays that an inner loop needs are named before it: numba counts references at each look into a tuple. A link's latency
is added in two loops, since a function for it costs a twentieth of the search.
"""

from collections.abc import Callable

import numba
import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, LayerData, LayerState, SmoothMax, UndoLog

NO_TRAFFIC = 1e-15  # seconds: what rounding leaves on a link that no token uses
_MOST_POWERED = 50.0  # times the scale: far above any that will be kept, and finite to the 128th power
inlined = numba.njit(error_model="numpy", nogil=True, inline="always")  # where a call would cost more than its work


def compiled(function: Callable) -> Callable:
    """Return a function that numba compiles at its first call and caches beside the source or in the user's folder.

    With NUMBA_DISABLE_JIT=1 it runs as it stands, with the same results, a hundred times slower. NumPy's warnings,
    which machine code does not have, are then silenced.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set at import
        return np.errstate(all="ignore")(function)
    try:
        return numba.njit(error_model="numpy", nogil=True, cache=True)(function)
    except RuntimeError:  # neither can be written: compile it in every process
        return numba.njit(error_model="numpy", nogil=True)(function)


@compiled
def rebuild(t: LayerData, s: LayerState, log: UndoLog, smooth_max: SmoothMax) -> float:
    """Compute everything that follows from expert_at anew, without accumulated rounding -> sum of the powers."""
    # Clear the counts, the seconds and the log.
    for counts in (s.count_of_rank, s.count_of_node, s.num_replicas, s.num_moved):
        counts[:] = 0
    s.replicas[:] = 0
    s.replicas_in_rack[:] = 0
    s.busy[:] = 0.0
    s.power[:] = 0.0
    s.stamp[:] = -1
    log.counts[:] = 0

    # Add every replica, then every expert's traffic.
    for rank in range(s.expert_at.shape[0]):
        for slot in range(s.expert_at.shape[1]):
            if s.expert_at[rank, slot] != EMPTY:
                relocate(t, s, s.expert_at[rank, slot], EMPTY, rank)
    for expert in range(t.demand.shape[1]):
        add_traffic(t, s, log, expert, 1.0)
    return update_powers(t, s, log, smooth_max)


@compiled
def move(t: LayerData, s: LayerState, log: UndoLog, smooth_max: SmoothMax, e: int, a: int, f: int, b: int) -> float:
    """Move expert f from rank b to a, and e from a to b -> change of the sum of powers.

    e, f or b may be EMPTY: a free slot, or a replica that comes from nowhere or goes there.
    """
    log.counts[0] = 0
    log.counts[1] += 1
    for step in range(4):  # one call of load in the source is one expansion of it in the machine code
        if step == 2:
            swap(t, s, e, a, f, b)
        expert = e if step % 2 == 0 else f
        if expert != EMPTY:
            add_traffic(t, s, log, expert, -1.0 if step < 2 else 1.0)
    return update_powers(t, s, log, smooth_max)


@compiled
def undo(t: LayerData, s: LayerState, log: UndoLog, e: int, a: int, f: int, b: int) -> None:
    """Reverse the move just made."""
    swap(t, s, f, a, e, b)
    busy, power, resource, busy_before, power_before = s.busy, s.power, log.resource, log.busy, log.power
    for n in range(log.counts[0]):
        k = resource[n]
        busy[k] = busy_before[n]
        power[k] = power_before[n]


@inlined
def swap(t: LayerData, s: LayerState, e: int, a: int, f: int, b: int) -> None:
    """Relocate expert e, if any, from rank a to b, and f from b to a."""
    if e != EMPTY:
        relocate(t, s, e, a, b)
    if f != EMPTY:
        relocate(t, s, f, b, a)


@inlined
def relocate(t: LayerData, s: LayerState, expert: int, source: int, target: int) -> None:
    """Move a replica from rank source to target; from EMPTY it is new, to EMPTY it goes."""
    ranks_of_expert, num_replicas = s.ranks_of_expert, s.num_replicas

    # Find its place among the expert's ranks: the source's, or a new one at the end.
    place = num_replicas[expert]
    if source != EMPTY:
        place = 0
        while ranks_of_expert[expert, place] != source:
            place += 1
        count_replica(t, s, expert, source, -1)
    if target != EMPTY:
        ranks_of_expert[expert, place] = target
        count_replica(t, s, expert, target, 1)

    # Count one that is new, or close the gap of one that goes.
    if source == EMPTY:
        num_replicas[expert] += 1
    if target == EMPTY:
        num_replicas[expert] -= 1
        ranks_of_expert[expert, place] = ranks_of_expert[expert, num_replicas[expert]]


@inlined
def count_replica(t: LayerData, s: LayerState, expert: int, rank: int, more: int) -> None:
    """Add one replica, or -1, to the counts of a rank, its node and its rack."""
    node = t.node_of_rank[rank]
    s.replicas[node, expert] += more
    s.replicas_in_rack[t.rack_of_node[node], expert] += more
    s.count_of_rank[rank] += more
    s.count_of_node[node] += more
    if t.most_moves != EMPTY and not t.already_held[rank, expert]:
        s.num_moved[0] += more


@inlined
def holds(s: LayerState, rank: int, expert: int) -> bool:
    """Return True if a rank holds an expert."""
    held = False
    for slot in range(s.expert_at.shape[1]):
        held |= s.expert_at[rank, slot] == expert
    return held


@inlined
def add_traffic(t: LayerData, s: LayerState, log: UndoLog, expert: int, sign: float) -> None:
    """Add an expert's tokens to all resources on the way to its replicas (sign 1), or subtract them (-1)."""
    if s.num_replicas[expert] == 0:
        return
    n = list_sent(t, s, log, expert, sign)
    n = list_received(t, s, log, expert, n)

    # Add all contributions, logging what each resource was before this move.
    at, by, busy, power, stamp = log.at, log.by, s.busy, s.power, s.stamp
    resource, busy_before, power_before = log.resource, log.busy, log.power
    touched, now = log.counts[0], log.counts[1]
    for m in range(n):
        k = at[m]
        if stamp[k] != now:
            stamp[k] = now
            resource[touched] = k
            busy_before[touched] = busy[k]
            power_before[touched] = power[k]
            touched += 1
        busy[k] += by[m]
    log.counts[0] = touched


@inlined
def list_sent(t: LayerData, s: LayerState, log: UndoLog, expert: int, sign: float) -> int:
    """List an expert's contributions to links and sending ports, by nearest tier, evenly -> their number."""
    demand, link_cost, egress_cost = t.demand, t.link_cost, t.egress_cost
    node_of_rank, rack_of_node = t.node_of_rank, t.rack_of_node
    replicas, replicas_in_rack, ranks_of_expert = s.replicas, s.replicas_in_rack, s.ranks_of_expert
    at, by, served, entered, crossed = log.at, log.by, log.served, log.entered, log.crossed
    num_nodes, num_replicas, n = len(rack_of_node), s.num_replicas[expert], 0
    for c in range(num_replicas):
        served[c] = entered[c] = 0.0
    for rack in range(crossed.shape[1]):
        crossed[0, rack] = crossed[1, rack] = 0.0

    # Send each node's tokens.
    for i in range(num_nodes):
        tokens = sign * demand[i, expert]
        if tokens == 0.0:
            continue

        # Find the nearest tier with a replica, and each replica's share.
        here, rack = replicas[i, expert], rack_of_node[i]
        in_rack = replicas_in_rack[rack, expert]
        share = tokens / (here if here > 0 else in_rack if in_rack > 0 else num_replicas)

        # Put it on links, and sum what enters nodes and crosses racks.
        for c in range(num_replicas):
            j = node_of_rank[ranks_of_expert[expert, c]]
            if (here > 0 and j != i) or (here == 0 and in_rack > 0 and rack_of_node[j] != rack):
                continue
            served[c] += share
            if j != i:
                at[n] = i * num_nodes + j
                by[n] = share * link_cost[i, j]
                n += 1
                entered[c] += share
                if rack_of_node[j] != rack:
                    crossed[0, rack] += share
                    crossed[1, rack_of_node[j]] += share
        if here == 0 and egress_cost[i] > 0.0:
            at[n] = t.first_egress + i
            by[n] = tokens * egress_cost[i]
            n += 1
    return n


@inlined
def list_received(t: LayerData, s: LayerState, log: UndoLog, expert: int, n: int) -> int:
    """List, after n contributions, those to receiving ports, uplinks and ranks -> their number."""
    ingress_cost, uplink_cost, rank_cost, node_of_rank = t.ingress_cost, t.uplink_cost, t.rank_cost, t.node_of_rank
    at, by, served, entered, crossed = log.at, log.by, log.served, log.entered, log.crossed
    ranks_of_expert = s.ranks_of_expert
    num_racks = len(uplink_cost)

    # Put what each replica serves on its node's port and its rank.
    for c in range(s.num_replicas[expert]):
        rank = ranks_of_expert[expert, c]
        if entered[c] != 0.0 and ingress_cost[node_of_rank[rank]] > 0.0:
            at[n] = t.first_ingress + node_of_rank[rank]
            by[n] = entered[c] * ingress_cost[node_of_rank[rank]]
            n += 1
        if rank_cost > 0.0:
            at[n] = t.first_rank + rank
            by[n] = served[c] * rank_cost
            n += 1

    # Put what crosses on the uplinks, out and then in.
    for way in range(2):
        for rack in range(num_racks):
            if crossed[way, rack] != 0.0 and uplink_cost[rack] > 0.0:
                at[n] = t.first_uplink + way * num_racks + rack
                by[n] = crossed[way, rack] * uplink_cost[rack]
                n += 1
    return n


@inlined
def update_powers(t: LayerData, s: LayerState, log: UndoLog, smooth_max: SmoothMax) -> float:
    """Update the powers of what the move touched -> change of their sum."""
    busy, power, resource, before, latency = s.busy, s.power, log.resource, log.power, t.link_latency
    change = 0.0
    for n in range(log.counts[0]):
        k = resource[n]
        seconds = busy[k]
        if k < len(latency) and seconds > NO_TRAFFIC:
            seconds += latency[k]
        x = min(max(seconds / smooth_max.scale, 0.0), _MOST_POWERED)
        for _ in range(smooth_max.doublings):
            x *= x
        power[k] = x
        change += x - before[n]
    return change


@compiled
def max_seconds(t: LayerData, s: LayerState, log: UndoLog, touched: bool) -> float:
    """Compute the seconds of the busiest resource: of all, or of those that the last move touched."""
    busy, latency, resource = s.busy, t.link_latency, log.resource
    most = 0.0
    for n in range(log.counts[0] if touched else len(busy)):
        k = resource[n] if touched else n
        seconds = busy[k]
        if k < len(latency) and seconds > NO_TRAFFIC:
            seconds += latency[k]
        most = max(most, seconds)
    return most


@inlined
def find_busiest(power: np.ndarray) -> int:
    """Find the number of the resource of the highest power."""
    best, most = 0, -1.0
    for k in range(len(power)):
        if power[k] > most:
            best, most = k, power[k]
    return best


@inlined
def crossing_change(t: LayerData, s: LayerState, e: int, a: int, f: int, b: int) -> float:
    """Compute how many more tokens leave their nodes after a move: a node with a replica serves its own."""
    change, here = 0.0, t.node_of_rank[a]
    there = t.node_of_rank[b] if b != EMPTY else EMPTY
    if here == there:
        return 0.0
    for expert, source, target in ((e, here, there), (f, there, here)):
        if expert != EMPTY and source != EMPTY and s.replicas[source, expert] == 1:
            change += t.demand[source, expert]
        if expert != EMPTY and target != EMPTY and s.replicas[target, expert] == 0:
            change -= t.demand[target, expert]
    return change
