"""Cut a model of transformers that is in memory to the experts of this rank."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from hpcmoe.errors import ConfigError, agree_on
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.experts.family_shards import count_feed_forward, list_uncut
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.model.hf.adapters import ADAPTED, SPREAD_NAME, AdaptedExperts, adapt_model
from hpcmoe.model.hf.aux_loss import check_forwards, share_aux_loss

TESTED = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe",
    "phimoe", "jamba", "ernie4_5_moe",
)  # fmt: skip
_WHERE = "hpcmoe.hf.spread"
_OLDEST = (5, 9)
_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_selected_experts", "top_k")
_SAMPLES = 256  # numbers of each parameter by which ranks compare their models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What the ranks' models must have alike."""

    model_type: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape
    weights: str  # a hash of some numbers of each parameter


def spread(
    model: Any,
    group: LayerGroup,
    *,
    max_tokens: int | None = None,
    placement: Sequence[int] | np.ndarray | None = None,
) -> Any:
    """Cut a transformers model in memory, in place, to the experts of this rank -> the model.

    All ranks give the same model, its weights too; what is not an expert stays whole on each. max_tokens of a rank in
    one exchange, the group's by default; placement [S]: the expert of each slot, as for hpcmoe.Experts, the same in
    all layers. Then all ranks call forward and backward alike, each on its own batch, and group.sum_gradients(model).
    In generate() all ranks take equally many steps. Parameters are other objects afterwards: build the optimizer then.
    Collective over the group. Raises ConfigError, PlacementError or ClusterError on all ranks.
    """
    agree_on(group.mesh.world, _WHERE, lambda: check_model(model, group))
    return cut_model(model, group, max_tokens, placement)


def cut_model(
    model: Any, group: LayerGroup, max_tokens: int | None, placement: Sequence[int] | np.ndarray | None
) -> Any:
    """Cut a model's fused experts to those of this rank -> the model. Collective over the group.

    Experts of a model on the meta device get memory whose values are to come. Raises as spread() does.
    """
    register_function()
    fused_modules = list_fused(model)
    for fused in fused_modules:
        layer = FamilyExperts(fused, group=group, top_k=find_top_k(fused), max_tokens=max_tokens, placement=placement)
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            del fused._parameters[name]
        fused.add_module(SPREAD_NAME, layer)
        if not isinstance(fused, AdaptedExperts):
            fused.forward = MethodType(run_experts, fused)  # whatever experts_implementation is set to later
    if not any(isinstance(fused, AdaptedExperts) for fused in fused_modules):
        model.set_experts_implementation(SPREAD_NAME)
    share_aux_loss(model, group)
    return model


def check_model(model: Any, group: LayerGroup) -> ModelOutline:
    """Check that a model can be spread -> what all ranks must have alike. Raises ConfigError.

    Blocks of a family outside of transformers' registry are adapted, which changes no result.
    """
    check_version(_WHERE)
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    weights = hash_samples(model.parameters())
    check_layers(_WHERE, model, group)
    model_type = getattr(vars(model).get("config"), "model_type", type(model).__name__)
    return ModelOutline(model_type=model_type, parameters=shapes, weights=weights)


def check_layers(where: str, model: Any, group: LayerGroup) -> None:
    """Check that a model's experts can be spread. Raises ConfigError, which begins with `where`."""
    adapt_model(model)
    fused_modules = list_fused(model)
    if not fused_modules:
        works = ", ".join((*TESTED, *ADAPTED))
        model_type = getattr(vars(model).get("config"), "model_type", type(model).__name__)
        raise ConfigError(
            f"{where}: model type {model_type!r}: its experts are not in transformers' registry of experts functions; "
            f"works with {works} and others that are"
        )
    for fused in fused_modules:
        check_experts(where, fused, group.mesh.tensor_parallel)
    check_forwards(where, model)


def check_experts(where: str, fused: nn.Module, tensor_parallel: int) -> None:
    """Check that the experts of a layer can be spread, each over so many ranks. Raises ConfigError."""
    if SPREAD_NAME in fused._modules:
        raise ConfigError(f"{where}: the experts of this model are spread already")
    find_top_k(fused)
    own = {name for name, _ in fused.named_parameters(recurse=False)}
    if shared := [name for name, _ in fused.named_parameters() if name not in own]:
        raise ConfigError(
            f"{where}: {type(fused).__name__}: its experts share {shared[0]}, which no rank can have alone"
        )
    if tensor_parallel == 1:
        return
    what = f"{where}: tensor_parallel = {tensor_parallel}: {type(fused).__name__}"
    if getattr(fused, "has_post_expert_norm", False):
        raise ConfigError(f"{what} norms what comes of a whole expert: must be 1")
    if uncut := list_uncut(fused):
        raise ConfigError(f"{what}: where to cut {uncut[0]} is not known: must be 1")
    feed_forward = count_feed_forward(fused)
    if feed_forward % tensor_parallel:
        rest = feed_forward % tensor_parallel
        raise ConfigError(
            f"{what}: a feed-forward size of {feed_forward} leaves {rest} over {tensor_parallel} ranks: must divide it"
        )


def check_version(where: str) -> None:
    """Raise ConfigError, which begins with `where`, where transformers is missing or too old."""
    wanted = f"{where}: needs transformers >= {'.'.join(map(str, _OLDEST))}: pip install 'hpcmoe[hf]'"
    try:
        import transformers
    except ImportError:
        raise ConfigError(wanted) from None
    if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < _OLDEST:
        raise ConfigError(f"{wanted}; here is {transformers.__version__}")


def list_fused(model: nn.Module) -> list[Any]:
    """List the modules of a model that hold a layer's experts: those of transformers' registry, and adapted ones."""
    return [
        module
        for module in model.modules()
        if isinstance(module, AdaptedExperts)
        or (hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__"))
    ]


def find_top_k(fused: nn.Module) -> int:
    """Find the most experts of a token in a module of all experts, or in its configuration. Raises ConfigError."""
    if isinstance(fused, AdaptedExperts):
        return fused.top_k
    family = vars(fused)["config"]
    for name in _TOP_K:
        if (found := getattr(family, name, None)) is not None:
            return max(found) if isinstance(found, Sequence) else int(found)
    raise ConfigError(f"{_WHERE}: {type(family).__name__} has none of {', '.join(_TOP_K)}")


def hash_samples(parameters: Any) -> str:
    """Hash some numbers of each parameter: models of other weights differ."""
    hashed = hashlib.blake2b(digest_size=8)
    for parameter in parameters:
        flat = parameter.detach().flatten()
        hashed.update(flat[:: max(len(flat) // _SAMPLES, 1)].double().cpu().numpy().tobytes())
    return hashed.hexdigest()


def register_function() -> None:
    """Register what runs spread experts in transformers' registry, once."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if SPREAD_NAME not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(SPREAD_NAME, run_experts)


def run_experts(fused: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the gated sum of each token's experts: x [T, H], choices and weights [T, K] -> [T, H] as x."""
    layer = fused._modules.get(SPREAD_NAME)
    if layer is None:
        raise ConfigError(f"{_WHERE}: this model's experts function is {SPREAD_NAME!r}, and its experts are not spread")
    return layer(x, top_k_index, top_k_weights)
