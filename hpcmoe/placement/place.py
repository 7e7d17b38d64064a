"""Placement as a function: a problem in, a placement out, without ranks."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import show_value
from hpcmoe.placement.files.checks import find_overflow
from hpcmoe.placement.files.maps import check_map
from hpcmoe.placement.problem import OBJECTIVES, PlacementProblem, check_problem, check_problem_arrays
from hpcmoe.placement.result import Placement

log = logging.getLogger(__name__)

METHODS = ("packed", "contiguous", "eplb")
SECONDS_A_LAYER = 0.1  # of search where no time is given


def place(
    problem: PlacementProblem | Mapping[str, Any],
    method: str = "packed",
    *,
    seconds: float | None = None,
    iterations: int = 0,
    seed: int = 0,
    start: np.ndarray | None = None,
    objective: str = "step",
) -> Placement:
    """Place the experts of all layers on ranks. No MPI: it runs where it is called.

    problem: a PlacementProblem, or a dict with the keys of a case file (hpcmoe/placement/README.md), whose values may
    be arrays; objective, that of a dict: "links", "ports" or "step". method: "packed" searches for about `seconds`
    (0.1 a layer) or, with iterations > 0, for so many proposals a layer, after which equal seeds give equal answers;
    half as long again may go into its lower bound. "contiguous" and "eplb" place by rule. start [L, S], experts of
    slots: the answer is not worse. Raises ConfigError or PlacementError, a line an error, with keys and arithmetic.
    """
    _check_options(method, seconds, iterations, seed, objective)
    if isinstance(problem, PlacementProblem):
        check_problem_arrays(problem)
        for line in find_overflow(problem, {"B": "bytes_per_second", "tokens": "tokens_of_rank"}):
            raise ConfigError(line)
        check_problem(problem, "num_experts, slots_per_rank", "num_experts, num_layers, memory_bytes")
    else:
        from hpcmoe.placement.files.case import check_case  # imports pydantic

        problem, notes = check_case(to_lists(problem), objective=objective)
        for note in notes:
            log.warning("%s", note)
    if start is not None:
        start, _ = check_map("start", "expert_of_slot", np.asarray(start), problem)

    # Import what compiles once the input is known to be good.
    from hpcmoe.placement.solve import make_placement

    seconds = SECONDS_A_LAYER * problem.num_layers if seconds is None else seconds
    return make_placement(problem, method, seconds=seconds, iterations=iterations, seed=seed, start=start)


def _check_options(method: str, seconds: float | None, iterations: int, seed: int, objective: str) -> None:
    """Raise ConfigError for options that cannot be."""
    for name, value, words in (("method", method, METHODS), ("objective", objective, OBJECTIVES)):
        if value not in words:
            raise ConfigError(f"{name} = {show_value(value)}: must be one of {', '.join(words)}")
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise ConfigError(f"seconds = {seconds}: must be finite and > 0")
    for name, number in (("iterations", iterations), ("seed", seed)):
        if not 0 <= number < 2**63:
            raise ConfigError(f"{name} = {number}: must be from 0 to 2^63 - 1")


def to_lists(value: Any) -> Any:
    """Convert mappings, sequences and arrays to the dicts, lists and numbers that a JSON file has."""
    if isinstance(value, Mapping):
        return {key: to_lists(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_lists(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
