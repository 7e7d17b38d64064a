"""Cut a model of transformers that is in memory to the experts of this rank."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hpcmoe.errors import ConfigError, agree_on
from hpcmoe.experts.family import FamilyExperts
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.model.hf.aux_loss import check_forwards, share_aux_loss

TESTED = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe",
    "phimoe", "jamba", "ernie4_5_moe",
)  # fmt: skip
_WHERE = "hpcmoe.hf.spread"
_NAME = "hpcmoe"  # of our experts function in transformers' registry, and of the layer within a fused module
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
    register_function()
    for fused in list_fused(model):
        layer = FamilyExperts(fused, group=group, top_k=find_top_k(fused), max_tokens=max_tokens, placement=placement)
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            del fused._parameters[name]
        fused.add_module(_NAME, layer)
    model.set_experts_implementation(_NAME)
    share_aux_loss(model, group)
    return model


def check_model(model: Any, group: LayerGroup) -> ModelOutline:
    """Check that a model can be spread -> what all ranks must have alike. Raises ConfigError."""
    check_version()
    model_type = getattr(vars(model).get("config"), "model_type", type(model).__name__)
    fused = list_fused(model)
    if not fused:
        works = ", ".join(TESTED)
        raise ConfigError(
            f"{_WHERE}: model type {model_type!r}: its experts are not in transformers' registry of experts functions; "
            f"works with {works} and others that are"
        )
    if any(_NAME in layer._modules for layer in fused):
        raise ConfigError(f"{_WHERE}: the experts of this model are spread already")
    if group.mesh.tensor_parallel > 1:
        raise ConfigError(f"{_WHERE}: tensor_parallel = {group.mesh.tensor_parallel}: must be 1: experts stay whole")
    for layer in fused:
        find_top_k(layer)
    check_forwards(model)
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return ModelOutline(model_type=model_type, parameters=shapes, weights=hash_samples(model.parameters()))


def check_version() -> None:
    """Raise ConfigError where transformers is missing or too old."""
    wanted = f"{_WHERE}: needs transformers >= {'.'.join(map(str, _OLDEST))}: pip install 'hpcmoe[hf]'"
    try:
        import transformers
    except ImportError:
        raise ConfigError(wanted) from None
    if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < _OLDEST:
        raise ConfigError(f"{wanted}; here is {transformers.__version__}")


def list_fused(model: nn.Module) -> list[Any]:
    """List the modules of a model that hold a layer's experts and are run by transformers' registry."""
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(type(m).forward, "__wrapped__")]


def find_top_k(fused: nn.Module) -> int:
    """Find the most experts of a token in the configuration that a family's module keeps. Raises ConfigError."""
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

    if _NAME not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(_NAME, run_experts)


def run_experts(fused: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the gated sum of each token's experts: x [T, H], choices and weights [T, K] -> [T, H] as x."""
    layer = fused._modules.get(_NAME)
    if layer is None:
        raise ConfigError(f"{_WHERE}: this model's experts function is {_NAME!r}, and its experts are not spread")
    return layer(x, top_k_index, top_k_weights)
