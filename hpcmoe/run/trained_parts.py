"""Which parameters of a Hugging Face model are trained: all, its experts, its routers, or adapters of its matrices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcmoe.config import ModelConfig
from hpcmoe.errors import ConfigError
from hpcmoe.experts.moe import Experts
from hpcmoe.model.hf.build import ROUTERS
from hpcmoe.replacing import make_empty, name_partial, publish_folder, sync, system_errors


def set_trained(model: Any, settings: ModelConfig, seed: int) -> None:
    """Set which parameters require gradients, as [model] trains says; "lora" adds its adapters, drawn from seed.

    The model's experts are spread. The same on all ranks. Raises ConfigError.
    """
    match settings.trains:
        case "all":
            model.requires_grad_(True)
        case "experts":
            model.requires_grad_(False)
            for layer in list_expert_layers(model):
                layer.local.requires_grad_(True)
        case "router":
            model.requires_grad_(False)
            for router in list_routers(model).values():
                router.requires_grad_(True)
        case "lora":
            add_adapters(model, settings, seed)
        case _:
            raise ValueError(settings.trains)


def checkpoint_activations(model: Any) -> None:
    """Keep of each of a model's layers its input alone: a backward pass computes it again."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # an older transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def list_expert_layers(model: nn.Module) -> list[Experts]:
    """List a model's layers of experts, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def list_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the modules, with their paths, that hold a router beside experts that are spread."""
    for path, module in model.named_modules():
        if any(isinstance(inner, Experts) for child in module.children() for inner in child.children()):
            yield path, module


def list_routers(model: nn.Module) -> dict[str, nn.Module]:
    """List the routers by their paths. Raises ConfigError where a block has none."""
    found = dict[str, nn.Module]()
    for path, block in list_blocks(model):
        own = {f"{path}.{name}": child for name, child in block.named_children() if name in ROUTERS}
        if not own:
            raise ConfigError(f'[model] trains = "router": {path} has no module named {" or ".join(ROUTERS)}')
        found |= own
    return found


def add_adapters(model: Any, settings: ModelConfig, seed: int) -> None:
    """Add PEFT's low-rank adapters to dense matrices in place, which alone are trained. Raises ConfigError."""
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise ConfigError('[model] trains = "lora": needs peft: pip install peft') from None
    torch.manual_seed(seed)  # alike on all ranks
    adapters = make_adapter_config(model, settings)
    inject_adapter_in_model(adapters, model)
    model.peft_config = {"default": adapters}  # as a PeftModel has it


def save_adapters(model: Any, folder: Path) -> None:
    """Write a model's adapters to a folder as PEFT reads them, whole or not at all. Not collective.

    Raises CheckpointError.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    partial = name_partial(folder)
    make_empty(partial)
    with system_errors(folder, "written"):
        adapters = {f"base_model.model.{name}": p.contiguous() for name, p in get_peft_model_state_dict(model).items()}
        save_file(adapters, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(partial)
        for path in partial.iterdir():
            sync(path)
    publish_folder(partial, folder)


def make_adapter_config(model: Any, settings: ModelConfig) -> Any:
    """Make PEFT's configuration of the adapters. Raises ConfigError where a target is no dense matrix of the model."""
    from peft import LoraConfig

    dense = list_dense_matrices(model)
    unknown = [name for name in settings.lora_targets if not any(path.split(".")[-1] == name for path in dense)]
    if unknown:
        known = ", ".join(sorted({path.split(".")[-1] for path in dense}))
        raise ConfigError(f"[model] lora_targets: {unknown[0]!r} is no dense matrix of this model: it has {known}")
    targets = [p for p in dense if not settings.lora_targets or p.split(".")[-1] in settings.lora_targets]
    alpha: Any = settings.lora_alpha  # of PEFT's type int, which it only divides
    return LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


def list_dense_matrices(model: Any) -> list[str]:
    """List the paths of a model's dense matrices: not of its head, its routers, nor within its experts."""
    without = tuple(
        f"{path}." for path in [*list_routers(model), *(f"{path}.experts" for path, _ in list_blocks(model))]
    )
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not f"{path}.".startswith(without)
    ]
