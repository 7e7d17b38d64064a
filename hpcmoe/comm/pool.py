"""Rows allocated and freed in runs of any length, from one range that never grows."""


class RowPool:
    """Free runs of rows, first fit."""

    def __init__(self, first: int, count: int) -> None:
        self.count = count
        self.runs = [(first, count)] if count else []  # (first, count), ascending, no two of them adjacent

    def allocate(self, count: int) -> int | None:
        """Allocate a run of rows and return its first row; None while no free run is so long."""
        for index, (first, free) in enumerate(self.runs):
            if free >= count:
                self.runs[index : index + 1] = [(first + count, free - count)] if free > count else []
                return first
        return None

    def free(self, first: int, count: int) -> None:
        """Free a run of rows again."""
        runs: list[tuple[int, int]] = []
        for start, free in sorted([*self.runs, (first, count)]):
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + free)
            else:
                runs.append((start, free))
        self.runs = runs
