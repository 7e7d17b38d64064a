"""Real text: the bytes of files, cut into sequences; each rank reads its own share."""

import logging
import os
import stat
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import printable
from hpcmoe.model.files import Stamp, find_files, make_stamp
from hpcmoe.model.split import Span, Split, split_files

VOCABULARY_SIZE = 256  # the vocabulary
NUM_SAMPLES, SAMPLE_BYTES = 64, 1024  # of training and of validation, that ranks compare
MOST_OPEN = 32  # files of a text that stay open, so that one of few files is not opened for each sequence
log = logging.getLogger(__name__)


def find_text(data, sequence_length: int, own_folder: str | os.PathLike | None = None) -> Split:
    """Find the files of [data] and split them by file, or a single file by bytes -> Split.

    Nothing in the run's own folder is text. Raises ConfigError when nothing matches, a named file is not there, or the
    text is too short for one sequence.
    """
    split = split_files(find_files(data, own_folder), data.validation_share, sequence_length + 1)
    sizes = {}
    for part, held in (("training", split.training), ("validation", split.validation)):
        num_bytes = sum(span.length for span in held)
        sizes[part] = f"{part} {len(held)} file{'s' * (len(held) != 1)}, {num_bytes} B"
        if num_bytes <= sequence_length:
            raise ConfigError(
                f"[data] files: {len(held)} files for {part} hold {num_bytes} bytes, one sequence takes "
                f"[model] sequence_length + 1 = {sequence_length + 1}"
            )
    log.info("text: %s", "; ".join(sizes.values()))
    return replace(split, sample=tuple(checksum for _, checksum in sample_text(split)))


def check_text(split: Split) -> Split:
    """Make sure that this rank sees the files that rank 0 found -> the Split, with what they are like here.

    Raises ConfigError that names the first that it does not see, or whose size or bytes, in some places, are others.
    """
    spans = {span.path: span for span in split.training + split.validation}
    stamps = {path: check_file(span) for path, span in spans.items()}
    here = Split(
        training=tuple(replace(span, stamp=stamps[span.path]) for span in split.training),
        validation=tuple(replace(span, stamp=stamps[span.path]) for span in split.validation),
        sample=split.sample,
    )
    if split.sample:
        for (span, checksum), expected in zip(sample_text(here), split.sample, strict=True):
            if checksum != expected:
                raise ConfigError(f"[data] files: {printable(span.path)}: this rank reads other bytes than rank 0")
    return here


def sample_text(split: Split) -> Iterator[tuple[Span, int]]:
    """Read pieces that are spread over the text -> (the Span that each begins in, its checksum)."""
    for text in (Text(split.training), Text(split.validation)):
        length = min(len(text), SAMPLE_BYTES)
        starts = even_starts(len(text), NUM_SAMPLES, length - 1)
        for start, piece in zip(starts, text.sequences(starts, length - 1), strict=True):
            yield text.spans[int(np.searchsorted(text.edges, start, side="right"))], zlib.crc32(piece)


def check_file(span: Span) -> Stamp:
    """Open a file to see whether it can be read and is as large as rank 0 found it -> Stamp."""
    what = f"[data] files: {printable(span.path)}"
    try:
        descriptor = os.open(span.path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait where there is a FIFO here
        try:
            info = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ConfigError(f"{what}: rank 0 found it, this rank does not see it") from None
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read: {error.strerror}") from None
    needed = span.first + span.length if span.stamp is None else span.stamp.size
    if not stat.S_ISREG(info.st_mode) or info.st_size < needed or (span.stamp is not None and info.st_size != needed):
        raise ConfigError(f"{what}: rank 0 found {needed} bytes, this rank does not see it whole: {info.st_size} bytes")
    return make_stamp(info)


class Text:
    """Spans of files as one long string of bytes, read where they are wanted; a file must stay as it was found."""

    def __init__(self, spans: Sequence[Span]):
        self.spans = spans
        self.edges = np.cumsum([span.length for span in spans])
        self.descriptors = {}  # of the files read last, by path, the last one last
        weakref.finalize(self, close_all, self.descriptors)

    def __len__(self):
        return int(self.edges[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Copy bytes start, start + 1, ... across the edges of files -> uint8 [length]."""
        return self.sequences(np.array([start]), length - 1)[0]

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read a sequence and its next byte at each start -> uint8 [n, length + 1].

        Raises ConfigError, which names the file, where one is not as it was found.
        """
        rows, spans = np.empty((len(starts), length + 1), dtype=np.uint8), {}
        for row in np.argsort(starts, kind="stable").tolist():  # those of one file after another
            self.fill(rows[row], int(starts[row]), spans)
        for span in spans.values():
            check_span(span)
        return rows

    def fill(self, row: np.ndarray, start: int, spans: dict[int, Span]) -> None:
        """Copy bytes into a row, across the edges of files, and note the spans that they come from, by number."""
        index = int(np.searchsorted(self.edges, start, side="right"))
        while len(row) > 0:
            span = spans[index] = self.spans[index]
            offset = start - int(self.edges[index] - span.length)
            piece = self.read_span(span, span.first + offset, min(len(row), span.length - offset))
            row[: len(piece)] = np.frombuffer(piece, np.uint8)
            row, start, index = row[len(piece) :], start + len(piece), index + 1

    def read_span(self, span: Span, first: int, length: int) -> bytes:
        """Read bytes of one file."""
        pieces = []
        try:
            descriptor = self.open_file(span.path)
            while length > 0 and (piece := os.pread(descriptor, length, first)):
                pieces.append(piece)
                first, length = first + len(piece), length - len(piece)
        except OSError as error:
            raise ConfigError(f"[data] files: {printable(span.path)}: {describe_loss(error)}") from None
        if length > 0:
            check_span(span)
            raise ConfigError(f"[data] files: {printable(span.path)}: ends before byte {first + length}")
        return b"".join(pieces)

    def open_file(self, path: str) -> int:
        """Open a file, closing the one that was read longest ago where too many are open -> its descriptor."""
        descriptor = self.descriptors.pop(path, None)
        if descriptor is None:
            if len(self.descriptors) >= MOST_OPEN:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.descriptors[path] = descriptor
        return descriptor


def close_all(descriptors: dict[str, int]) -> None:
    """Close what a text has left open."""
    for descriptor in descriptors.values():
        os.close(descriptor)


class BlankText:
    """What a step reads in place of text that could not be read: it ends in order, and its outcome is refused."""

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Make a sequence of zeros for each start -> uint8 [n, length + 1]."""
        return np.zeros((len(starts), length + 1), dtype=np.uint8)


def check_span(span: Span) -> None:
    """See that a file, by its name, is as it was when it was found; ConfigError says how it differs."""
    try:
        now = make_stamp(os.stat(span.path))
    except OSError as error:
        raise ConfigError(f"[data] files: {printable(span.path)}: {describe_loss(error)}") from None
    if span.stamp is None or span.stamp.holds(now):
        return
    sizes = f"has {now.size} bytes, had {span.stamp.size} when the run began"
    written = "has been written or replaced since the run began"
    raise ConfigError(f"[data] files: {printable(span.path)}: {written if now.size == span.stamp.size else sizes}")


def describe_loss(error: OSError) -> str:
    """Say what has become of a file that was there when the run began."""
    gone = isinstance(error, FileNotFoundError)
    return "is gone since the run began" if gone else f"cannot be read: {error.strerror}"


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
