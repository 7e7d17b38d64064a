"""One step foretold: a discrete-event simulation of classes of ranks that take their ops in their lanes' order.

A class stands for ranks that do the same at the same time. Ops take processor time, which the ranks of a node share
where they are more than its cores. Rows between nodes are flows on a Fabric, one at a time from class to class, in the
order in which they were sent; within a node they are there at once, for their copies are in the costs of ops.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.projection.flows import Fabric
from hpcmoe.projection.turns import COMPUTE_OF, HEAVY, RETURN_OF, SENDS, Op

_SOON = 1e-12  # seconds within which events are at the same time
_BYTES_LEFT = 1e-3

Bar = tuple[int, str, float, float]  # class, stage, begin and end in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the classes of ranks have to do in a step. C classes, L layers."""

    lanes: Sequence[Sequence[Op]]
    seconds: dict[str, np.ndarray]  # of each op, [C, L] processor time; of the head [C, 1]
    near: np.ndarray  # [L, C, C] rows that a rank there gets from ranks here on its own node
    far: np.ndarray  # [L, C, C] bytes from all ranks here to experts of all ranks there, on other nodes
    far_rows: np.ndarray  # [L, C, C] rows that a rank there gets from ranks here on other nodes
    ranks_per_core: np.ndarray  # [C] ranks that share a core, where all work; 1 and less: none waits


@dataclass(slots=True, kw_only=True)
class SimulatedStep:
    """What a simulated step took."""

    seconds: float
    spent: dict[str, np.ndarray]  # [C] of each stage, wall-clock; "waiting" besides
    bars: list[Bar]


class Simulation:
    """The state of a step that is simulated."""

    def __init__(self, work: Work, fabric: Fabric) -> None:
        self.work, self.fabric, self.now = work, fabric, 0.0
        self.num_classes = work.far.shape[1]
        self.at = [[0] * len(work.lanes) for _ in range(self.num_classes)]
        self.busy: list[bool] = [False] * self.num_classes
        self.timers: list[tuple[float, int, tuple]] = []
        self.numbers = itertools.count()
        self.there: dict[tuple, set] = defaultdict(set)  # (class, op): what has come for it
        self.left: dict[tuple, list] = {}  # (class, op): pieces of an expert op not begun
        self.queues: dict[tuple[int, int], list] = defaultdict(
            list
        )  # flows from class to class, the first is under way
        self.moving: dict[tuple[int, int], float] = {}  # bytes left
        self.spent: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(self.num_classes))
        self.bars: list[Bar] = []
        self.peers = [self.list_peers(layer) for layer in range(len(work.far))]

    def list_peers(self, layer: int) -> list[tuple[list, list]]:
        """List for each class whose rows its experts get, and whose experts get its rows: (is near, class)."""
        near, far = self.work.near[layer], self.work.far[layer]
        return [
            (
                [(True, peer) for peer in np.flatnonzero(near[:, own])]
                + [(False, p) for p in np.flatnonzero(far[:, own])],
                [(True, peer) for peer in np.flatnonzero(near[own])] + [(False, p) for p in np.flatnonzero(far[own])],
            )
            for own in range(self.num_classes)
        ]

    def run(self) -> SimulatedStep:
        """Simulate the step."""
        for own in range(self.num_classes):
            self.take_up(own)
        while self.timers or self.moving:
            self.advance()
        spent = dict(self.spent)
        spent["waiting"] = self.now - sum(spent.values(), np.zeros(self.num_classes))
        return SimulatedStep(seconds=self.now, spent=spent, bars=self.bars)

    def advance(self) -> None:
        """Move on to the next event, and let those go on who waited for it."""
        rates = self.fabric.share(frozenset(self.moving)) if self.moving else {}
        ends = [self.moving[flow] / rates[flow] for flow in self.moving]
        elapsed = max(min(ends + ([self.timers[0][0] - self.now] if self.timers else [])), 0.0)
        self.now += elapsed
        ended = []
        for flow in self.moving:
            self.moving[flow] -= elapsed * rates[flow]
            if self.moving[flow] <= _BYTES_LEFT:
                ended.append(flow)
        touched: set[int] = set()
        for flow in ended:
            del self.moving[flow]
            touched.add(self.land(flow))
        while self.timers and self.timers[0][0] <= self.now + _SOON:
            touched |= self.expire(heapq.heappop(self.timers)[2])
        for own in touched:
            self.take_up(own)

    def expire(self, event: tuple) -> set[int]:
        """End an op's work, or let a flow begin -> the classes that may go on."""
        kind, *rest = event
        if kind == "flow":
            flow = rest[0]
            self.moving[flow] = self.queues[flow][0][0]
            return set()
        return self.end_piece(*rest) if kind == "piece" else self.end_op(*rest)

    def begin(self, own: int, stage: str, seconds: float, event: tuple) -> None:
        """Start a class's work for some processor time."""
        taken = seconds * max(1.0, float(self.work.ranks_per_core[own]))
        self.busy[own] = True
        self.spent[stage][own] += taken
        self.bars.append((own, stage, self.now, self.now + taken))
        heapq.heappush(self.timers, (self.now + taken, next(self.numbers), event))

    def take_up(self, own: int) -> None:
        """Start the first op of an idle class that can be, light ones first."""
        if self.busy[own]:
            return
        heads = [
            (lane, ops[at])
            for lane, (ops, at) in enumerate(zip(self.work.lanes, self.at[own], strict=True))
            if at < len(ops)
        ]
        heads.sort(key=lambda head: head[1].stage in HEAVY)
        for lane, op in heads:
            if op.stage in HEAVY:
                if self.take_piece(own, lane, op):
                    return
            elif self.is_ready(own, op):
                self.begin(own, op.stage, float(self.work.seconds[op.stage][own, op.layer]), ("op", own, lane, op))
                return

    def is_ready(self, own: int, op: Op) -> bool:
        """Return True if all that an op needs is there: its rows' results, where it takes any."""
        if op.stage not in RETURN_OF.values():
            return True
        return self.there[own, op].issuperset(self.peers[op.layer][own][1])

    def take_piece(self, own: int, lane: int, op: Op) -> bool:
        """Start the next piece of the experts' work whose rows are there: of the own node, or of a class."""
        sources = self.peers[op.layer][own][0]
        pieces = self.left.setdefault((own, op), group_pieces(sources))
        if not pieces:  # no rows at all
            self.at[own][lane] += 1
            self.take_up(own)
            return True
        there = self.there[own, op]
        piece = next((piece for piece in pieces if there.issuperset(piece)), None)
        if piece is None:
            return False
        pieces.remove(piece)
        share = self.count_rows(own, op.layer, piece) / max(self.count_rows(own, op.layer, sources), 1e-300)
        seconds = float(self.work.seconds[op.stage][own, op.layer]) * share
        self.begin(own, op.stage, seconds, ("piece", own, lane, op, tuple(piece)))
        return True

    def count_rows(self, own: int, layer: int, sources: Sequence[tuple[bool, int]]) -> float:
        """Count the rows that a class's experts get from some sources."""
        near, far = self.work.near[layer], self.work.far_rows[layer]
        return float(sum((near if is_near else far)[peer, own] for is_near, peer in sources))

    def end_piece(self, own: int, lane: int, op: Op, piece: tuple) -> set[int]:
        """Send the results of a piece home -> the classes that may go on."""
        self.busy[own] = False
        if not self.left[own, op]:
            self.at[own][lane] += 1
        home, touched = Op(RETURN_OF[op.stage], op.layer, op.micro_batch), {own}
        for is_near, peer in piece:
            if is_near:
                self.there[peer, home].add((True, own))
                touched.add(peer)
            else:  # as many bytes go back as came
                self.send((own, peer), float(self.work.far[op.layer, peer, own]), (peer, home, (False, own)))
        return touched

    def end_op(self, own: int, lane: int, op: Op) -> set[int]:
        """End an op; rows go to their experts -> the classes that may go on."""
        self.busy[own] = False
        self.at[own][lane] += 1
        touched = {own}
        if op.stage in SENDS:
            target = Op(COMPUTE_OF[op.stage], op.layer, op.micro_batch)
            for is_near, peer in self.peers[op.layer][own][1]:
                if is_near:
                    self.there[peer, target].add((True, own))
                    touched.add(peer)
                else:
                    self.send((own, peer), float(self.work.far[op.layer, own, peer]), (peer, target, (False, own)))
        return touched

    def send(self, flow: tuple[int, int], num_bytes: float, arrival: tuple) -> None:
        """Queue bytes on their way behind those of the same flow."""
        self.queues[flow].append((num_bytes, arrival))
        if len(self.queues[flow]) == 1:
            self.launch(flow)

    def launch(self, flow: tuple[int, int]) -> None:
        """Start the first of a queue of flows after the latency."""
        begin = self.now + self.fabric.latency.get(flow, 0.0)
        heapq.heappush(self.timers, (begin, next(self.numbers), ("flow", flow)))

    def land(self, flow: tuple[int, int]) -> int:
        """Record that what has been sent is there, and start the next -> the class that may go on."""
        own, op, source = self.queues[flow].pop(0)[1]
        self.there[own, op].add(source)
        if self.queues[flow]:
            self.launch(flow)
        return own


def group_pieces(sources: Sequence[tuple[bool, int]]) -> list[list[tuple[bool, int]]]:
    """Group what the experts wait for into pieces: all of the own node, then each class of other nodes."""
    near, far = [source for source in sources if source[0]], [[source] for source in sources if not source[0]]
    return ([near] if near else []) + far


def simulate(work: Work, fabric: Fabric) -> SimulatedStep:
    """Simulate one step without its sums, optimizer and what else is done once."""
    return Simulation(work, fabric).run()
