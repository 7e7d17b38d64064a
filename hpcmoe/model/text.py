"""Real text: the bytes of files as sequences, of which each rank reads its own share."""

import logging
import os
import stat
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.config import DataConfig
from hpcmoe.errors import ConfigError
from hpcmoe.messages import printable
from hpcmoe.model.files import Stamp, find_files, make_stamp
from hpcmoe.model.split import Span, Split, split_files

VOCABULARY_SIZE = 256  # bytes
MOST_OPEN = 32  # files of a text that stay open
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1024  # of training and of validation, that ranks compare
log = logging.getLogger(__name__)


def find_text(data: DataConfig, sequence_length: int, own_folder: str | os.PathLike | None = None) -> Split:
    """Find the files of [data] and split them into training and validation.

    Nothing in the run's own folder is text. With a text_field it is split by documents, later: then the Split is empty.
    Raises ConfigError where nothing matches, a named file is missing, or a part is too short for one sequence.
    """
    files = find_files(data, own_folder)
    if data.text_field:
        return Split(training=(), validation=())
    split = split_files(files, data.validation_share, sequence_length + 1)
    sizes = []
    for part, spans in (("training", split.training), ("validation", split.validation)):
        num_bytes = sum(span.length for span in spans)
        sizes.append(f"{part} {len(spans)} file{'s' * (len(spans) != 1)}, {num_bytes} B")
        if num_bytes <= sequence_length:
            raise ConfigError(
                f"[data] files: {len(spans)} files for {part} hold {num_bytes} bytes, one sequence takes "
                f"[model] sequence_length + 1 = {sequence_length + 1}"
            )
    log.info("text: %s", "; ".join(sizes))
    return replace(split, sample=tuple(checksum for _, checksum in sample_text(split)))


def check_text(split: Split) -> Split:
    """Return the Split that rank 0 found, with the files' stamps on this rank.

    Raises ConfigError for the first file that this rank does not see with the same size and, in some samples, bytes.
    """
    stamps = {path: check_file(span) for path, span in {s.path: s for s in split.training + split.validation}.items()}
    here = replace(
        split,
        training=tuple(replace(span, stamp=stamps[span.path]) for span in split.training),
        validation=tuple(replace(span, stamp=stamps[span.path]) for span in split.validation),
    )
    if split.sample:
        for (span, checksum), expected in zip(sample_text(here), split.sample, strict=True):
            if checksum != expected:
                raise file_error(span, "this rank reads other bytes than rank 0")
    return here


def sample_text(split: Split) -> Iterator[tuple[Span, int]]:
    """Read samples spread over the text -> (the Span where each begins, its checksum)."""
    for text in (Text(split.training), Text(split.validation)):
        length = min(len(text), _SAMPLE_BYTES)
        starts = even_starts(len(text), _NUM_SAMPLES, length - 1)
        for start, sample in zip(starts, text.sequences(starts, length - 1), strict=True):
            yield text.spans[int(np.searchsorted(text.edges, start, side="right"))], zlib.crc32(sample)


def check_file(span: Span) -> Stamp:
    """Return a file's Stamp on this rank. Raises ConfigError where it cannot be read whole, as rank 0 found it."""
    try:
        with open(os.open(span.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO must not block
            info = os.fstat(file.fileno())
    except FileNotFoundError:
        raise file_error(span, "rank 0 found it, this rank does not see it") from None
    except OSError as error:
        raise file_error(span, f"cannot be read: {error.strerror}") from None
    needed = span.first + span.length if span.stamp is None else span.stamp.size
    if not stat.S_ISREG(info.st_mode) or info.st_size < needed or (span.stamp is not None and info.st_size != needed):
        raise file_error(span, f"rank 0 found {needed} bytes, this rank does not see it whole: {info.st_size} bytes")
    return make_stamp(info)


def file_error(span: Span, message: str) -> ConfigError:
    """Build the error about a file of text."""
    return ConfigError(f"[data] files: {printable(span.path)}: {message}")


class Text:
    """Spans of files as one string of bytes, read on demand; the files must not change."""

    def __init__(self, spans: Sequence[Span]):
        self.spans = spans
        self.edges = np.cumsum([span.length for span in spans])
        self.descriptors: dict[str, int] = {}  # by path, least recently used first
        weakref.finalize(self, close_all, self.descriptors)

    def __len__(self) -> int:
        return int(self.edges[-1])

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read a sequence and its next byte at each start -> uint8 [n, length + 1].

        Raises ConfigError, which names the file, where one has changed.
        """
        rows = np.empty((len(starts), length + 1), dtype=np.uint8)
        spans: dict[int, Span] = {}
        for row in np.argsort(starts, kind="stable").tolist():  # file by file
            self.fill(rows[row], int(starts[row]), spans)
        for span in spans.values():
            check_span(span)
        return rows

    def draw(self, num_sequences: int, sequence_length: int, seed: int, step: int) -> np.ndarray:
        """Draw where a step's sequences start -> int64 [n]: anywhere, at random."""
        return draw_starts(len(self), num_sequences, sequence_length, seed, step)

    def fill(self, row: np.ndarray, start: int, spans: dict[int, Span]) -> None:
        """Fill a row with bytes, across the edges of files; add the spans that they come from to spans, by number."""
        index = int(np.searchsorted(self.edges, start, side="right"))
        while len(row) > 0:
            span = spans[index] = self.spans[index]
            offset = start - int(self.edges[index] - span.length)
            part = self.read_span(span, span.first + offset, min(len(row), span.length - offset))
            row[: len(part)] = np.frombuffer(part, np.uint8)
            row, start, index = row[len(part) :], start + len(part), index + 1

    def read_span(self, span: Span, first: int, length: int) -> bytes:
        """Read bytes of one file."""
        parts = []
        try:
            descriptor = self.open_file(span.path)
            while length > 0 and (part := os.pread(descriptor, length, first)):
                parts.append(part)
                first, length = first + len(part), length - len(part)
        except OSError as error:
            raise file_error(span, describe_change(error)) from None
        if length > 0:
            check_span(span)
            raise file_error(span, f"ends before byte {first + length}")
        return b"".join(parts)

    def open_file(self, path: str) -> int:
        """Open a file, at most MOST_OPEN at once; the least recently used one is closed -> its descriptor."""
        descriptor = self.descriptors.pop(path, None)
        if descriptor is None:
            if len(self.descriptors) >= MOST_OPEN:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.descriptors[path] = descriptor
        return descriptor


def close_all(descriptors: dict[str, int]) -> None:
    """Close the open files of a text."""
    for descriptor in descriptors.values():
        os.close(descriptor)


class BlankText:
    """Zeros in place of a text that cannot be read: the step ends in order on all ranks, and is then rejected."""

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return zeros, uint8 [n, length + 1]."""
        return np.zeros((len(starts), length + 1), dtype=np.uint8)


def check_span(span: Span) -> None:
    """Raise ConfigError where a file has changed since it was found."""
    try:
        now = make_stamp(os.stat(span.path))
    except OSError as error:
        raise file_error(span, describe_change(error)) from None
    if span.stamp is None or span.stamp.holds(now):
        return
    sizes = f"has {now.size} bytes, had {span.stamp.size} when the run began"
    written = "has been written or replaced since the run began"
    raise file_error(span, written if now.size == span.stamp.size else sizes)


def describe_change(error: OSError) -> str:
    """Describe what happened to a file that was there when the run began."""
    gone = isinstance(error, FileNotFoundError)
    return "is gone since the run began" if gone else f"cannot be read: {error.strerror}"


def draw_starts(text_length: int, num_sequences: int, sequence_length: int, seed: int, step: int) -> np.ndarray:
    """Draw where a step's sequences start, the same on every rank and at any number of ranks -> int64 [n]."""
    random = np.random.default_rng([seed, step])
    return random.integers(0, text_length - sequence_length, num_sequences)


def even_starts(text_length: int, num_sequences: int, sequence_length: int) -> np.ndarray:
    """Return starts spread evenly over the text, int64 [num_sequences]."""
    return np.linspace(0, text_length - sequence_length - 1, num_sequences).astype(np.int64)


def share_of(num_items: int, index: int, num_shares: int) -> slice:
    """Return the slice of one of num_shares nearly equal shares."""
    return slice(num_items * index // num_shares, num_items * (index + 1) // num_shares)


def count_sequences(num_sequences: int, num_micro_batches: int, num_shares: int) -> np.ndarray:
    """Count the sequences of a step that each share gets -> int64 [num_shares]."""
    sequences = np.arange(num_sequences)
    parts = [sequences[share_of(num_sequences, number, num_micro_batches)] for number in range(num_micro_batches)]
    return np.array([sum(len(part[share_of(len(part), i, num_shares)]) for part in parts) for i in range(num_shares)])


def read_micro_batches(
    text: Text | BlankText, starts: np.ndarray, sequence_length: int, num_micro_batches: int, mesh: Mesh
) -> list[np.ndarray]:
    """Read this rank's part of each micro-batch -> list of uint8 [n, sequence_length + 1], n 0 or more.

    Micro-batch m is the same set of sequences at any number of ranks, which share it evenly.
    """
    batches = (starts[share_of(len(starts), number, num_micro_batches)] for number in range(num_micro_batches))
    own = (batch[share_of(len(batch), mesh.token_index, mesh.num_token_shares)] for batch in batches)
    return [text.sequences(mine, sequence_length) for mine in own]
