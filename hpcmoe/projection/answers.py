"""The answer to a question of `hpcmoe plan`: a table for people, and the object of PLAN.json."""

from collections.abc import Sequence

from tabulate import tabulate

from hpcmoe.messages import format_size
from hpcmoe.projection.candidates import Candidate

GROUPS = {  # what a step's seconds are shown under
    "dense": ("dense", "dense_backward", "head"),
    "experts": ("compute", "compute_backward"),
    "rows": ("route", "dispatch", "combine", "combine_backward", "route_backward"),
    "sums": ("sums",),
    "optimizer": ("optimizer",),
    "other": ("once",),
    "waiting": ("waiting",),
}


def group_parts(candidate: Candidate) -> dict[str, float]:
    """Group the seconds of a step as they are shown; they sum to the step's."""
    parts = candidate.prediction.parts
    return {group: sum(parts.get(name, 0.0) for name in names) for group, names in GROUPS.items()}


def make_plan_tree(candidates: Sequence[Candidate], loads: str, job_tokens: float) -> dict[str, object]:
    """Make the object of PLAN.json; job_tokens: for which node-hours are counted."""
    return {
        "format": "hpcmoe plan 1",
        "loads": loads,
        "best": candidates.index(choose_best(candidates)),
        "candidates": [make_candidate_tree(candidate, job_tokens) for candidate in candidates],
    }


def make_candidate_tree(candidate: Candidate, job_tokens: float) -> dict[str, object]:
    """Make one candidate's object."""
    step = candidate.prediction
    return {
        "vary": candidate.what,
        "nodes": step.num_nodes,
        "ranks": step.shape.num_ranks,
        "data": step.shape.data,
        "expert": step.shape.expert,
        "tensor": step.shape.tensor,
        "micro_batches": step.micro_batches,
        "in_flight": step.in_flight,
        "tokens": step.tokens,
        "step_seconds": step.seconds,
        "step_seconds_range": list(step.seconds_range),
        "tokens_per_second": step.tokens_per_second,
        "binds": step.binds[0],
        "binds_share": step.binds[1],
        "binds_next": step.binds_next[0],
        "binds_next_share": step.binds_next[1],
        "busy_seconds": dict(step.demands),
        "seconds_of_part": group_parts(candidate),
        "hidden_seconds": step.hidden_seconds,
        "node_bytes_sent": step.node_bytes[0],
        "node_bytes_leaving_rack": step.node_bytes[1],
        "sigma": step.sigma,
        "memory_bytes": candidate.memory_bytes,
        "available_bytes": candidate.available_bytes,
        "fits": candidate.fits,
        "node_hours": step.num_nodes * job_tokens / step.tokens_per_second / 3600,
        "sources": list(step.sources),
    }


def choose_best(candidates: Sequence[Candidate]) -> Candidate:
    """Choose what has most tokens a second of those that fit and change nothing; none fits: what lacks least."""
    described = [candidate for candidate in candidates if not candidate.what]
    fitting = [candidate for candidate in described if candidate.fits]
    if fitting:
        return max(fitting, key=lambda candidate: candidate.prediction.tokens_per_second)
    return min(described, key=lambda candidate: candidate.memory_bytes / max(candidate.available_bytes, 1.0))


def format_plan(candidates: Sequence[Candidate], loads: str, job_tokens: float) -> str:
    """Format the answer -> text of at most 100 columns but for names of files."""
    rows = [list_cells(candidate, job_tokens) for candidate in candidates]
    headers = ("nodes", "dxexs", "mb", "step ms", "range", "tok/s", "binds", "next", "memory", "fits", "node-h", "vary")
    best = choose_best(candidates)
    parts = group_parts(best)
    step = best.prediction
    went = [(name, f"{1e3 * seconds:.4g}", f"{100 * seconds / step.seconds:.1f}") for name, seconds in parts.items()]
    went.append(("hidden beside", f"{1e3 * step.hidden_seconds:.4g}", ""))
    title = f"best: {step.shape} on {step.num_nodes} nodes" if best.fits else f"nothing fits; nearest: {step.shape}"
    lines = [
        tabulate(rows, headers=headers, disable_numparse=True),
        "",
        f"{title}; the busiest node sends {format_size(int(step.node_bytes[0]))} a step, "
        f"{format_size(int(step.node_bytes[1]))} of it out of its rack; sigma of ranks {step.sigma:.3f}",
        tabulate(went, headers=("where a step goes", "ms", "%"), disable_numparse=True),
        "",
        f"loads of experts: {loads}",
        *(f"costs {source}" for source in step.sources),
    ]
    return "\n".join(lines)


def list_cells(candidate: Candidate, job_tokens: float) -> tuple[str, ...]:
    """List a candidate's cells of the table."""
    step = candidate.prediction
    low, high = step.seconds_range
    hours = step.num_nodes * job_tokens / step.tokens_per_second / 3600
    return (
        str(step.num_nodes),
        str(step.shape),
        f"{step.micro_batches}/{step.in_flight}",
        f"{1e3 * step.seconds:.4g}",
        f"{1e3 * low:.3g}-{1e3 * high:.3g}",
        f"{step.tokens_per_second:.3g}",
        f"{step.binds[0]} {100 * step.binds[1]:.0f} %",
        f"{step.binds_next[0]} {100 * step.binds_next[1]:.0f} %",
        format_size(int(candidate.memory_bytes)),
        "yes" if candidate.fits else "no",
        f"{hours:.3g}",
        candidate.what,
    )
