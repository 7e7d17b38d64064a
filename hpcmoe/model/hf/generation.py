"""Texts continued by a spread model of transformers: by its own generate(), in which all ranks take as many steps.

What ends a rank's texts is not told to it: a rank whose texts are finished, or that has none, goes on with a token of
no account, so that its experts serve the others, until all ranks have finished.
"""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line
from hpcmoe.model.continuations import Continuations

_FILLER = 0  # the token that fills a batch where the model is not to look, and what a finished row is given
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class FamilyCodec:
    """Text as a checkpoint's own tokenizer has it."""

    def __init__(self, tokenizer: Any, num_positions: int | None) -> None:
        self.tokenizer, self.num_positions = tokenizer, num_positions

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer begins a text by."""
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without those that are no text."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class FamilyEngine:
    """Continues texts by a model of transformers, whose generation settings it takes over."""

    def __init__(self, model: Any) -> None:
        self.model, settings = model, model.generation_config
        ends = settings.eos_token_id
        self.ends: Set[int] = frozenset([ends] if isinstance(ends, int) else ends or ())
        settings.update(
            do_sample=False, num_beams=1, temperature=None, top_k=None, top_p=None, max_length=None,
            eos_token_id=None, pad_token_id=_FILLER, use_cache=True,
        )  # fmt: skip

    def run(self, texts: Continuations) -> None:
        """Extend this rank's texts until all ranks have finished theirs. Collective over the group."""

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            """Choose a token of each row by a step's scores [rows, V] -> scores that leave no other."""
            growing = texts.growing
            tokens = torch.full((len(scores), 1), _FILLER, device=scores.device)
            tokens[growing, 0] = torch.tensor(texts.add(scores[growing]), dtype=torch.int64, device=scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

        def is_over(ids: Tensor, _: Tensor, **__: Any) -> Tensor:
            """Return True if all ranks have finished, for each row [rows]."""
            return torch.full((len(ids),), texts.is_over(), device=ids.device)

        ids, mask = pad_left([row.prompt.tokens for row in texts.rows] or [[_FILLER]])
        self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=texts.options.max_new_tokens,
            logits_processor=[choose],
            stopping_criteria=[is_over],
        )


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on their left to one length -> (tokens, mask), [rows, length] int64."""
    length = max(map(len, rows))
    ids = torch.tensor([[_FILLER] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def read_codec(folder: Path) -> FamilyCodec:
    """Read the tokenizer of a checkpoint. Raises ConfigError where it is missing or damaged."""
    from transformers import AutoConfig, AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ConfigError(f"{one_line(folder)}: has no tokenizer: {', '.join(_VOCABULARIES)}: one of them is expected")
    try:
        family = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and others raise what they like
        raise ConfigError(f"{one_line(folder)}: its tokenizer cannot be read: {one_line(error)}") from None
    return FamilyCodec(tokenizer, getattr(family, "max_position_embeddings", None))


def quiet_transformers() -> None:
    """Hide transformers' warnings and bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
