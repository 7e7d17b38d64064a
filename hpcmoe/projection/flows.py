"""Rows on their way as fluids: how fast each flow goes where several share ports, links and uplinks fairly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_UNLIMITED = 1e18  # bytes per second of a flow that nothing limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """What joins the classes of ranks: what each flow takes of each resource."""

    names: Sequence[str]  # of the resources, for people
    rates: Sequence[float]  # of each, bytes per second; inf: no limit
    uses: Mapping[tuple[int, int], Sequence[tuple[int, float]]]  # (from, to): resources, and their bytes a byte of flow
    latency: Mapping[tuple[int, int], float]  # seconds
    known: dict[frozenset[tuple[int, int]], dict[tuple[int, int], float]] = field(default_factory=dict)

    def share(self, flows: frozenset[tuple[int, int]]) -> Mapping[tuple[int, int], float]:
        """Return the max-min fair rate of each flow, bytes per second; the same flows are shared out once."""
        if flows not in self.known:
            self.known[flows] = fill_progressively(flows, self.uses, self.rates)
        return self.known[flows]


def fill_progressively(
    flows: frozenset[tuple[int, int]],
    uses: Mapping[tuple[int, int], Sequence[tuple[int, float]]],
    rates: Sequence[float],
) -> dict[tuple[int, int], float]:
    """Compute max-min fair rates: all flows grow alike until a resource is full, whose flows then stay (Bertsekas)."""
    left, growing = dict(enumerate(rates)), set(flows)
    found: dict[tuple[int, int], float] = {}
    while growing:
        load: dict[int, float] = {}
        for flow in growing:
            for resource, part in uses[flow]:
                load[resource] = load.get(resource, 0.0) + part
        tightest = min(load, key=lambda resource: left[resource] / load[resource], default=None)
        if tightest is None or left[tightest] == float("inf"):
            return found | dict.fromkeys(growing, _UNLIMITED)
        rate = max(left[tightest] / load[tightest], 1.0)
        for flow in [flow for flow in growing if any(resource == tightest for resource, _ in uses[flow])]:
            growing.discard(flow)
            found[flow] = rate
            for resource, part in uses[flow]:
                left[resource] = max(left[resource] - rate * part, 0.0)
    return found
