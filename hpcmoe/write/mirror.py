"""A run's state in memory that outlives its ranks: on their own node and on a neighbour's, every few steps.

It is a checkpoint whose files lie in each node's shared memory: a rank's on its node, and a copy on the next one, so
that any one node may go. The next start brings what is whole to the run's folder and goes on from there as from any
checkpoint. Two are kept, of which one is whole at any time.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name
from hpcmoe.errors import CheckpointError, ClusterError, on_all, on_root
from hpcmoe.messages import format_size
from hpcmoe.replacing import make_empty, name_partial, publish_folder, remove_folder
from hpcmoe.wait import barrier, broadcast, gather_to_all, wait_all
from hpcmoe.write.boxes import HeldPiece
from hpcmoe.write.checkpoint import verify_pieces
from hpcmoe.write.checksums import CHECKSUMS
from hpcmoe.write.hdf5 import Values, checkpoint_errors
from hpcmoe.write.pieces import MASTER, RankFile, WriteTasks, list_filled, name_rank_file, write_master, write_rank_file
from hpcmoe.write.steps import find_newest_step, list_checkpoints
from hpcmoe.write.writer import Writer, open_writer

MEMORY = Path("/dev/shm")  # files there are memory, and outlive processes
_PREFIX = "hpcmoe-mirror-"
_ALIVE = "alive"  # the file in a mirror that its run holds locked
_KEPT = 2
_MESSAGE_BYTES = 256 * 2**20
_STALE_SECONDS = 3600.0  # after the last change, of a mirror whose run holds it no more
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Where a rank's file is kept: on its own host, and by a rank of the next one."""

    host: str
    is_first: bool  # of its host's ranks
    keeper: int | None  # the rank of another host that keeps this rank's file; None where there is one host
    kept: tuple[int, ...]  # the ranks whose files this rank keeps


def find_neighbours(hosts: Sequence[str], rank: int) -> Neighbours:
    """Find a rank's neighbours: hosts, [ranks], follow each other in the order of their lowest ranks, as a ring."""
    ranks_of_host: dict[str, list[int]] = {}
    for other, host in enumerate(hosts):
        ranks_of_host.setdefault(host, []).append(other)
    names, own = list(ranks_of_host), ranks_of_host[hosts[rank]]
    is_first = own[0] == rank
    if len(names) == 1:
        return Neighbours(host=hosts[rank], is_first=is_first, keeper=None, kept=())

    # A host's ranks keep the files of the host before it by turns.
    at = names.index(hosts[rank])
    before, following = ranks_of_host[names[at - 1]], ranks_of_host[names[(at + 1) % len(names)]]
    return Neighbours(
        host=hosts[rank],
        is_first=is_first,
        keeper=following[own.index(rank) % len(following)],
        kept=tuple(other for number, other in enumerate(before) if own[number % len(own)] == rank),
    )


def name_mirror(folder: Path, host: str) -> Path:
    """Name the mirror of a run's folder on a host."""
    digest = hashlib.sha256(f"{folder.resolve()} {host}".encode()).hexdigest()[:24]
    return MEMORY / f"{_PREFIX}{os.geteuid()}-{digest}"


@contextlib.contextmanager
def open_mirror(comm: MPI.Comm, folder: Path, every: int, state_bytes: int) -> Iterator[Writer | None]:
    """Open the mirror of a run's folder, empty -> its Writer; None where every = 0. Collective over comm, both ends.

    state_bytes: of this rank's pieces. Raises ClusterError on all ranks where a host's memory is too small. An end in
    order removes the mirror; after any other the next start finds it.
    """
    near = find_neighbours(gather_to_all(comm, read_host_name()), comm.rank)
    mirror = name_mirror(folder, near.host)
    on_all(comm, lambda: clear_mirrors(mirror) if near.is_first else None)
    if every == 0:
        yield None
        return

    # Check what the hosts' memory must hold: two of its ranks' files, and of those that they keep for others.
    bytes_of_rank = gather_to_all(comm, state_bytes)
    own = _KEPT * sum(bytes_of_rank[rank] for rank in (comm.rank, *near.kept))
    needed = sum(num_bytes for host, num_bytes in gather_to_all(comm, (near.host, own)) if host == near.host)
    on_all(comm, lambda: check_host_memory(needed, near.host))
    on_all(comm, lambda: mirror.mkdir(mode=0o700) if near.is_first else None)

    # Hold it while the run goes on.
    with contextlib.ExitStack() as held:
        if near.is_first:
            alive = held.enter_context(open(mirror / _ALIVE, "w"))
            fcntl.flock(alive, fcntl.LOCK_EX)
        store = functools.partial(save_mirror, near)
        with open_writer(comm, mirror, _KEPT, asynchronous=True, store=store) as writer:
            yield writer
    barrier(comm)
    if near.is_first:
        shutil.rmtree(mirror, ignore_errors=True)


def choose_writer(step: int, every: int, is_due: bool, writer: Writer, mirror: Writer | None) -> Writer | None:
    """Poll the writers of a run after a step -> the one that is to save it, None where nothing is. Collective.

    is_due: a checkpoint is; a mirror is not asked for where the last one is still on its way.
    """
    for each in (writer, mirror):
        if each is not None:
            each.poll()
    if is_due:
        return writer
    return mirror if mirror is not None and step % every == 0 and mirror.under_way is None else None


def check_host_memory(needed: int, host: str) -> None:
    """Raise ClusterError when a host's shared memory is too small for its part of the mirror."""
    state = os.statvfs(MEMORY)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise ClusterError(
            f"[restart] mirror_every: {MEMORY} of {host} has {format_size(free)} free, and two copies of its ranks' "
            f"state and of their neighbours' take {format_size(needed)}; enlarge it, or set mirror_every = 0"
        )


def clear_mirrors(own: Path) -> None:
    """Remove a run's mirror, which is not wanted any more, and those of this user's runs that are long gone."""
    for path in MEMORY.glob(f"{_PREFIX}{os.geteuid()}-*") if MEMORY.is_dir() else ():
        with contextlib.suppress(OSError):
            if is_own(path) and (path == own or is_stale(path)):
                shutil.rmtree(path)


def is_own(path: Path) -> bool:
    """Return True if a path is a folder of this user, and no link to one."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def is_stale(mirror: Path) -> bool:
    """Return True if no run holds a mirror, nor has done lately: a supervisor may be about to start one."""
    with open(mirror / _ALIVE, "a") as alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return time.time() - mirror.stat().st_mtime > _STALE_SECONDS


def save_mirror(
    near: Neighbours, comm: MPI.Comm, mirror: Path, step: int, pieces: Sequence[HeldPiece], metadata: Values, keep: int
) -> WriteTasks:
    """Write mirror/checkpoint-STEP on each host, then remove all but the last `keep`, in tasks. Collective over comm.

    As checkpoint.save_checkpoint, but that each host has the files of its ranks and of those that they keep.
    """
    folder = mirror / f"checkpoint-{step}"
    partial = name_partial(folder)
    try:
        # Write this rank's file, and have the keeper write it too.
        on_all(comm, lambda: make_empty(partial) if near.is_first else None)
        written = yield lambda: write_rank_file(partial / name_rank_file(comm.rank), list_filled(pieces))
        num_bytes, digest = on_all(comm, written)
        bytes_of_rank = gather_to_all(comm, num_bytes)
        copied = yield lambda: copy_files(comm, near, partial, bytes_of_rank)
        on_all(comm, copied)

        # Write the master on rank 0, and its copy on every host.
        own = RankFile(num_bytes=num_bytes, digest=digest, specs=[piece.spec for piece in pieces])
        files = comm.gather(own)
        mastered = yield lambda: write_master(partial, files, metadata) if files is not None else None
        on_all(comm, mastered)
        texts = broadcast(comm, read_texts(partial) if comm.rank == 0 else None)
        published = yield lambda: publish_copy(folder, partial, texts, keep) if near.is_first else None
        on_all(comm, published)
    except CheckpointError as error:
        if near.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        if comm.rank == 0:
            log.warning("step %d: not mirrored: %s", step, error)


def read_texts(folder: Path) -> dict[str, bytes]:
    """Read the files that each host has a copy of -> {name: bytes}."""
    return {name: (folder / name).read_bytes() for name in (MASTER, CHECKSUMS)}


def copy_files(comm: MPI.Comm, near: Neighbours, folder: Path, bytes_of_rank: Sequence[int]) -> None:
    """Send this rank's file to its keeper, and write those that this rank keeps. In a thread, beside the steps."""
    received = {rank: np.empty(bytes_of_rank[rank], np.uint8) for rank in near.kept if bytes_of_rank[rank]}
    requests = [
        comm.Irecv(part, rank, tag) for rank, array in received.items() for tag, part in enumerate(cut_messages(array))
    ]
    if near.keeper is not None and bytes_of_rank[comm.rank]:
        own = np.fromfile(folder / name_rank_file(comm.rank), np.uint8)
        requests += [comm.Isend(part, near.keeper, tag) for tag, part in enumerate(cut_messages(own))]
    wait_all(requests)
    with checkpoint_errors(folder, "written"):
        for rank, array in received.items():
            array.tofile(folder / name_rank_file(rank))


def cut_messages(array: np.ndarray) -> list[np.ndarray]:
    """Cut bytes into parts for one message each."""
    return [array[begin : begin + _MESSAGE_BYTES] for begin in range(0, len(array), _MESSAGE_BYTES)]


def publish_copy(folder: Path, partial: Path, texts: dict[str, bytes], keep: int) -> None:
    """Write a host's copy of what all hosts have, give the folder its name, and remove the oldest."""
    with checkpoint_errors(partial, "written"):
        for name, text in texts.items():
            (partial / name).write_bytes(text)
        publish_folder(partial, folder)
        found = list_checkpoints(folder.parent)
        for step in sorted(found)[:-keep]:
            remove_folder(found[step])


def has_newer_mirror(comm: MPI.Comm, folder: Path) -> bool:
    """Return True if any host has a mirror of a later step than the run's folder has checkpoints. Collective."""
    newest = on_root(comm, lambda: find_newest_step(folder))
    steps = gather_to_all(comm, max(list_mirrored(name_mirror(folder, read_host_name())), default=0))
    return newest < max(steps) and on_root(comm, folder.is_dir)


def bring_mirror(comm: MPI.Comm, folder: Path) -> None:
    """Copy the newest mirror that is whole to the run's folder, if it is newer than what is there. Collective.

    Within the folder's lock. Raises CheckpointError on all ranks where the folder cannot be written.
    """
    mirror, newest = name_mirror(folder, read_host_name()), on_root(comm, lambda: find_newest_step(folder))
    found = gather_to_all(comm, list_mirrored(mirror))
    for step in sorted({step for steps in found for step in steps if step > newest}, reverse=True):
        rank_of_name: dict[str, int] = {}
        for rank, steps in enumerate(found):
            for name in steps.get(step, ()):
                rank_of_name.setdefault(name, rank)
        own = [name for name, rank in rank_of_name.items() if rank == comm.rank]
        try:
            bring_step(comm, mirror / f"checkpoint-{step}", folder / f"checkpoint-{step}", own)
        except CheckpointError as error:
            if comm.rank == 0:
                log.warning("the mirror of step %d is not whole: %s", step, error)
        else:
            log.info("step %d: brought from memory to %s", step, folder)
            return


def list_mirrored(mirror: Path) -> dict[int, list[str]]:
    """List the files of a mirror's steps that are here -> {step: names}; none where it is not this user's."""
    try:
        if not is_own(mirror):
            return {}
    except OSError:
        return {}
    return {step: sorted(os.listdir(path)) for step, path in list_checkpoints(mirror).items() if is_own(path)}


def bring_step(comm: MPI.Comm, source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy some files of a mirrored step on each rank, and publish it once it is whole. Collective over comm.

    Raises CheckpointError on all ranks.
    """
    partial = name_partial(target)
    on_root(comm, lambda: make_empty(partial))
    try:
        on_all(comm, lambda: copy_names(source, partial, names))
        verify_pieces(comm, partial)
        on_root(comm, lambda: publish_folder(partial, target))
    except CheckpointError:
        on_root(comm, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise


def copy_names(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy files of one folder to another. Raises CheckpointError."""
    with checkpoint_errors(target, "written"):
        for name in names:
            shutil.copyfile(source / name, target / name, follow_symlinks=False)
