"""Tables of cases in which every few values of different axes meet, in place of the axes' whole product."""

import itertools

import pytest


def cover(*axes, strength=2):
    """Choose rows of the axes' product in which any values of any `strength` axes meet -> list of tuples.

    Greedy and without chance: a row starts with the first values that have not met, and takes for each other axis the
    first value of those that bring most together (after AETG, Cohen et al. 1997).
    """
    axes = [list(axis) for axis in axes]
    missing, rows = dict.fromkeys(list_meetings(axes, min(strength, len(axes)))), []
    while missing:
        row = dict(next(iter(missing)))
        for place, axis in enumerate(axes):
            if place not in row:
                row[place] = max(axis, key=lambda value: count_met(missing, row | {place: value}, place, strength))  # noqa: B023
        rows.append(tuple(row[place] for place in range(len(axes))))
        for meeting in itertools.combinations(enumerate(rows[-1]), min(strength, len(axes))):
            missing.pop(meeting, None)
    return rows


def list_meetings(axes, strength):
    """List what must meet: tuples of (place of an axis, value), places rising."""
    for places in itertools.combinations(range(len(axes)), strength):
        for values in itertools.product(*(axes[place] for place in places)):
            yield tuple(zip(places, values, strict=True))


def count_met(missing, row, place, strength):
    """Count what would meet for the first time in a row begun, dict place: value, with the value at one place."""
    others = [entry for entry in row.items() if entry[0] != place]
    together = (tuple(sorted([*chosen, (place, row[place])], key=lambda entry: entry[0]))
                for chosen in itertools.combinations(others, strength - 1))  # fmt: skip
    return sum(meeting in missing for meeting in together)


def table(*axes, strength=1, also=()):
    """Make pytest's parameters of the axes' product -> list; rows that neither cover() nor `also` names are full."""
    usual = list(dict.fromkeys([*cover(*axes, strength=strength), *also]))
    others = [row for row in itertools.product(*axes) if row not in set(usual)]
    return [*usual, *(pytest.param(*row, marks=pytest.mark.full) for row in others)]


def usually(names, *usual):
    """Make pytest's parameters of names, the usual ones first and the others full -> list."""
    others = [name for name in names if name not in usual]
    assert set(usual) <= set(names), set(usual) - set(names)
    return [*usual, *(pytest.param(name, marks=pytest.mark.full) for name in others)]
