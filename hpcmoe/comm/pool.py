"""Rows given out and taken back in runs of any length, from one range that never grows."""


class RowPool:
    """Free runs of rows, first fit."""

    def __init__(self, first, count):
        self.count = count
        self.runs = [(first, count)] if count else []  # (first, count), ascending, no two of them adjacent

    def take(self, count):
        """Take a run of rows -> its first row, or None while no free run is so long."""
        for index, (first, free) in enumerate(self.runs):
            if free >= count:
                self.runs[index : index + 1] = [(first + count, free - count)] if free > count else []
                return first
        return None

    def give_back(self, first, count):
        """Free a run of rows again."""
        runs = []
        for start, free in sorted([*self.runs, (first, count)]):
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + free)
            else:
                runs.append((start, free))
        self.runs = runs
