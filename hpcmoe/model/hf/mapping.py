"""Which tensors of a checkpoint make which parameters of a model, by transformers' own table of each family's names.

The table has renamings and converters, such as experts.*.w1.weight and experts.*.w3.weight -> experts.gate_up_proj,
stacked over the experts, then concatenated. What one expert takes needs that expert's tensors alone.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hpcmoe.errors import CheckpointError
from hpcmoe.model.hf.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one or more tensors of a model are made of."""

    targets: tuple[str, ...]
    converter: Any  # transformers' own, None where the one source is the target
    sources: dict[str, list[Source]] = field(default_factory=dict)  # by the converter's patterns

    @property
    def operations(self) -> tuple[tuple[str, int], ...]:
        """Return what is done to the sources: name and dimension."""
        steps = [] if self.converter is None else self.converter.operations
        return tuple((type(step).__name__, getattr(step, "dim", -1)) for step in steps)

    def list_sources(self) -> list[Source]:
        """List the sources, pattern after pattern."""
        patterns = self.sources if self.converter is None else self.converter.source_patterns
        return [source for pattern in patterns for source in self.sources.get(pattern, [])]

    def cut(self, expert: int, num_experts: int, rows: int) -> "Recipe":
        """Return the recipe of one expert [rows, ...] of fused parameters [E * rows, ...]. Raises CheckpointError."""
        return Recipe(
            targets=self.targets,
            converter=self.converter,
            sources={pattern: [cut_sources(own, expert, num_experts, rows)] for pattern, own in self.sources.items()},
        )

    def list_views(self, target: Tensor) -> Iterator[tuple[Source, Tensor]] | None:
        """List each source with its place in the target, None where the target is not the sources side by side."""
        sources = self.list_sources()
        match self.operations:
            case ():
                return iter([(sources[0], target)])
            case (("MergeModulelist", 0),) if len(sources) == len(target) == 1:
                return iter([(sources[0], target[0])])
            case (("MergeModulelist", 0), ("Concatenate", dim)) if len(self.sources) == len(sources) and dim > 0:
                return place_side_by_side(sources, target[0], dim - 1)
            case (("Concatenate", dim),):
                return place_side_by_side(sources, target, dim)
            case _:
                return None

    def make(self, read: Callable[[Source], Tensor], shapes: "ParameterShapes", config: Any) -> dict[str, Tensor]:
        """Run transformers' operations on the sources -> what they make, by the names of the targets."""
        tensors = {pattern: [read(source) for source in own] for pattern, own in self.sources.items()}
        if self.converter is None:
            return {self.targets[0]: next(iter(tensors.values()))[0]}
        converter = copy.deepcopy(self.converter)
        converter.collected_tensors = tensors
        made = converter.convert(self.targets[0], model=shapes, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, slots=True)
class ParameterShapes:
    """What transformers' operations ask of a model: its parameters, here without memory."""

    tensors: dict[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter, of an expert [1, ...]."""
        return self.tensors[name]


def cut_sources(sources: Sequence[Source], expert: int, num_experts: int, rows: int) -> Source:
    """Return one expert's source, some rows of one fused tensor or one tensor of many. Raises CheckpointError."""
    if len(sources) == num_experts:
        return sources[expert]
    if len(sources) == 1 and sources[0].shape[:1] == (num_experts * rows,):
        return sources[0].cut(expert * rows, (expert + 1) * rows)
    found = f"{len(sources)} tensors" if len(sources) > 1 else f"shape {list(sources[0].shape)}"
    raise CheckpointError(f"{sources[0].where}: {found}: must be for {num_experts} experts, as config.json has it")


def place_side_by_side(sources: Iterable[Source], target: Tensor, dim: int) -> Iterator[tuple[Source, Tensor]]:
    """Yield each source with its place in the target, one after the other in a dimension."""
    begin = 0
    for source in sources:
        size = source.shape[dim]
        yield source, target.narrow(dim, begin, size)
        begin += size


def make_recipes(model: Any, sources: Mapping[str, Source]) -> tuple[list[Recipe], list[str]]:
    """Match a checkpoint's tensors with a model's parameters and persistent buffers -> (recipes, names of no use).

    The order and the rules are those of transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table, wanted, prefix = get_model_conversion_mapping(model), model.state_dict(), model.base_model_prefix
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    recipes: dict[str, Recipe] = {}
    unused = []
    for name in sorted(sources, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unused.append(name)
            continue
        if target not in recipes:
            recipes[target] = make_recipe(target, of_pattern[pattern] if pattern is not None else None)
        recipe = recipes[target]
        recipe.sources.setdefault(name if pattern is None else pattern, []).append(sources[name])
    model._weight_conversions = [entry for entry in table if entry._was_used]  # by which transformers saves
    return list(recipes.values()), unused


def make_recipe(target: str, converter: Any) -> Recipe:
    """Make an empty recipe, whose first target has this name."""
    if converter is None:
        return Recipe(targets=(target,), converter=None)
    first, *others = converter.target_patterns
    return Recipe(targets=(target, *(target.replace(first, other) for other in others)), converter=converter)
