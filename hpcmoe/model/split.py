"""Which files are for training and which for validation: whole ones, whose bytes come as near the share as they can."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hpcmoe.model.files import Stamp

MOST_TRIED = 16  # files whose every combination is tried
GOLDEN_RATIO = (5**0.5 - 1) / 2  # whose multiples, less their whole parts, fill 0 to 1 evenly from the first on


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a file that belongs to training or to validation."""

    path: str
    first: int  # byte offset
    length: int  # bytes
    stamp: Stamp | None = None  # of the file as this rank found it


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The files' bytes, for training and for validation."""

    training: tuple[Span, ...]
    validation: tuple[Span, ...]
    sample: tuple[int, ...] = ()  # checksums of pieces of it, as rank 0 read them


def split_files(files: Mapping[str, Stamp], validation_share: float, least_bytes: int) -> Split:
    """Give about validation_share of the bytes to validation: whole files, or the end of a single one -> Split.

    The choice follows from the files' sizes and their names below the folder that they share. Each part gets
    least_bytes where the files allow it.
    """
    if len(files) == 1:
        ((path, stamp),) = files.items()
        cut = int(stamp.size * (1 - validation_share))
        if stamp.size >= 2 * least_bytes:
            cut = min(max(cut, least_bytes), stamp.size - least_bytes)
        return Split(
            training=(Span(path=path, first=0, length=cut, stamp=stamp),),
            validation=(Span(path=path, first=cut, length=stamp.size - cut, stamp=stamp),),
        )
    spans = [Span(path=path, first=0, length=files[path].size, stamp=files[path]) for path in shuffle(files)]
    sizes = np.array([span.length for span in spans], np.int64)
    chosen = choose_validation(sizes, validation_share, least_bytes)
    return Split(
        training=tuple(span for span, validates in zip(spans, chosen, strict=True) if not validates),
        validation=tuple(span for span, validates in zip(spans, chosen, strict=True) if validates),
    )


def shuffle(paths):
    """Order files so that however many of the first ones are taken, each folder gives about its share -> list of paths.

    Those of a folder go by the hash of their names, so that neighbours are none.
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    shared = len(os.path.commonpath(list(absolute.values())))
    folders, places = {}, {}
    for inside, path in sorted((absolute[path][shared:], path) for path in paths):
        folders.setdefault(os.path.dirname(inside), []).append(path)
    for number, files in enumerate(folders.values(), start=1):
        files.sort(key=lambda path: zlib.crc32(os.fsencode(os.path.basename(path))))
        for place, path in enumerate(files):
            places[path] = (place + number * GOLDEN_RATIO % 1) / len(files), absolute[path]
    return sorted(paths, key=places.get)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """How many bytes the chosen files are to hold."""

    wanted: float
    least: int  # bytes, of the chosen and of the others
    total: int  # bytes

    def miss(self, held):
        """Measure how far so many bytes are from those wanted; farther than any where a part is too short."""
        return np.abs(held - self.wanted) + self.total * ((held < self.least) | (self.total - held < self.least))


def choose_validation(sizes: np.ndarray, share: float, least_bytes: int) -> np.ndarray:
    """Choose files, sizes [N], whose bytes are nearest to a share of all -> bool [N].

    It begins with the first of them, then takes and leaves files in turn, exchanges two, and tries all combinations of
    the largest, until none of these brings it nearer: up to MOST_TRIED files no choice is nearer.
    """
    total = int(sizes.sum())
    wanted = min(max(share * total, least_bytes), total - least_bytes)
    goal = Goal(wanted=wanted, least=least_bytes, total=total)
    count = min(max(round(len(sizes) * share), 1), len(sizes) - 1)
    chosen = np.arange(len(sizes)) < count
    take_and_leave(sizes, chosen, goal)
    while swap_files(sizes, chosen, goal) or recombine_largest(sizes, chosen, goal):
        pass
    return chosen


def take_and_leave(sizes, chosen, goal):
    """Take more files in turn, or leave the last of those chosen, each where that brings the choice nearer."""
    held = int(sizes[chosen].sum())
    for index in (*np.flatnonzero(~chosen).tolist(), *np.flatnonzero(chosen)[::-1].tolist()):
        other = held + int(sizes[index]) * (-1 if chosen[index] else 1)
        if goal.miss(other) < goal.miss(held):
            held, chosen[index] = other, not chosen[index]


def swap_files(sizes, chosen, goal):
    """Exchange the two files, or take or leave the one, that bring the choice nearest -> whether that is nearer."""
    held, padded, none = int(sizes[chosen].sum()), np.append(sizes, 0), len(sizes)
    leave, enter = np.append(np.flatnonzero(chosen), none), np.append(np.flatnonzero(~chosen), none)
    enter = enter[np.argsort(padded[enter], kind="stable")]

    # Of what may enter for each that may leave, the next smaller and the next larger than what is wanted will do.
    at = np.searchsorted(padded[enter], padded[leave] + goal.wanted - held)
    near = np.clip(np.stack([at - 1, at]), 0, len(enter) - 1)
    misses = goal.miss(held - padded[leave] + padded[enter[near]])
    best = np.unravel_index(np.argmin(misses), misses.shape)
    if misses[best] >= goal.miss(held):
        return False
    for index in {leave[best[1]], enter[near[best]]} - {none}:
        chosen[index] = not chosen[index]
    return True


def recombine_largest(sizes, chosen, goal):
    """Try every combination of the largest files, the others as they are -> whether one is nearer."""
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MOST_TRIED])
    others = chosen.copy()
    others[largest] = False
    sums = np.array([sizes[others].sum()])
    for size in sizes[largest]:
        sums = np.concatenate([sums, sums + size])  # bit i of an index: whether largest[i] is in
    best = int(np.argmin(goal.miss(sums)))
    if goal.miss(sums[best]) >= goal.miss(sizes[chosen].sum()):
        return False
    chosen[largest] = (best >> np.arange(len(largest))) & 1 == 1
    return True
