"""Text that is encoded before a run and kept in its folder: documents as tokens, packed into sequences.

One rank encodes, once; all ranks read the two files, for training and for validation, as they need.
"""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from hpcmoe.config import DataConfig
from hpcmoe.errors import ConfigError, on_all, on_root
from hpcmoe.messages import printable
from hpcmoe.model.documents import log_formats, read_documents
from hpcmoe.model.encoded import PARTS, read_description, write_description, write_parts
from hpcmoe.model.encoding import TOKEN, ByteEncoder, Encoder, TokenEncoder
from hpcmoe.model.files import Stamp, find_files, make_stamp
from hpcmoe.model.order import number_sequences
from hpcmoe.model.split import Span, Split
from hpcmoe.model.text import Text, check_text, sample_text

if TYPE_CHECKING:
    from mpi4py import MPI

_FOLDER = "encoded_text"  # in the run's folder
log = logging.getLogger(__name__)


class TokenText(Text):
    """Encoded text as one string of tokens, read on demand."""

    def __len__(self) -> int:
        return super().__len__() // TOKEN.itemsize

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read a sequence and its next token at each start -> int64 [n, length + 1]. Raises as Text.sequences()."""
        size = TOKEN.itemsize
        return super().sequences(starts * size, size * (length + 1) - 1).view(TOKEN).astype(np.int64)

    def draw(self, num_sequences: int, sequence_length: int, seed: int, step: int) -> np.ndarray:
        """Draw where a step's sequences start -> int64 [n]: all that are packed one after the other, once an epoch."""
        num_packed = (len(self) - 1) // sequence_length  # each has a next token
        return number_sequences(step, num_sequences, num_packed, seed) * sequence_length


def find_tokens(
    data: DataConfig,
    tokenizer: str | os.PathLike,
    sequence_length: int,
    run_folder: str | os.PathLike,
    vocabulary_size: int,
) -> Split:
    """Encode the text of [data] by a checkpoint's tokenizer, and split it by documents -> Split, for TokenText.

    What the run's folder holds of the same text is taken. Raises ConfigError for what is wrong with files, tokenizer,
    or their number of tokens. Not collective: one rank encodes, and every rank then calls check_text().
    """
    return find_encoded(data, TokenEncoder(tokenizer, vocabulary_size), sequence_length, run_folder)


def unpack_documents(
    comm: "MPI.Comm", data: DataConfig, sequence_length: int, run_folder: str | os.PathLike
) -> Split | None:
    """Write the bytes of the documents in JSON lines to the run's folder -> Split, for Text; None without a text_field.

    Raises ConfigError on all ranks, else as find_tokens(). Collective over comm.
    """
    if data.text_field == "":
        return None
    split = on_root(comm, lambda: find_encoded(data, ByteEncoder(), sequence_length, run_folder))
    return on_all(comm, lambda: check_text(split))


def find_encoded(data: DataConfig, encoder: Encoder, sequence_length: int, run_folder: str | os.PathLike) -> Split:
    """Find the encoded text of [data] in the run's folder, or write it there -> Split of two whole files."""
    files, folder = find_files(data, run_folder), pathlib.Path(run_folder, _FOLDER)
    wanted = hash_text(files, data, encoder, sequence_length)
    try:
        encoded = read_description(folder, wanted, encoder.dtype)
        if encoded is None:
            log_formats(files, data.text_field)
            documents = read_documents(files, data.text_field)
            encoded = write_parts(folder, documents, encoder, data.validation_share, sequence_length + 1)
            write_description(folder, wanted, encoded)
        spans = [make_span(folder / part) for part in PARTS]
    except OSError as error:
        raise ConfigError(f"{printable(str(folder))}: encoded text cannot be kept: {error.strerror}") from None
    parts = [f"{part} {n} documents, {m} {encoder.unit}" for part, (n, m) in asdict(encoded).items()]
    log.info("text: %s", "; ".join(parts))
    split = Split(training=(spans[0],), validation=(spans[1],))
    return replace(split, sample=tuple(checksum for _, checksum in sample_text(split)))


def hash_text(files: Mapping[str, Stamp], data: DataConfig, encoder: Encoder, sequence_length: int) -> str:
    """Hash what determines the encoded text -> hexadecimal digits."""
    states = [[path, stamp.size, stamp.mtime_ns] for path, stamp in files.items()]
    determines = [states, encoder.identity, data.text_field, data.validation_share, sequence_length]
    return hashlib.sha256(json.dumps(determines).encode()).hexdigest()


def make_span(path: pathlib.Path) -> Span:
    """Build the Span of a whole file."""
    stamp = make_stamp(path.stat())
    return Span(path=str(path), first=0, length=stamp.size, stamp=stamp)
