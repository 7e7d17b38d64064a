"""A family's own model, built without memory for its weights: all that no checkpoint holds is computed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcmoe.errors import ConfigError
from hpcmoe.messages import format_size, one_line, show_value
from hpcmoe.model.hf.sources import READABLE, read_quantisation
from hpcmoe.model.hf.spread import list_fused
from hpcmoe.model.hf.stored_model import StoredModel
from hpcmoe.reading import read_json

DTYPES_OF_MODEL = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINS = ("all", "experts", "router")
ROUTERS = ("gate", "router")  # what the families call a block's router, beside its experts
_GENERATION = "generation_config.json"
_INITIALIZED = "_is_hf_initialized"  # by which transformers knows what its initialisation leaves alone


def build_model(stored: StoredModel, dtype: torch.dtype | None) -> Any:
    """Build the model of a folder's config.json on the meta device, its computed buffers on the host.

    dtype None: that of config.json, else of the checkpoint's first floating-point tensor; bfloat16 for a quantised one.
    Code that a folder brings along (auto_map) is never run. Raises ConfigError in one line.
    """
    where = f"{one_line(stored.folder)}/config.json"
    from transformers import AutoModelForCausalLM

    dtype = find_model_dtype(stored, where) if dtype is None else dtype
    config = make_family_config(stored, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its families' constructors do with unfit numbers
        raise ConfigError(f"{where}: model type {stored.config['model_type']!r}: {one_line(error)}") from error
    if (declared := read_quantisation(stored)) and declared["quant_method"] not in READABLE:
        whole = sum(parameter.numel() for parameter in model.parameters())
        raise ConfigError(
            f"{where}: quant_method = {show_value(declared['quant_method'])}: {' and '.join(READABLE)} are read; "
            f"dequantise it by its own library and save that: {whole / 1e9:.3g} billion parameters x "
            f"{dtype.itemsize} B ({dtype}) are {format_size(whole * dtype.itemsize)}"
        )
    keep_in_float32(model, dtype)
    compute_buffers(model)
    if (Path(stored.folder) / _GENERATION).is_file():
        model.generation_config = read_generation_config(stored.folder)
    return model.eval()


def make_family_config(stored: StoredModel, where: str) -> Any:
    """Make the family's configuration. Raises ConfigError in one line."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    values = dict(stored.config)
    for name in ("auto_map", "quantization_config"):  # what is loaded is neither remote code nor quantised
        values.pop(name, None)
    family = values["model_type"]
    if family not in CONFIG_MAPPING:
        raise ConfigError(f"{where}: model_type = {show_value(family)}: this version of transformers has none such")
    layers = values.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(stored.tensors):
        raise ConfigError(f"{where}: num_hidden_layers = {show_value(layers)}: of {len(stored.tensors)} tensors")
    try:
        config = CONFIG_MAPPING[family].from_dict(PreTrainedConfig._decode_special_floats(values))
    except Exception as error:  # as above
        raise ConfigError(f"{where}: {one_line(error)}") from error
    config.name_or_path = stored.folder
    return config


def read_generation_config(folder: str) -> Any:
    """Read how a model generates by default. Raises ConfigError in one line."""
    from transformers import GenerationConfig

    values = read_json(Path(folder) / _GENERATION)
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # as above
        raise ConfigError(f"{one_line(folder)}/{_GENERATION}: {one_line(error)}") from error


def find_model_dtype(stored: StoredModel, where: str) -> torch.dtype:
    """Find the precision in which a checkpoint's model is loaded. Raises ConfigError."""
    declared = stored.config.get("dtype", stored.config.get("torch_dtype"))
    if isinstance(declared, str):
        if declared not in DTYPES_OF_MODEL:
            known = " or ".join(DTYPES_OF_MODEL)
            raise ConfigError(f"{where}: dtype = {show_value(declared)}: must be {known}, or give load(dtype=...)")
        return DTYPES_OF_MODEL[declared]
    if read_quantisation(stored):
        return torch.bfloat16
    found = [tensor.dtype for tensor in stored.tensors.values() if tensor.dtype in DTYPES_OF_MODEL.values()]
    return found[0] if found else torch.float32


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Cast what a family keeps in float32, as transformers does when it loads."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, name_of_group = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (match := pattern.search(name)) and match.lastgroup and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan[name_of_group[match.lastgroup]])


def compute_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds, by the family's own initialisation; all else stays unset."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        setattr(tensor, _INITIALIZED, True)
    model.initialize_weights()


def mark_trained(model: nn.Module, trains: str) -> None:
    """Mark which parameters are trained: all, those of the experts, or those of the routers beside the experts."""
    chosen = {id(parameter) for parameter in list_trained(model, trains)}
    if not chosen:
        raise ConfigError(f"hpcmoe.hf.load: trains = {trains!r}: {type(model).__name__} has no such parameter")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())


def list_trained(model: nn.Module, trains: str) -> list[Tensor]:
    """List the parameters of the parts that are trained."""
    fused = set(map(id, list_fused(model)))
    match trains:
        case "all":
            return list(model.parameters())
        case "experts":
            return [parameter for module in list_fused(model) for parameter in module.parameters()]
        case "router":
            blocks = [module for module in model.modules() if fused & set(map(id, module.children()))]
            routers = [child for block in blocks for name, child in block.named_children() if name in ROUTERS]
            return [parameter for router in routers for parameter in router.parameters()]
        case _:
            raise ConfigError(f"hpcmoe.hf.load: trains = {trains!r}: must be one of {', '.join(TRAINS)}")
