"""One layer's replicas and how busy they make every resource, changed move by move; compiled by numba.

Every resource that can be busy, be it a link, a port, an uplink or a rank, is one number in one vector. A search
lowers the sum of these numbers to a high power: a smooth stand-in for their maximum that sees all that are nearly as
busy. A move takes one or two experts' tokens off the vector, relocates their replicas, and puts the tokens back; what
it touched is logged, so that undoing it restores every number bit for bit.

Arrays that an inner loop needs are named before it: numba counts references at each look into a tuple.
"""

import numba
import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY

NO_TRAFFIC = 1e-15  # seconds: what rounding leaves on a link that no token uses
MOST = 50.0  # times the scale: far above any that will be kept, and finite to the 128th power
inlined = numba.njit(error_model="numpy", nogil=True, inline="always")  # where a call would cost more than its work


def compiled(function):
    """Have numba compile a function at its first call, and keep it beside the source or in the user's cache folder.

    With NUMBA_DISABLE_JIT=1 it runs as it stands, as right and a hundred times slower; NumPy's warnings, which machine
    code does not have, are then kept quiet.
    """
    if numba.config.DISABLE_JIT:
        return np.errstate(all="ignore")(function)
    try:
        return numba.njit(error_model="numpy", nogil=True, cache=True)(function)
    except RuntimeError:  # neither can be written: compile it in every process
        return numba.njit(error_model="numpy", nogil=True)(function)


@compiled
def rebuild(t, s, log, smooth_max):
    """Make everything that follows from expert_at anew, free of rounding's traces -> sum of the powers."""
    for counts in (s.count_of_rank, s.count_of_node, s.num_replicas, s.num_moved):
        counts[:] = 0
    s.replicas[:] = 0
    s.replicas_in_rack[:] = 0
    s.busy[:] = 0.0
    s.power[:] = 0.0
    s.stamp[:] = -1
    log.count[:] = 0
    for rank in range(s.expert_at.shape[0]):
        for slot in range(s.expert_at.shape[1]):
            if s.expert_at[rank, slot] != EMPTY:
                relocate(t, s, s.expert_at[rank, slot], EMPTY, rank)
    for expert in range(t.demand.shape[1]):
        load(t, s, log, expert, 1.0)
    return settle(t, s, log, smooth_max)


@compiled
def move(t, s, log, smooth_max, e, a, f, b):
    """Bring expert f from rank b to a, and e from a to b -> change of the sum of powers.

    e, f or b may be EMPTY: a free slot, or a replica that comes from nowhere or goes there.
    """
    log.count[0] = 0
    log.count[1] += 1
    for step in range(4):  # one call of load in the source is one expansion of it in the machine code
        if step == 2:
            swap(t, s, e, a, f, b)
        expert = e if step % 2 == 0 else f
        if expert != EMPTY:
            load(t, s, log, expert, -1.0 if step < 2 else 1.0)
    return settle(t, s, log, smooth_max)


@compiled
def undo(t, s, log, e, a, f, b):
    """Take back the move just made."""
    swap(t, s, f, a, e, b)
    busy, power, resource, busy_before, power_before = s.busy, s.power, log.resource, log.busy, log.power
    for n in range(log.count[0]):
        k = resource[n]
        busy[k] = busy_before[n]
        power[k] = power_before[n]


@inlined
def swap(t, s, e, a, f, b):
    """Relocate expert e, if any, from rank a to b, and f from b to a."""
    if e != EMPTY:
        relocate(t, s, e, a, b)
    if f != EMPTY:
        relocate(t, s, f, b, a)


@inlined
def relocate(t, s, expert, source, target):
    """Count a replica as being on target instead of source; from EMPTY it is new, to EMPTY it goes."""
    ranks_of_expert, num_replicas = s.ranks_of_expert, s.num_replicas
    place = num_replicas[expert]
    if source != EMPTY:
        place = 0
        while ranks_of_expert[expert, place] != source:
            place += 1
        count(t, s, expert, source, -1)
    if target != EMPTY:
        ranks_of_expert[expert, place] = target
        count(t, s, expert, target, 1)
    if source == EMPTY:
        num_replicas[expert] += 1
    if target == EMPTY:
        num_replicas[expert] -= 1
        ranks_of_expert[expert, place] = ranks_of_expert[expert, num_replicas[expert]]


@inlined
def count(t, s, expert, rank, more):
    """Count one replica more or less on a rank, its node and its rack."""
    node = t.node_of_rank[rank]
    s.replicas[node, expert] += more
    s.replicas_in_rack[t.rack_of_node[node], expert] += more
    s.count_of_rank[rank] += more
    s.count_of_node[node] += more
    if t.most_moves != EMPTY and not t.already_held[rank, expert]:
        s.num_moved[0] += more


@inlined
def holds(s, rank, expert):
    """Tell whether a rank holds an expert."""
    held = False
    for slot in range(s.expert_at.shape[1]):
        held |= s.expert_at[rank, slot] == expert
    return held


@inlined
def load(t, s, log, expert, sign):
    """Put an expert's tokens on the way to its replicas (sign 1), or take them off (-1): nearest tier, evenly."""
    if s.num_replicas[expert] == 0:
        return
    n = load_links(t, s, log, expert, sign)
    n = load_ends(t, s, log, expert, n)

    # Add it all up, logging what each resource was before this move.
    at, by, busy, power, stamp = log.at, log.by, s.busy, s.power, s.stamp
    resource, busy_before, power_before = log.resource, log.busy, log.power
    touched, now = log.count[0], log.count[1]
    for m in range(n):
        k = at[m]
        if stamp[k] != now:
            stamp[k] = now
            resource[touched] = k
            busy_before[touched] = busy[k]
            power_before[touched] = power[k]
            touched += 1
        busy[k] += by[m]
    log.count[0] = touched


@inlined
def load_links(t, s, log, expert, sign):
    """List what an expert's tokens bring to links and ports out -> number of contributions."""
    demand, link_cost, egress_cost = t.demand, t.link_cost, t.egress_cost
    node_of_rank, rack_of_node = t.node_of_rank, t.rack_of_node
    replicas, replicas_in_rack, ranks_of_expert = s.replicas, s.replicas_in_rack, s.ranks_of_expert
    at, by, served, entered, crossed = log.at, log.by, log.served, log.entered, log.crossed
    num_nodes, num_replicas, n = len(rack_of_node), s.num_replicas[expert], 0
    for c in range(num_replicas):
        served[c] = entered[c] = 0.0
    for rack in range(crossed.shape[1]):
        crossed[0, rack] = crossed[1, rack] = 0.0
    for i in range(num_nodes):
        tokens = sign * demand[i, expert]
        if tokens == 0.0:
            continue

        # Find the nearest tier with a replica, and each replica's share.
        here, rack = replicas[i, expert], rack_of_node[i]
        in_rack = replicas_in_rack[rack, expert]
        share = tokens / (here if here > 0 else in_rack if in_rack > 0 else num_replicas)
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
            at[n] = num_nodes * num_nodes + i
            by[n] = tokens * egress_cost[i]
            n += 1
    return n


@inlined
def load_ends(t, s, log, expert, n):
    """List, after n contributions, what they sum up to on ports in, uplinks and ranks -> their number."""
    ingress_cost, uplink_cost, rank_cost, node_of_rank = t.ingress_cost, t.uplink_cost, t.rank_cost, t.node_of_rank
    at, by, served, entered, crossed = log.at, log.by, log.served, log.entered, log.crossed
    ranks_of_expert = s.ranks_of_expert
    num_nodes, num_racks = len(ingress_cost), len(uplink_cost)
    first_in = num_nodes * (num_nodes + 1)
    first_uplink = first_in + num_nodes
    first_rank = first_uplink + 2 * num_racks
    for c in range(s.num_replicas[expert]):
        rank = ranks_of_expert[expert, c]
        if entered[c] != 0.0 and ingress_cost[node_of_rank[rank]] > 0.0:
            at[n] = first_in + node_of_rank[rank]
            by[n] = entered[c] * ingress_cost[node_of_rank[rank]]
            n += 1
        if rank_cost > 0.0:
            at[n] = first_rank + rank
            by[n] = served[c] * rank_cost
            n += 1
    for way in range(2):
        for rack in range(num_racks):
            if crossed[way, rack] != 0.0 and uplink_cost[rack] > 0.0:
                at[n] = first_uplink + way * num_racks + rack
                by[n] = crossed[way, rack] * uplink_cost[rack]
                n += 1
    return n


@inlined
def settle(t, s, log, smooth_max):
    """Bring the powers of what the move touched up to date -> change of their sum."""
    busy, power, resource, before, latency = s.busy, s.power, log.resource, log.power, t.link_latency
    change = 0.0
    for n in range(log.count[0]):
        k = resource[n]
        seconds = busy[k]
        if k < len(latency) and seconds > NO_TRAFFIC:
            seconds += latency[k]
        x = min(max(seconds / smooth_max.scale, 0.0), MOST)
        for _ in range(smooth_max.doublings):
            x *= x
        power[k] = x
        change += x - before[n]
    return change


@compiled
def max_seconds(t, s, log, touched):
    """Find how long the busiest resource is busy: of all, or of those that the last move touched."""
    busy, latency, resource = s.busy, t.link_latency, log.resource
    most = 0.0
    for n in range(log.count[0] if touched else len(busy)):
        k = resource[n] if touched else n
        seconds = busy[k]
        if k < len(latency) and seconds > NO_TRAFFIC:
            seconds += latency[k]
        most = max(most, seconds)
    return most


@inlined
def find_busiest(power):
    """Find the resource of the highest power -> its number."""
    best, most = 0, -1.0
    for k in range(len(power)):
        if power[k] > most:
            best, most = k, power[k]
    return best


@inlined
def crossing_change(t, s, e, a, f, b):
    """Find how many more tokens leave their nodes after a move: a node with a replica serves its own."""
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
