"""The whole state by logical array, so that any number of ranks can go on: replaced whole, the last few kept."""

import pathlib
import re
import shutil

from hpcmoe.errors import CheckpointError, on_root
from hpcmoe.write.hdf5 import one_line_faults
from hpcmoe.write.pieces import discard, read_pieces, write_pieces

NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(comm, folder, step, pieces, facts, keep):
    """Write folder/checkpoint-STEP, then remove all but the last `keep`. Collective over comm.

    pieces: this rank's, which with the other ranks' tile each logical array; facts: a flat dict of strings, numbers
    and small arrays, as rank 0 has them. Raises CheckpointError on all ranks; earlier checkpoints then stay.
    """
    write_pieces(comm, folder / f"checkpoint-{step}", pieces, facts)
    on_root(comm, lambda: prune(folder, step, keep))


def load_checkpoint(comm, folder, wanted):
    """Read the parts this rank wants -> ({(name, start): array}, facts). Collective over comm.

    Any number of ranks may have written them. Raises CheckpointError on all ranks.
    """
    return read_pieces(comm, folder, wanted)


def find_checkpoint(comm, where):
    """Find the checkpoint to resume: `where` itself, or the newest in it -> its path. Collective over comm."""

    def choose():
        with one_line_faults(where, "read"):
            return choose_checkpoint(pathlib.Path(where))

    return on_root(comm, choose)


def choose_checkpoint(where):
    """Take a checkpoint's own path, or the newest in a run's folder."""
    if not where.is_dir():
        raise CheckpointError(f"{where}: no such folder, so no checkpoint to resume")
    found = where if NAME.fullmatch(where.resolve().name) else newest_checkpoint(where)
    if found is None:
        raise CheckpointError(f"{where}: no checkpoint to resume")
    return found


def newest_checkpoint(folder):
    """Find the finished checkpoint of the highest step -> its path, or None."""
    found = list_checkpoints(folder)
    return found[max(found)] if found else None


def list_checkpoints(folder):
    """List the finished checkpoints of a run's folder -> {step: path}."""
    paths = ((NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in paths if match}


def prune(folder, step, keep):
    """Remove the oldest checkpoints beyond `keep`, those of a course this run left, and what kills left behind."""
    found = list_checkpoints(folder)
    earlier = sorted(other for other in found if other <= step)
    later = [other for other in found if other > step]  # the run resumed from before them
    with one_line_faults(folder, "written"):
        for old in earlier[:-keep] + later:
            discard(found[old])
        for stale in folder.glob("checkpoint-*.partial"):
            shutil.rmtree(stale)
