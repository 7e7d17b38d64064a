"""Split of the text files into training and validation: whole files, whose bytes are as near the share as possible."""

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmoe.model.files import Stamp

MOST_TRIED = 16  # files whose every combination is tried
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # the fractional parts of its multiples fill 0 to 1 evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range of a file's bytes for training or validation."""

    path: str
    first: int  # byte offset
    length: int  # bytes
    stamp: Stamp | None = None  # of the file as this rank found it


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The files' bytes, for training and for validation."""

    training: tuple[Span, ...]
    validation: tuple[Span, ...]
    sample: tuple[int, ...] = ()  # checksums of samples, as rank 0 read them


def split_files(files: Mapping[str, Stamp], validation_share: float, least_bytes: int) -> Split:
    """Split files into training and validation of about validation_share of the bytes.

    A single file is cut; several are taken whole. The choice depends on their sizes and their names below the common
    folder. Each part gets least_bytes where the files allow it.
    """
    if len(files) == 1:
        ((path, stamp),) = files.items()
        cut = cut_size(stamp.size, validation_share, least_bytes)
        return Split(
            training=(Span(path=path, first=0, length=cut, stamp=stamp),),
            validation=(Span(path=path, first=cut, length=stamp.size - cut, stamp=stamp),),
        )
    spans = [Span(path=path, first=0, length=files[path].size, stamp=files[path]) for path in interleave_folders(files)]
    chosen = choose_validation(np.array([span.length for span in spans], np.int64), validation_share, least_bytes)
    return Split(
        training=tuple(span for span, validates in zip(spans, chosen, strict=True) if not validates),
        validation=tuple(span for span, validates in zip(spans, chosen, strict=True) if validates),
    )


def cut_size(size: int, validation_share: float, least: int) -> int:
    """Return how much of a single file or document is for training; each part gets `least` where it is long enough."""
    cut = int(size * (1 - validation_share))
    return min(max(cut, least), size - least) if size >= 2 * least else cut


def interleave_folders(paths: Iterable[str]) -> list[str]:
    """Order files so that any number of the first ones holds about the same share of each folder.

    Within a folder files are ordered by the hash of their names, so that neighbours in the alphabet are separated.
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    shared = len(os.path.commonpath(list(absolute.values())))

    # Group by folder, in the order of the names below the common folder.
    folders: dict[str, list[str]] = {}
    for inside, path in sorted((absolute[path][shared:], path) for path in absolute):
        folders.setdefault(os.path.dirname(inside), []).append(path)

    # Spread each folder's files evenly over 0 to 1, each folder with an offset of its own.
    positions = {}
    for number, files in enumerate(folders.values(), start=1):
        files.sort(key=lambda path: zlib.crc32(os.fsencode(os.path.basename(path))))
        for index, path in enumerate(files):
            positions[path] = (index + number * _GOLDEN_RATIO % 1) / len(files), absolute[path]
    return sorted(absolute, key=positions.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Bytes that the chosen files should hold."""

    wanted: float
    least: int  # of the chosen files and of the others
    total: int

    def distance(self, held: Any) -> Any:
        """Return |held - wanted|, plus the total where a part is too short; held: an integer, or an array of them."""
        return np.abs(held - self.wanted) + self.total * ((held < self.least) | (self.total - held < self.least))


def choose_validation(sizes: np.ndarray, share: float, least_bytes: int) -> np.ndarray:
    """Choose the files, sizes [N], whose bytes are nearest to a share of all -> bool [N].

    A local search: start with the first files, then add and remove files in turn, swap pairs, and try all combinations
    of the largest MOST_TRIED files, until none is nearer. Up to MOST_TRIED files the result is optimal.
    """
    total = int(sizes.sum())
    wanted = min(max(share * total, least_bytes), total - least_bytes)
    goal = Goal(wanted=wanted, least=least_bytes, total=total)
    count = min(max(round(len(sizes) * share), 1), len(sizes) - 1)
    chosen = np.arange(len(sizes)) < count
    flip_in_turn(sizes, chosen, goal)
    while swap_files(sizes, chosen, goal) or recombine_largest(sizes, chosen, goal):
        pass
    return chosen


def flip_in_turn(sizes: np.ndarray, chosen: np.ndarray, goal: Goal) -> None:
    """Add each file in turn, then remove each chosen one from the last on, where that is nearer to the goal."""
    held = int(sizes[chosen].sum())
    for index in (*np.flatnonzero(~chosen).tolist(), *np.flatnonzero(chosen)[::-1].tolist()):
        other = held + int(sizes[index]) * (-1 if chosen[index] else 1)
        if goal.distance(other) < goal.distance(held):
            held, chosen[index] = other, not chosen[index]


def swap_files(sizes: np.ndarray, chosen: np.ndarray, goal: Goal) -> bool:
    """Swap the pair of files, or add or remove the one, that comes nearest to the goal -> whether it is nearer."""
    held, padded, none = int(sizes[chosen].sum()), np.append(sizes, 0), len(sizes)
    leave, enter = np.append(np.flatnonzero(chosen), none), np.append(np.flatnonzero(~chosen), none)
    enter = enter[np.argsort(padded[enter], kind="stable")]

    # For each that may leave, consider the next smaller and the next larger than the wanted size.
    at = np.searchsorted(padded[enter], padded[leave] + goal.wanted - held)
    near = np.clip(np.stack([at - 1, at]), 0, len(enter) - 1)
    distances = goal.distance(held - padded[leave] + padded[enter[near]])
    best = np.unravel_index(np.argmin(distances), distances.shape)
    if distances[best] >= goal.distance(held):
        return False
    for index in {leave[best[1]], enter[near[best]]} - {none}:
        chosen[index] = not chosen[index]
    return True


def recombine_largest(sizes: np.ndarray, chosen: np.ndarray, goal: Goal) -> bool:
    """Try every combination of the largest files, the others as they are -> whether one is nearer to the goal."""
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MOST_TRIED])
    others = chosen.copy()
    others[largest] = False
    sums = np.array([sizes[others].sum()])
    for size in sizes[largest]:
        sums = np.concatenate([sums, sums + size])  # bit i of an index: is largest[i] in?
    best = int(np.argmin(goal.distance(sums)))
    if goal.distance(sums[best]) >= goal.distance(sizes[chosen].sum()):
        return False
    chosen[largest] = (best >> np.arange(len(largest))) & 1 == 1
    return True
