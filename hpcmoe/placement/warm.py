"""Machine code for the search, made once and kept: before any time counts, and anew when a source has changed."""

import pathlib

import numpy as np

from hpcmoe.placement.moves import move
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import limit_ranks
from hpcmoe.placement.search import Budget, clear_up, improve
from hpcmoe.placement.seeds import Kept, lay_packed
from hpcmoe.placement.shifts import weigh_shifts
from hpcmoe.placement.terms import make_terms


def compile_all():
    """Have what numba compiles compiled, or read from its cache, before any time counts: by placing next to nothing."""
    drop_stale_code()
    one = np.ones(2)
    tiny = PlacementProblem(
        num_layers=1, num_experts=2, slots_per_rank=2, replicate=True,
        node_of_rank=np.arange(2), rack_of_node=np.zeros(2, np.int64),
        bytes_per_second=np.ones((2, 2)), latency_seconds=np.zeros((2, 2)),
        egress_bytes_per_second=one, ingress_bytes_per_second=one, uplink_bytes_per_second=np.full(1, np.inf),
        memory_bytes=np.full(2, 2), expert_bytes=1, bytes_per_token=1,
        tokens_of_rank=one, probability=np.full((1, 2, 2), 0.5),
    )  # fmt: skip
    terms = make_terms(tiny, 0, limit_ranks(tiny, tiny.slots_of_node))
    expert_at = lay_packed(terms, Kept(of_node=1))
    improve(terms, expert_at, 0, Budget(proposals=1, goal=-1.0))
    clear_up(terms, expert_at, 0, 1)
    weigh_shifts(tiny, 0, expert_at)


def drop_stale_code():
    """Delete cached machine code older than any source here: numba looks at a function's own file alone."""
    if not hasattr(move, "stats"):  # NUMBA_DISABLE_JIT: it runs as it stands
        return
    newest = max(path.stat().st_mtime for path in pathlib.Path(__file__).parent.glob("*.py"))
    for path in pathlib.Path(move.stats.cache_path or ".").glob("*.nb[ic]"):
        if path.stat().st_mtime < newest:
            path.unlink(missing_ok=True)
