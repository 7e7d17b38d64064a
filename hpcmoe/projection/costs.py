"""What each op of a step costs a rank, as a straight line in tokens, with its range and where it came from.

An op's seconds are fixed_seconds + seconds_per_token x tokens of a micro-batch on the rank. Costs are measured
(hpcmoe.measuring) or estimated from a data sheet (hpcmoe.projection.estimated), and say which.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value, suggest
from hpcmoe.reading import format_json, read_json
from hpcmoe.sections import section
from hpcmoe.validate import validate_table

LAYER_OPS = (  # once a layer and micro-batch, in the order in which a micro-batch takes them
    "dense", "route", "dispatch", "compute", "combine", "combine_backward", "compute_backward", "route_backward",
    "dense_backward",
)  # fmt: skip
MICRO_BATCH_OPS = ("head",)  # once a micro-batch: embedding, head and loss, and back
STEP_OPS = ("data", "optimizer", "waiting", "rest")  # once a step
OPS = (*LAYER_OPS, *MICRO_BATCH_OPS, *STEP_OPS)
_FORMAT = "hpcmoe costs 1"
_NotNegative = Annotated[float, Ge(0)]


@section
class OpCost:
    """The seconds of an op on one rank."""

    fixed_seconds: _NotNegative
    seconds_per_token: _NotNegative  # of a micro-batch on the rank
    low: Annotated[float, Interval(ge=0, le=1)] = 1.0  # the least that an op takes, of its seconds
    high: Annotated[float, Interval(ge=1, le=1e6)] = 1.0  # the most

    def seconds(self, tokens: float) -> float:
        """Return the seconds of the op for some tokens."""
        return self.fixed_seconds + self.seconds_per_token * tokens


@section
class CostConditions:
    """What was measured or estimated: what an op's cost depends on besides its tokens."""

    hidden: Annotated[int, Ge(1)]
    feed_forward: Annotated[int, Ge(1)]  # of this rank's shard of an expert
    kind: str
    num_layers: Annotated[int, Ge(1)]
    num_experts: Annotated[int, Ge(1)]  # that one rank held, of a layer
    top_k: Annotated[int, Ge(1)]
    sequence_length: Annotated[int, Ge(1)]
    attention: bool
    dtype: str
    mode: str  # "train" or "infer"
    micro_batches: Annotated[int, Ge(1)]


@section
class Costs:
    """The costs of all ops of a step, and their provenance."""

    conditions: CostConditions
    ops: Mapping[str, OpCost]
    source: Mapping[str, str] = field(default_factory=dict)  # host, processor, date, ranks_per_core ...
    is_measured: bool = True
    tokens: tuple[Annotated[int, Ge(1)], ...] = ()  # of the micro-batches that were measured

    def describe(self) -> str:
        """Return in one line where the costs came from."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self.source.items()]
        return f"{'measured' if self.is_measured else 'estimated'}: {', '.join(words)}"


def fit_op(tokens: Sequence[int], samples: Sequence[np.ndarray]) -> OpCost:
    """Fit a line to the seconds of an op at some numbers of tokens, samples [steps x ranks] at each -> OpCost.

    The line goes through medians, each counted by its own size; a line that would begin or slope below 0 does not. The
    range is from the 10th to the 90th percentile of the samples.
    """
    x, y = np.array(tokens, np.float64), np.array([np.median(of_size) for of_size in samples])
    weights = 1 / np.maximum(y, 1e-9)
    matrix = np.stack([np.ones_like(x), x], axis=1) * weights[:, None]
    (fixed, per_token), *_ = np.linalg.lstsq(matrix, y * weights, rcond=None)
    if fixed < 0:
        fixed, per_token = 0.0, float((y * x * weights**2).sum() / (x * x * weights**2).sum())
    if per_token < 0:
        fixed, per_token = float(np.median(y)), 0.0
    ends = [np.percentile(of_size, (10, 90)) / max(middle, 1e-12) for of_size, middle in zip(samples, y, strict=True)]
    low, high = min(1.0, *(end[0] for end in ends)), max(1.0, *(end[1] for end in ends))
    return OpCost(
        fixed_seconds=float(fixed),
        seconds_per_token=float(per_token),
        low=max(float(low), 0.0),
        high=min(float(high), 1e6),
    )


def format_costs(costs: Costs) -> str:
    """Format costs as the JSON of a costs file."""
    tree: dict[str, Any] = asdict(costs)
    return format_json({"format": _FORMAT, **tree})


def read_costs(path: str | os.PathLike) -> Costs:
    """Read a costs file. Raises ConfigError, one line a key at fault."""
    where, tree = f"{one_line(path)}: ", read_json(path)
    if not isinstance(tree, dict) or tree.pop("format", None) != _FORMAT:
        raise ConfigError(f"{where}is no costs file of `hpcmoe plan --measure`: format must be {show_value(_FORMAT)}")
    conditions = check_object(where, "conditions", tree.get("conditions"))
    tables = check_object(where, "ops", tree.get("ops"))
    if strange := [name for name in tables if name not in OPS]:
        raise ConfigError(f"{where}ops: {one_line(strange[0])}: unknown op{suggest(strange[0], OPS)}")
    if not tables:
        raise ConfigError(f"{where}ops: must hold the cost of one op at least")
    validate_table(CostConditions, conditions, f"{where}conditions: ")
    for name, table in tables.items():
        validate_table(OpCost, check_object(where, f"ops: {name}", table), f"{where}ops: {name}: ")
    return validate_table(Costs, tree, where)


def check_object(where: str, name: str, value: Any) -> dict[str, Any]:
    """Check that a value is a JSON object. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}{one_line(name)} = {show_value(value)}: must be a JSON object")
    return value
