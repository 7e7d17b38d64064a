"""Prompts: read from a file, one a line, and dealt to the ranks, of which each continues its own."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value
from hpcmoe.reading import read_text

_JSON_LINES = (".jsonl", ".ndjson")  # endings of files whose lines are objects
_FIELD = "text"  # of such an object


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt as it was given."""

    text: str
    where: str  # it came from, for messages: `prompts.txt, line 3`


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt in tokens."""

    number: int  # in the order of the file, from 0
    tokens: tuple[int, ...]  # at least one
    limit: int  # of the tokens that are added


class Codec(Protocol):
    """What turns text into a model's tokens and back."""

    num_positions: int | None  # that the model has for a text; None where there is no limit

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""


def read_prompts(path: str | os.PathLike) -> list[PromptText]:
    """Read a prompt a line: text, or in a .jsonl file the "text" of an object. Blank lines count for nothing.

    Raises ConfigError for a file that cannot be read, is not in UTF-8 or holds no prompt, and for a line without text.
    """
    is_json, prompts = Path(path).suffix.lower() in _JSON_LINES, []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{one_line(path)}, line {number}"
            prompts.append(PromptText(text=parse_line(line, where) if is_json else line, where=where))
    if not prompts:
        raise ConfigError(f"{one_line(path)}: holds no prompt: one a line is expected")
    return prompts


def parse_line(line: str, where: str) -> str:
    """Return the text of a line of JSON. Raises ConfigError, which begins with `where`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {one_line(error)}") from None
    text = entry.get(_FIELD) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{where}: {show_value(entry)}: must be an object with a "{_FIELD}"')
    return text


def encode_prompts(prompts: Sequence[PromptText], codec: Codec, max_new_tokens: int) -> list[Prompt]:
    """Encode prompts, each limited to the positions that the model has left for it.

    Raises ConfigError for a prompt without tokens, or one that leaves no position.
    """
    return [encode_prompt(number, prompt, codec, max_new_tokens) for number, prompt in enumerate(prompts)]


def encode_prompt(number: int, prompt: PromptText, codec: Codec, max_new_tokens: int) -> Prompt:
    """Encode one prompt."""
    tokens, limit = codec.encode(prompt.text), max_new_tokens
    if not tokens:
        raise ConfigError(f"{prompt.where}: {show_value(prompt.text)}: has no tokens to begin with")
    if codec.num_positions is not None:
        limit = min(limit, codec.num_positions - len(tokens))
    if limit < 1:
        needs = f"{len(tokens)} tokens + 1 new one = {len(tokens) + 1}"
        raise ConfigError(f"{prompt.where}: {needs} positions, the model has {codec.num_positions}")
    return Prompt(number=number, tokens=tuple(tokens), limit=limit)


def deal_prompts(prompts: Sequence[Prompt], num_ranks: int) -> list[list[Prompt]]:
    """Distribute prompts evenly, those of like lengths to one rank: its batch is padded to its longest."""
    by_length = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    return [[by_length[index] for index in own] for own in np.array_split(np.arange(len(by_length)), num_ranks)]
