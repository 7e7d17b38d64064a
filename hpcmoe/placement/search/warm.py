"""The search's machine code: compiled before any time counts, cached, and compiled anew when a source has changed."""

import logging
import pathlib

import numpy as np
from numba.core.event import Event, Listener, install_listener

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import make_limits
from hpcmoe.placement.search.anneal import Budget, reduce_crossing, search_layout
from hpcmoe.placement.search.layer_data import make_layer_data
from hpcmoe.placement.search.memory_trades import evaluate_moves
from hpcmoe.placement.search.moves import move
from hpcmoe.placement.search.seeds import PinnedCounts, make_packed

log = logging.getLogger(__name__)


class CompilationLogger(Listener):
    """A listener that logs once that numba compiles, not that it reads its cache."""

    def __init__(self) -> None:
        self.is_first = True

    def on_start(self, event: Event) -> None:
        """Log the first compilation."""
        if self.is_first:
            log.info("compiling the placement's search with numba, about 20 s; its cache keeps it for the next run")
        self.is_first = False

    def on_end(self, event: Event) -> None:
        """Ignore the end of a compilation, which numba asks for."""


def compile_search() -> None:
    """Compile the search, or read it from numba's cache, before any time counts: by placing a tiny problem."""
    delete_stale_code()
    with install_listener("numba:compile", CompilationLogger()):
        place_tiny_problem()


def place_tiny_problem() -> None:
    """Call each compiled function of the search."""
    one = np.ones(2)
    tiny = PlacementProblem(
        num_layers=1, num_experts=2, slots_per_rank=2, replicate=True,
        node_of_rank=np.arange(2), rack_of_node=np.zeros(2, np.int64),
        bytes_per_second=np.ones((2, 2)), latency_seconds=np.zeros((2, 2)),
        egress_bytes_per_second=one, ingress_bytes_per_second=one, uplink_bytes_per_second=np.full(1, np.inf),
        memory_bytes=np.full(2, 2), expert_bytes=1, bytes_per_token=1,
        tokens_of_rank=one, probability=np.full((1, 2, 2), 0.5),
    )  # fmt: skip
    data = make_layer_data(tiny, 0, make_limits(tiny, tiny.slots_of_node))
    expert_at = make_packed(data, PinnedCounts(of_node=1))
    search_layout(data, expert_at, 0, Budget(proposals=1, goal=-1.0))
    reduce_crossing(data, expert_at, 0, 1)
    evaluate_moves(tiny, 0, expert_at)


def delete_stale_code() -> None:
    """Delete cached machine code older than any source here: numba checks a function's own file alone."""
    if not hasattr(move, "stats"):  # NUMBA_DISABLE_JIT: it runs as it stands
        return
    newest = max(path.stat().st_mtime for path in pathlib.Path(__file__).parent.glob("*.py"))
    for path in pathlib.Path(move.stats.cache_path or ".").glob("*.nb[ic]"):
        if path.stat().st_mtime < newest:
            path.unlink(missing_ok=True)
