"""How many rows an expert works on at once: B_e = min(T_e, B_max), as they came, expert by expert."""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.dispatch.sizes import Sizes
from hpcmoe.dispatch.traffic import BatchCount, add_batches
from hpcmoe.placement.result import Placement
from hpcmoe.report.metrics import Recorder
from hpcmoe.wait import wait_all


class Batches:
    """Batches of this rank's experts since the run began; experts may move between slots."""

    def __init__(self) -> None:
        self.of_slot: dict[tuple[int, int], BatchCount] = {}  # by (layer, slot)
        self.of_expert: dict[tuple[int, int], BatchCount] = {}  # by (layer, expert)

    def add(self, batches: dict[tuple[int, int], BatchCount]) -> None:
        """Add a step's batches, by layer and slot."""
        for place, counted in batches.items():
            add_batches(self.of_slot, place, counted)

    def credit_experts(self, placement: Placement, rank: int) -> None:
        """Move the batches of the slots to the experts that are there now, on a rank of the expert-parallel group."""
        for (layer, slot), counted in self.of_slot.items():
            expert = int(placement.experts_of_rank(layer, rank)[slot])
            add_batches(self.of_expert, (layer, expert), counted)
        self.of_slot = {}

    def sum_over(self, world: MPI.Comm, num_layers: int, num_experts: int) -> "BatchSizes":
        """Sum the credited batches over all ranks. Collective over world."""
        sums = np.zeros((2, num_layers, num_experts), np.int64)
        extremes = np.full_like(sums, np.iinfo(np.int64).min)  # the least as its negative
        for (layer, expert), (number, rows, least, most) in self.of_expert.items():
            sums[:, layer, expert], extremes[:, layer, expert] = (number, rows), (-least, most)
        all_reduce(world, sums)
        wait_all([world.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX)])
        least, most = np.where(sums[0] > 0, extremes, 0)
        return BatchSizes(number=sums[0], rows=sums[1], least=-least, most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """Batches of all ranks, forward; zero for an expert that had none."""

    number: np.ndarray  # [L, E] int64
    rows: np.ndarray  # [L, E] int64, of all of them
    least: np.ndarray  # [L, E] int64 rows
    most: np.ndarray  # [L, E] int64 rows

    @property
    def mean(self) -> np.ndarray:
        """Return the rows of an expert's mean batch, [L, E]."""
        return self.rows / np.maximum(self.number, 1)


def record_batches(records: Recorder, batches: BatchSizes) -> None:
    """Record each expert's batch sizes."""
    unit = "rows of an expert's GEMM, forward"
    for name in ("least", "mean", "most"):
        records.describe("experts", f"batch_rows_{name}", getattr(batches, name), unit)
    records.describe("experts", "batches", batches.number, "GEMMs of an expert, forward, in all measured steps")


def rows_of_batches(batches: BatchSizes, sizes: Sizes) -> list[tuple[str, ...]]:
    """List the batch sizes of all layers and experts as a row of the table."""
    worked = batches.number > 0
    if not worked.any():
        return []
    cut = "not cut" if sizes.works_at_once else f"B_max about {sizes.batch_rows}"
    least, mean, most = batches.least[worked].min(), batches.rows.sum() / batches.number.sum(), batches.most.max()
    return [("batch of an expert, B_e", f"{least} / {mean:.0f} / {most}", f"rows, least / mean / most; {cut}")]
