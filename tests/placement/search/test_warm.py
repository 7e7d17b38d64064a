"""Cached machine code is never older than its source."""

import os
import pathlib

from hpcmoe.placement.search.moves import move
from hpcmoe.placement.search.warm import compile_search, delete_stale_code


def test_code_of_changed_sources_is_dropped_and_made_anew():
    compile_search()
    folder = pathlib.Path(move.stats.cache_path)
    fresh = {path.name for path in folder.glob("*.nb[ic]")}
    old = folder / "stale-1.py311.nbi"
    old.touch()
    os.utime(old, (0, 0))
    delete_stale_code()
    assert not old.exists() and {path.name for path in folder.glob("*.nb[ic]")} == fresh != set()
