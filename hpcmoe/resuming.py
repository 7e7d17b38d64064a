"""Where a run goes on, and how it ends so that it can: from its newest whole checkpoint, with a status of its own."""

import dataclasses
import logging
import sys
import time
from pathlib import Path

from mpi4py import MPI

from hpcmoe.cluster.mesh import fit_parallel
from hpcmoe.config import Config
from hpcmoe.ending import Ending
from hpcmoe.errors import CheckpointError, ConfigError, on_root, raise_or_return
from hpcmoe.output import EXIT_AGAIN
from hpcmoe.run.metadata import check_metadata
from hpcmoe.wait import gather_to_all
from hpcmoe.write.checkpoint import find_checkpoint, read_metadata, verify_pieces
from hpcmoe.write.folder import open_folder
from hpcmoe.write.mirror import bring_mirror, has_newer_mirror
from hpcmoe.write.steps import is_in_folder, list_checkpoints, step_of

AUTO = "auto"  # of --resume
TOPOLOGY = "topology.json"  # in a run's folder
_LAST_SECONDS = 2.0  # for the other processes to end
log = logging.getLogger(__name__)


def find_start(comm: MPI.Intracomm, resume: str | None, folder: Path, config: Config) -> Path | None:
    """Find the checkpoint that --resume names, verified -> its path, None to begin anew. Collective over comm.

    folder: the run's. Raises ConfigError or CheckpointError on all ranks.
    """
    if resume is None:
        return None
    if resume == AUTO and has_newer_mirror(comm, folder):
        with open_folder(comm, config.run.output, config.run.name, resume=True):
            bring_mirror(comm, folder)
    found = find_newest_whole(comm, folder) if resume == AUTO else find_checkpoint(comm, resume or folder)
    if found is not None:
        on_root(comm, lambda: check_checkpoint(found, folder, config, may_have_ended=resume == AUTO))
    return found


def fit_to_ranks(config: Config, num_ranks: int, folder: Path, who_died: str) -> Config:
    """Fit a run to the ranks left after a fault -> its config: a shape that they have, links as known. Rank 0 alone."""
    parallel, known = fit_parallel(config.parallel, num_ranks), folder / TOPOLOGY
    if who_died:
        log.warning("%s: the %d left go on", who_died, num_ranks)
    if parallel != config.parallel:
        log.warning(
            "[parallel] data = %d, expert = %d, tensor = %d: do not fit %d ranks; now %d, %d and %d (0: what is left)",
            config.parallel.data, config.parallel.expert, config.parallel.tensor, num_ranks,
            parallel.data, parallel.expert, parallel.tensor,
        )  # fmt: skip
    links = str(known) if config.cluster.links == "measure" and known.exists() else config.cluster.links
    return dataclasses.replace(config, parallel=parallel, cluster=dataclasses.replace(config.cluster, links=links))


def find_newest_whole(comm: MPI.Intracomm, folder: Path) -> Path | None:
    """Find a run's newest checkpoint that is whole -> its path, None where it has none. Collective over comm.

    Raises CheckpointError on all ranks where it has some and none is whole.
    """
    found, error = on_root(comm, lambda: list_checkpoints(folder)), None
    for step in sorted(found, reverse=True):
        try:
            verify_pieces(comm, found[step])
        except CheckpointError as damage:
            error = damage
            if comm.rank == 0:
                log.warning("%s", damage)
        else:
            return found[step]
    return raise_or_return(None, error)


def check_checkpoint(checkpoint: Path, folder: Path, config: Config, may_have_ended: bool) -> None:
    """Raise ConfigError or CheckpointError unless a run can go on from a checkpoint.

    It cannot from its own last step, from another function, nor infer in the folder of the training.
    """
    if config.run.mode == "infer" and is_in_folder(checkpoint, folder):
        raise ConfigError(f'[run] name = "{config.run.name}": inference of {checkpoint} needs a name of its own')
    step, steps = step_of(checkpoint), config.run.steps
    if config.run.mode == "train" and step >= steps and not may_have_ended:
        raise ConfigError(f"[run] steps = {steps}: must be more than the {step} of {checkpoint}")
    check_metadata(read_metadata(checkpoint), config, checkpoint, step)


def end_run(comm: MPI.Intracomm, ending: Ending, num_steps: int) -> int:
    """Log why a run has ended before its time, if it has -> its exit status. Collective over comm."""
    if not ending.is_agreed:
        return 0
    reasons = [
        f"rank {rank}: {reason}" for rank, reason in enumerate(gather_to_all(comm, ending.find_reason())) if reason
    ]
    if comm.rank == 0:
        log.warning(
            "ended in order after %d steps of this start: %s; --resume auto goes on (exit status %d)",
            num_steps, "; ".join(reasons[:4]), EXIT_AGAIN,
        )  # fmt: skip
    return EXIT_AGAIN


def leave_last(rank: int, status: int) -> None:
    """End rank 0 with a status once the others have ended: srun kills whoever is left after the first bad one.

    Collective over MPI's world, which ends here.
    """
    MPI.Finalize()
    if rank == 0:
        time.sleep(_LAST_SECONDS)
        sys.exit(status)
