"""A run as its record tells it: figures by name, each checked for its kind, since files come from any version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hpcmoe.messages import one_line
from hpcmoe.placement.problem import PlacementProblem


class Series(NamedTuple):
    """A figure of many steps."""

    steps: np.ndarray  # [n] int64
    values: np.ndarray  # [n, ...] float64
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What a run.h5 holds."""

    name: str  # as shown
    path: str  # of run.h5
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray, str]]  # by chapter/name: steps, values, unit
    values: Mapping[str, Any]  # of the whole run, by chapter/name
    problem: PlacementProblem | None = None  # with the loads that the run saw

    def find_series(self, name: str, ndim: int = 1) -> Series | None:
        """Find a metric whose values have so many dimensions, that of steps included; None where there is none.

        What is not finite is NaN.
        """
        steps, values, unit = self.metrics.get(name, (np.empty(0), np.empty(0), ""))
        if len(steps) == 0 or values.ndim != ndim or values.dtype.kind not in "fiub" or values[0].size == 0:
            return None
        finite = np.where(np.isfinite(values), values, np.nan)
        return Series(steps.astype(np.int64), finite.astype(np.float64), unit) if np.isfinite(finite).any() else None

    def find_number(self, name: str) -> float | None:
        """Find a finite number of the whole run; None where there is none."""
        value = self.values.get(name)
        return float(value) if isinstance(value, int | float) and np.isfinite(value) else None

    def find_array(self, name: str, ndim: int) -> np.ndarray | None:
        """Find an array of numbers of the whole run, of so many dimensions; None where there is none."""
        value = self.values.get(name)
        if not isinstance(value, np.ndarray) or value.ndim != ndim or value.dtype.kind not in "fiub" or not value.size:
            return None
        return value

    def find_texts(self, name: str) -> list[str]:
        """Find the texts of the whole run, as a list; empty where there are none."""
        value = self.values.get(name, [])
        return [one_line(text) for text in np.atleast_1d(np.asarray(value, dtype=object)).ravel().tolist()]

    def find_pairs(self, name: str) -> dict[str, str]:
        """Find what was recorded as keys and values; empty where there is none."""
        value = self.values.get(name)
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] != 2:
            return {}
        return {one_line(key): one_line(text) for key, text in value.tolist()}

    @property
    def num_steps(self) -> int:
        """Return the number of the last step that has a figure; 0 before the first."""
        return max((int(steps[-1]) for steps in self.list_steps()), default=0)

    def list_steps(self) -> list[np.ndarray]:
        """List the steps of what each step of a run records."""
        found = (self.find_series(name) for name in ("run/seconds", "run/tokens_per_second", "train/loss"))
        return [series.steps for series in found if series is not None]

    @property
    def node_of_rank(self) -> np.ndarray:
        """Return the node of each rank -> [P] int64; empty where it is not known."""
        found = self.find_array("cluster/node_of_rank", 1)
        return np.empty(0, np.int64) if found is None else found.astype(np.int64)

    @property
    def node_names(self) -> list[str]:
        """Return the names of the nodes, or numbers where they have none."""
        names = self.find_texts("cluster/node_names")
        count = min(int(self.node_of_rank.max(initial=-1)) + 1, len(self.node_of_rank))
        return names if len(names) >= count else [f"node {node}" for node in range(count)]

    def describe_cluster(self) -> str:
        """Write how large the cluster is."""
        ranks, nodes = len(self.node_of_rank), len(self.node_names)
        racks = self.find_array("cluster/rack_of_node", 1)
        num_racks = 1 if racks is None else len(np.unique(racks))
        words = [(ranks, "rank"), (nodes, "node"), (num_racks, "rack")]
        return ", ".join(f"{number} {noun}{'s' * (number != 1)}" for number, noun in words)
