"""Files of encoded text: documents are encoded one after the other, then split into training and validation."""

import json
import logging
import os
import pathlib
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.model.documents import Passage
from hpcmoe.model.encoding import Encoder
from hpcmoe.model.split import choose_validation, cut_size

PARTS = ("training", "validation")  # files of tokens, one after the other
_DESCRIPTION, _WHOLE = "text.json", "whole.part"
_BATCH_CHARACTERS = 1 << 20  # that are encoded at once
_SECONDS_BETWEEN_LINES = 10.0  # of the log
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """What each part holds: documents, tokens."""

    training: tuple[int, int]
    validation: tuple[int, int]


def read_description(folder: pathlib.Path, wanted: str, dtype: np.dtype) -> EncodedText | None:
    """Read what a folder holds of encoded text; None where it is not the one wanted, by its hash, or not whole."""
    try:
        held = json.loads((folder / _DESCRIPTION).read_bytes())
        encoded = EncodedText(**{part: tuple(held[part]) for part in PARTS})
        sizes = [(folder / part).stat().st_size for part in PARTS]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_whole = sizes == [counts[1] * dtype.itemsize for counts in (encoded.training, encoded.validation)]
    return encoded if held.get("hash") == wanted and is_whole else None


def write_description(folder: pathlib.Path, wanted: str, encoded: EncodedText) -> None:
    """Write what a folder holds of encoded text, when it is whole."""
    partial = folder / f"{_DESCRIPTION}.part"
    partial.write_text(json.dumps({"hash": wanted} | asdict(encoded)) + "\n")
    os.replace(partial, folder / _DESCRIPTION)


def write_parts(
    folder: pathlib.Path, passages: Iterable[Passage], encoder: Encoder, validation_share: float, least: int
) -> EncodedText:
    """Encode documents into the files of both parts. Raises ConfigError where a part has less than `least` tokens."""
    folder.mkdir(exist_ok=True)
    (folder / _DESCRIPTION).unlink(missing_ok=True)
    whole = folder / _WHOLE
    try:
        lengths = encode_documents(passages, encoder, whole)
        lengths, validates = split_documents(lengths, validation_share, least)
        encoded = count_parts(lengths, validates, least, encoder.unit)
        for part, chosen in zip(PARTS, (~validates, validates), strict=True):
            write_chosen(folder / part, np.memmap(whole, encoder.dtype, "r"), lengths, chosen)
    finally:
        whole.unlink(missing_ok=True)
    return encoded


def encode_documents(passages: Iterable[Passage], encoder: Encoder, path: pathlib.Path) -> np.ndarray:
    """Encode documents into one file -> the tokens of each, int64 [documents], its end among them."""
    lengths, length, total, logged = array("q"), 0, 0, time.monotonic()
    end = np.array([encoder.end], encoder.dtype)
    with open(path, "wb") as file:
        for batch in make_batches(passages):
            for passage, tokens in zip(batch, encoder.encode([p.text for p in batch]), strict=True):
                file.write((np.concatenate([tokens, end]) if passage.ends else tokens).data)
                length += len(tokens) + passage.ends
                if passage.ends:
                    lengths.append(length)
                    total, length = total + length, 0
            if time.monotonic() - logged > _SECONDS_BETWEEN_LINES:
                logged = time.monotonic()
                log.info("encoding text: %d documents, %.1f million %s so far", len(lengths), total / 1e6, encoder.unit)
    return np.frombuffer(lengths, np.int64)


def make_batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Group passages until they are long enough to encode together."""
    batch: list[Passage] = []
    characters = 0
    for passage in passages:
        batch.append(passage)
        characters += len(passage.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def split_documents(lengths: np.ndarray, validation_share: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the documents for validation, lengths [N] -> (lengths [N], bool [N]); a single one is cut in two.

    Those chosen have about validation_share of the tokens; the choice is random, and the same for the same lengths.
    """
    if len(lengths) == 1:
        cut = cut_size(int(lengths[0]), validation_share, least)
        return np.array([cut, lengths[0] - cut]), np.array([False, True])
    order = np.random.default_rng(0).permutation(len(lengths))
    validates = np.zeros(len(lengths), bool)
    if len(lengths) > 0:
        validates[order] = choose_validation(lengths[order], validation_share, least)
    return lengths, validates


def count_parts(lengths: np.ndarray, validates: np.ndarray, least: int, unit: str) -> EncodedText:
    """Count the documents and tokens of both parts. Raises ConfigError where one has less than `least` tokens."""
    counts = [(int(chosen.sum()), int(lengths[chosen].sum())) for chosen in (~validates, validates)]
    if min(tokens for _, tokens in counts) < least:
        (_, training), (_, validation) = counts
        raise ConfigError(
            f"[data] files: {len(lengths)} documents hold {training + validation} {unit}, {training} for training and "
            f"{validation} for validation; one sequence takes [model] sequence_length + 1 = {least}"
        )
    return EncodedText(training=counts[0], validation=counts[1])


def write_chosen(path: pathlib.Path, tokens: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> None:
    """Write the chosen documents, bool [N], of tokens [sum of lengths] to a file."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    turns = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)  # [runs, first and end]
    partial = path.with_name(f"{path.name}.part")
    with open(partial, "wb") as file:
        for first, end in edges[turns].tolist():
            file.write(tokens[first:end].data)
    os.replace(partial, path)
