"""Real text: the bytes of files, cut into sequences; each rank reads its own share by memory map."""

import fnmatch
import glob
import os
import pathlib
import sysconfig
import zlib
from dataclasses import dataclass

import numpy as np

from hpcmoe.errors import ConfigError

NUM_BYTES = 256  # the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a file that belongs to training or to validation."""

    path: str
    first: int  # byte offset
    length: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The files' bytes, for training and for validation."""

    training: tuple[Span, ...]
    validation: tuple[Span, ...]


def find_text(data, sequence_length):
    """List the files of [data] and split them by file, or a single file by bytes -> Split.

    Raises ConfigError when nothing matches, a named file is not there, or the text is too short for one sequence.
    """
    names = sorted({name for pattern in data.files for name in expand(pattern, data.exclude)})
    sizes = {name: pathlib.Path(name).stat().st_size for name in names}
    spans = [Span(path=name, first=0, length=size) for name, size in sizes.items() if size > 0]
    if not spans:
        raise ConfigError(f"[data] files = {list(data.files)}, less [data] exclude: no file with text matches")

    split = split_spans(spans, data.validation_share)
    for part, held in (("training", split.training), ("validation", split.validation)):
        num_bytes = sum(span.length for span in held)
        if num_bytes <= sequence_length:
            raise ConfigError(
                f"[data] files: {len(held)} files for {part} hold {num_bytes} bytes, one sequence takes "
                f"[model] sequence_length + 1 = {sequence_length + 1}"
            )
    return split


def expand(pattern, exclude):
    """Find the files that a glob pattern names, less those that match a pattern to exclude, or a file by its name.

    {stdlib} in a pattern is the folder of Python's own library.
    """
    where = pattern.replace("{stdlib}", sysconfig.get_path("stdlib"))
    found = [name for name in glob.glob(where, recursive=True) if pathlib.Path(name).is_file()]
    if glob.has_magic(where):
        return [name for name in found if not any(fnmatch.fnmatch(name, unwanted) for unwanted in exclude)]
    if not found:
        raise ConfigError(f"[data] files: {where}: no such file")
    return found


def split_spans(spans, validation_share):
    """Give about validation_share of the files, chosen by the hash of their names, to validation -> Split."""
    if len(spans) == 1:
        (whole,) = spans
        cut = int(whole.length * (1 - validation_share))
        rest = Span(path=whole.path, first=cut, length=whole.length - cut)
        return Split(training=(Span(path=whole.path, first=0, length=cut),), validation=(rest,))
    by_hash = sorted(spans, key=lambda span: zlib.crc32(pathlib.Path(span.path).name.encode()))
    num_validation = min(max(round(len(spans) * validation_share), 1), len(spans) - 1)
    return Split(training=tuple(by_hash[num_validation:]), validation=tuple(by_hash[:num_validation]))


def check_text(split):
    """Make sure that this rank sees the files that rank 0 found; ConfigError names the first that it does not."""
    for span in split.training + split.validation:
        path = pathlib.Path(span.path)
        if not path.is_file() or path.stat().st_size < span.first + span.length:
            raise ConfigError(f"[data] files: {span.path}: rank 0 found it, this rank does not see it whole")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"[data] files: {span.path}: cannot be read: Permission denied")


class Text:
    """Spans of files as one long string of bytes, mapped as they are read."""

    def __init__(self, spans):
        self.spans = spans
        self.edges = np.cumsum([span.length for span in spans])
        self.maps = {}

    def __len__(self):
        return int(self.edges[-1])

    def read(self, start, length):
        """Copy bytes start, start + 1, ... across the edges of files -> uint8 [length]."""
        pieces = []
        index = int(np.searchsorted(self.edges, start, side="right"))
        while length > 0:
            span = self.spans[index]
            offset = start - int(self.edges[index] - span.length)
            pieces.append(self.map_file(span)[offset : offset + length])
            start, length, index = start + len(pieces[-1]), length - len(pieces[-1]), index + 1
        return np.concatenate(pieces)

    def map_file(self, span):
        """Map a span into memory, once."""
        if span not in self.maps:
            self.maps[span] = np.memmap(span.path, np.uint8, mode="r", offset=span.first, shape=(span.length,))
        return self.maps[span]

    def sequences(self, starts, length):
        """Read a sequence and its next byte at each start -> uint8 [n, length + 1]."""
        rows = np.empty((len(starts), length + 1), dtype=np.uint8)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self.read(start, length + 1)
        return rows


def draw_starts(text_length, num_sequences, sequence_length, seed, step):
    """Where a step's sequences start, the same on every rank and at any number of ranks -> int64 [num_sequences]."""
    random = np.random.default_rng([seed, step])
    return random.integers(0, text_length - sequence_length, num_sequences)


def even_starts(text_length, num_sequences, sequence_length):
    """Starts spread evenly over the text, as for validation -> int64 [num_sequences]."""
    return np.linspace(0, text_length - sequence_length - 1, num_sequences).astype(np.int64)


def share_of(num_items, index, num_shares):
    """The items of one of num_shares nearly equal shares -> slice."""
    return slice(num_items * index // num_shares, num_items * (index + 1) // num_shares)


def count_sequences(num_sequences, num_micro_batches, num_shares):
    """Count the sequences of a step that each share gets -> int64 [num_shares]."""
    sequences = np.arange(num_sequences)
    parts = [sequences[share_of(num_sequences, number, num_micro_batches)] for number in range(num_micro_batches)]
    return np.array([sum(len(part[share_of(len(part), i, num_shares)]) for part in parts) for i in range(num_shares)])


def read_micro_batches(text, starts, sequence_length, num_micro_batches, mesh):
    """Read this rank's part of each micro-batch -> list of uint8 [n, sequence_length + 1], n 0 or more.

    Micro-batch m is the same set of sequences at any number of ranks, which share it evenly.
    """
    batches = []
    for micro_batch in range(num_micro_batches):
        whole = starts[share_of(len(starts), micro_batch, num_micro_batches)]
        mine = whole[share_of(len(whole), mesh.token_index, mesh.num_token_shares)]
        batches.append(text.sequences(mine, sequence_length))
    return batches
