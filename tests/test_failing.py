"""One rank of a group goes wrong: on all ranks the same cause is raised within seconds, whatever they wait for."""

import re

import pytest
from failing import WAYS
from launch import ROOT, mpirun

SECONDS = 20.0  # a wait for a rank that calls something else is found to be vain after 8
CAUSES = {  # by the beginnings of ways' names; the others are raised where calls of one dispatcher do not fit together
    "raise": "ZeroDivisionError: a user's own error",
    "interrupt": "KeyboardInterrupt",
    "more than": "rank LAST calls layer 0 top-2 forward with more tokens than a call may have",
    "other arguments of a layer": "kind = 'gelu', 'swiglu' on rank 0: must be alike on all ranks",
    "other precision of a layer": "dtype = 'bfloat16', 'float32' on rank 0: must be alike on all ranks",
    "other arguments of a group": "max_tokens = 65, 64 on rank 0: must be alike on all ranks",
    "other precision": "no error",
    "other": "rank LAST calls layer",
    "": "all ranks wait for each other, .*rank LAST in .*: all ranks of a group make the same calls",
}
QUICK = ["raise forward", "raise backward, arrival", "interrupt one", "interrupt overlap", "other layer", "sums alone"]


def cause_of(way, ranks):
    """Find the pattern of what all ranks raise."""
    return next(text for start, text in CAUSES.items() if way.startswith(start)).replace("LAST", str(ranks - 1))


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [(3, QUICK), *(pytest.param(n, [w for w in WAYS if w != "kill"], marks=pytest.mark.full) for n in (2, 3, 4))],
    ids=["quick", "two", "three", "four"],
)
def test_all_ranks_raise_the_cause_in_time(ranks, ways):
    ended = mpirun(ranks, "-W", "ignore", ROOT / "tests" / "failing.py", *ways, PYTHONPATH=str(ROOT))
    found = [line.split(" | ", 3) for line in ended.output.splitlines()]
    assert len(found) == ranks * len(ways), ended
    for way, rank, seconds, text in found:
        assert float(seconds) < SECONDS and re.search(cause_of(way, ranks), text), (way, rank, seconds, text)


@pytest.mark.parametrize("way", ["raise backward, overlap", "kill"])
def test_an_error_that_nobody_catches_ends_all_ranks(way):
    ended = mpirun(3, "-W", "ignore", ROOT / "tests" / "failing.py", way, "alone", PYTHONPATH=str(ROOT))
    assert ended.status != 0 and ended.seconds < 60, ended
    assert way == "kill" or "ZeroDivisionError: a user's own error" in ended.errors, ended
