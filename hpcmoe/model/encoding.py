"""What turns documents into tokens: their bytes, or the tokenizer of a checkpoint of Hugging Face."""

import hashlib
import pathlib
from collections.abc import Sequence
from os import PathLike
from typing import Any, Protocol

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, printable

TOKEN = np.dtype("<u4")  # of a tokenizer, in a file of encoded text
_TOKENIZER_FILES = "*token*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"


class Encoder(Protocol):
    """What encodes documents."""

    dtype: np.dtype  # of a token
    unit: str  # what tokens are called
    end: int  # the token after each document
    identity: str  # encoders with the same make the same tokens

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts, without the token that ends a document -> arrays of dtype."""


class ByteEncoder:
    """Documents as the bytes of their UTF-8, each ended by a line break."""

    dtype, unit, end, identity = np.dtype(np.uint8), "bytes", ord("\n"), "bytes"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


class TokenEncoder:
    """Documents as tokens of a checkpoint's tokenizer, each ended by its EOS token."""

    dtype, unit = TOKEN, "tokens"

    def __init__(self, folder: str | PathLike, vocabulary_size: int):
        """folder: of the checkpoint. Raises ConfigError for a tokenizer that is not there, or of another vocabulary."""
        self.folder, self.vocabulary_size = pathlib.Path(folder), vocabulary_size
        self.identity = hash_tokenizer(self.folder)
        self.tokenizer = read_tokenizer(self.folder)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"{printable(str(folder))}: its tokenizer has no EOS token to end a document with")
        self.end = int(self.tokenizer.eos_token_id)
        self.check(self.end)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text; what it holds of special tokens are such. Raises ConfigError as check()."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        arrays = [np.array(tokens, np.int64) for tokens in encoded["input_ids"]]
        self.check(max((int(array.max()) for array in arrays if len(array) > 0), default=0))
        return [array.astype(TOKEN) for array in arrays]

    def check(self, token: int) -> None:
        """Raise ConfigError for a token that the model has no embedding of."""
        if token >= self.vocabulary_size:
            raise ConfigError(
                f"{printable(str(self.folder))}: its tokenizer makes token {token}, its model's config.json has "
                f"vocab_size = {self.vocabulary_size}"
            )


def read_tokenizer(folder: pathlib.Path) -> Any:
    """Read the tokenizer of a checkpoint, from files alone, and run no code of theirs. Raises ConfigError."""
    what = f"{printable(str(folder))}: its tokenizer"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(f"{what} needs transformers: pip install 'hpcmoe[hf]'") from None
    if not folder.is_dir():
        raise ConfigError(f"{what}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its many readers raise of files that others wrote
        reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise ConfigError(f"{what} cannot be read: {reason}") from None


def hash_tokenizer(folder: pathlib.Path) -> str:
    """Hash the files of a tokenizer -> hexadecimal digits."""
    hashed = hashlib.sha256()
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        hashed.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return hashed.hexdigest()
