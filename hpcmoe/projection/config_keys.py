"""The config.json of a Hugging Face model, as keys that go by several names: found, and their values checked.

Families name the same width differently (num_experts, n_routed_experts, moe_num_experts); some keep part of their keys
in an object (dbrx: ffn_config.moe_num_experts), and models that see have the language model's in text_config.
"""

import os
from pathlib import Path
from typing import Any

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value
from hpcmoe.reading import read_json

_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")  # where a model that sees keeps its text's
_MOST = 2**31  # no width is as large


class ConfigKeys:
    """The keys of a config.json; every error names the file and the key as it stands there."""

    def __init__(self, path: str | os.PathLike, tree: dict[str, Any]) -> None:
        self.path, self.tree = one_line(path), tree

    @property
    def family(self) -> str:
        """Return the family's name, model_type."""
        family = self.tree.get("model_type")
        return family if isinstance(family, str) else ""

    def find(self, *names: str) -> tuple[str, Any]:
        """Find the first of some names, such as `n_layers` or `ffn_config.moe_top_k` -> (name, value), or ("", None).

        A key that is null counts as absent.
        """
        for name in names:
            value: Any = self.tree
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return name, value
        return "", None

    def read_count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """Read a whole number. Raises ConfigError where it is none, or where it is missing and has no default."""
        name, value = self.find(*names)
        if not name:
            if default is None:
                raise ConfigError(f"{self.path}: {names[0]}: missing{self._other_names(names)}")
            return default
        return self.check_count(name, value, least)

    def check_count(self, name: str, value: Any, least: int = 1) -> int:
        """Check a whole number, written as 16 or 16.0 -> int. Raises ConfigError."""
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(number) is not int or not least <= number < _MOST:
            raise ConfigError(
                f"{self.path}: {name} = {show_value(value)}: must be a whole number, {least} to {_MOST - 1}"
            )
        return number

    def read_flag(self, *names: str, default: bool = False) -> bool:
        """Read true or false. Raises ConfigError for another value."""
        name, value = self.find(*names)
        if not name:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {name} = {show_value(value)}: must be true or false")
        return value

    def read_counts(self, *names: str, least: int = 0) -> list[int] | None:
        """Read a list of whole numbers, or None where there is none. Raises ConfigError."""
        name, value = self.find(*names)
        if not name:
            return None
        return [self.check_count(f"{name}[{i}]", entry, least) for i, entry in enumerate(self.check_list(name, value))]

    def read_words(self, *names: str) -> list[str] | None:
        """Read a list of words, or None where there is none. Raises ConfigError."""
        name, value = self.find(*names)
        if not name:
            return None
        words = self.check_list(name, value)
        if not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{self.path}: {name} = {show_value(value)}: must be a list of words")
        return words

    def check_list(self, name: str, value: Any) -> list[Any]:
        """Check that a value is a list. Raises ConfigError."""
        if not isinstance(value, list):
            raise ConfigError(f"{self.path}: {name} = {show_value(value)}: must be a list")
        return value

    def read_alike(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """Read a whole number, or a list of equal ones by layer. Raises ConfigError where they differ."""
        name, value = self.find(*names)
        if not isinstance(value, list):
            return self.read_count(*names, default=default, least=least)
        numbers = sorted({self.check_count(f"{name}[{i}]", entry, least) for i, entry in enumerate(value)})
        if len(numbers) != 1:
            what = f"layers have {numbers[0]} to {numbers[-1]}" if numbers else "the list is empty"
            raise ConfigError(f"{self.path}: {name}: {what}: must be the same in all layers")
        return numbers[0]

    def _other_names(self, names: tuple[str, ...]) -> str:
        """Format the names that a missing key may have besides the first."""
        return f" (also {', '.join(names[1:])})" * (len(names) > 1)


def read_config_keys(path: str | os.PathLike) -> ConfigKeys:
    """Read a config.json, or the one of a checkpoint's folder -> its keys, the language model's where it has several.

    Raises ConfigError in one line.
    """
    file = Path(path, "config.json") if os.path.isdir(path) else Path(path)
    tree = read_json(file)
    if not isinstance(tree, dict):
        raise ConfigError(f"{one_line(file)}: must hold one JSON object, not {show_value(tree)}")
    while "hidden_size" not in tree:
        nested = next((tree[name] for name in _NESTED if isinstance(tree.get(name), dict)), None)
        if nested is None:
            break
        outer = {name: tree[name] for name in ("model_type", "tie_word_embeddings") if name in tree}
        tree = outer | nested
    return ConfigKeys(file, tree)
