"""A folder's model without memory, matched with the folder's tensors: what does not fit is one line, before reading."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcmoe.errors import CheckpointError
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.messages import format_more, one_line
from hpcmoe.model.hf.build import build_model, mark_trained
from hpcmoe.model.hf.mapping import ParameterShapes, Recipe, make_recipes
from hpcmoe.model.hf.sources import Source, make_sources
from hpcmoe.model.hf.spread import check_layers, check_version, list_fused
from hpcmoe.model.hf.stored_model import StoredModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedParameter:
    """A parameter of all experts of a layer, as the family's own model has it."""

    path: str  # of the module that holds it once the family is adapted
    name: str  # there
    rows: int  # of the family's tensor that are one expert's: 1 of [E, ...], F of [E * F, ...]
    num_experts: int

    def cut(self, recipe: Recipe, expert: int) -> Recipe:
        """Return the recipe of one expert. Raises CheckpointError."""
        return recipe.cut(expert, self.num_experts, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedModel:
    """A model on the meta device, and what of a checkpoint makes each of its tensors."""

    model: Any
    dense: list[Recipe]
    experts: list[tuple[FusedParameter, Recipe]]
    shapes: ParameterShapes  # as the family names them; of fused parameters one expert's
    tied: dict[str, set[str]]  # names that are one parameter: the others of each

    @property
    def made(self) -> set[str]:
        """Return the names of all that the checkpoint makes."""
        return {name for recipe in [*self.dense, *(r for _, r in self.experts)] for name in recipe.targets}


def match_model(stored: StoredModel, dtype: torch.dtype | None, trains: str, group: LayerGroup) -> MatchedModel:
    """Build a folder's model on the meta device and match its tensors with the files'.

    Raises ConfigError or CheckpointError in one line.
    """
    check_version("hpcmoe.hf.load")
    model = build_model(stored, dtype)
    recipes, unused = make_recipes(model, make_sources(stored))
    tensors, tied = model.state_dict(keep_vars=True), find_tied_names(model)
    check_layers(f"{one_line(stored.folder)}/config.json", model, group)
    mark_trained(model, trains)
    fused = list_fused_parameters(model, tensors)
    shapes = {name: t[: fused[name].rows] if name in fused else t for name, t in tensors.items()}
    matched = MatchedModel(
        model=model,
        dense=[recipe for recipe in recipes if recipe.targets[0] not in fused],
        experts=[(fused[recipe.targets[0]], recipe) for recipe in recipes if recipe.targets[0] in fused],
        shapes=ParameterShapes(shapes),
        tied=tied,
    )
    check_matched(stored.folder, matched)
    if unused and group.mesh.world.rank == 0:
        example = f"{one_line(unused[0])}{format_more(len(unused) - 1)}"
        log.warning("%s: the model has no use for %s", stored.folder, example)
    return matched


def list_fused_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, FusedParameter]:
    """List the parameters of all experts of a layer, by the names that the family's own model had for them."""
    fused = {id(module) for module in list_fused(model)}
    found = {}
    for path, module in [(path, module) for path, module in model.named_modules() if id(module) in fused]:
        for name, parameter in module.named_parameters(recurse=False):
            original = getattr(module, "original", {}).get(name, name)
            owner = path.rpartition(".")[0] if original.startswith("../") else path
            family_name = f"{owner}.{original.removeprefix('../')}"
            rows = parameter.shape[1] if getattr(module, "stacks_rows", False) else 1
            number = len(tensors[family_name]) // rows
            found[family_name] = FusedParameter(path=path, name=name, rows=rows, num_experts=number)
    return found


def check_matched(folder: str, matched: MatchedModel) -> None:
    """Check that a model's tensors are all made, of the shapes that it wants. Raises CheckpointError in one line."""
    made, config = matched.made, matched.model.config
    missing = [name for name in matched.shapes.tensors if not made & {name, *matched.tied.get(name, ())}]
    if missing:
        raise CheckpointError(
            f"{one_line(folder)}: {missing[0]}{format_more(len(missing) - 1)}: no tensor makes it: the checkpoint is "
            f"not whole, or its config.json is another model's ({config.model_type})"
        )
    for recipe in matched.dense:
        check_recipe(recipe, matched.shapes, config)
    for fused, recipe in matched.experts:
        check_recipe(fused.cut(recipe, 0), matched.shapes, config)
        for sources in recipe.sources.values():
            check_alike(sources)


def check_alike(sources: Sequence[Source]) -> None:
    """Check that the tensors of all experts have one shape. Raises CheckpointError in one line."""
    for source in sources:
        if source.shape != sources[0].shape:
            other = f"{list(sources[0].shape)} of {one_line(sources[0].name)}"
            raise CheckpointError(f"{source.where}: shape {list(source.shape)}: must be {other}")


def check_recipe(recipe: Recipe, shapes: ParameterShapes, config: Any) -> None:
    """Run a recipe on tensors without memory: it makes what is wanted. Raises CheckpointError in one line."""
    where = recipe.list_sources()[0].where
    found = [list(source.shape) for source in recipe.list_sources()]
    try:
        made = recipe.make(lambda source: torch.empty(source.shape, device="meta"), shapes, config)
    except Exception as error:  # whatever transformers' operations raise where shapes do not fit
        raise CheckpointError(f"{where}: {found} do not make {recipe.targets[0]}: {one_line(error)}") from error
    for target in recipe.targets:
        wanted, shape = (list(t.shape) if t is not None else None for t in (shapes.tensors[target], made.get(target)))
        if shape != wanted:
            raise CheckpointError(f"{where}: shape {found} makes {target} {shape}: must be {wanted}")


def find_tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Find the parameters that are one under several names -> the others of each."""
    names_of: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), set()).add(name)
    return {name: names - {name} for names in names_of.values() if len(names) > 1 for name in names}
