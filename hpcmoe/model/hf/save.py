"""Write a spread model as a checkpoint of its family, which transformers loads: whole, or not at all."""

import copy
import hashlib
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpcmoe.errors import CheckpointError, ConfigError, HpcmoeError, agree_on, on_all, on_root
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.messages import one_line
from hpcmoe.model.hf.adapters import AdaptedExperts
from hpcmoe.model.hf.gather import ExpertGatherer, list_rounds
from hpcmoe.model.hf.names import (
    CheckpointPart,
    CheckpointPlan,
    convert,
    list_dense,
    list_spread_layers,
    plan_checkpoint,
)
from hpcmoe.model.hf.shard_files import INDEX_NAME, ShardFile, ShardWriter, make_index, split_into_files
from hpcmoe.model.hf.spread import check_version
from hpcmoe.replacing import choose_target, make_empty, name_partial, publish_folder, sync, system_errors
from hpcmoe.wait import broadcast

log = logging.getLogger(__name__)
_CALL = "hpcmoe.hf.save"
_SHARD_BYTES = 5_000_000_000
_MARKS = ("config.json", "adapter_config.json")  # a whole checkpoint has one of them
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken"
    r"|chat_template.*"
)
_OWN_FILES = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(config|generation_config|adapter_config)\.json|"
    + _TOKENIZER_FILES.pattern
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOutline:
    """What the ranks must have alike to write one checkpoint."""

    model_type: str
    num_tensors: int
    num_files: int
    headers: str  # a hash of the files' headers: names, shapes and dtypes


def save(model: Any, group: LayerGroup, folder: Path | str, *, max_shard_bytes: int = _SHARD_BYTES) -> None:
    """Write a model whose experts are spread to a folder, as transformers' save_pretrained would of the whole.

    AutoModelForCausalLM.from_pretrained(folder) loads it: the family's names, the model's dtypes, config.json,
    generation_config.json, and the tokenizer's files where the folder that the model came from has them. Files hold at
    most max_shard_bytes of tensors, or one tensor, and are written by ranks side by side. A rank holds one expert
    besides its own at a time. A model with adapters of PEFT writes these alone, in PEFT's format; after
    merge_and_unload() it is written whole. A checkpoint of that name is replaced at the end, any other folder is not.
    Buffers are those of rank 0. Collective over the group. Raises CheckpointError or ConfigError on all ranks.
    """
    started, world = time.monotonic(), group.mesh.world
    group.meet(_CALL)
    on_all(world, lambda: check_model_and_size(model, max_shard_bytes))
    path = on_root(world, lambda: choose_target(folder, _CALL, _OWN_FILES, _MARKS))
    partial = name_partial(path)
    try:
        on_root(world, lambda: make_empty(partial))
        write = write_adapters if has_adapters(model) else write_whole
        what = write(model, group, partial, max_shard_bytes)
        on_root(world, lambda: finish_folder(partial, path))
    except HpcmoeError:
        on_root(world, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise
    log.info("%s: %s written in %.2f s", path, what, time.monotonic() - started)


def check_model_and_size(model: Any, max_shard_bytes: int) -> None:
    """Check what can be checked before anything is written. Raises ConfigError."""
    check_version(_CALL)
    from transformers import PreTrainedModel

    if max_shard_bytes < 1:
        raise ConfigError(f"{_CALL}: max_shard_bytes = {max_shard_bytes}: must be at least 1")
    if not (isinstance(model, PreTrainedModel) or has_adapters(model)):
        raise ConfigError(f"{_CALL}: {type(model).__name__}: is no model of transformers")
    if getattr(model, "is_quantized", False):
        raise ConfigError(f"{_CALL}: {type(model).__name__}: its weights are quantized: numbers alone are saved")
    if any(isinstance(module, AdaptedExperts) and module.drops_rows for module in model.modules()):
        raise ConfigError(
            f"{_CALL}: {type(model).__name__}: cannot be saved: weights of its file that nothing reads are not kept"
        )


def has_adapters(model: Any) -> bool:
    """Return True if a model has adapters of PEFT: around it, or added by transformers."""
    return hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False)


def write_whole(model: Any, group: LayerGroup, folder: Path, max_shard_bytes: int) -> str:
    """Write all of a model's tensors and its configuration -> what was written. Collective over the group."""
    world, layers = group.mesh.world, list_spread_layers(model)

    # Plan the files, alike on all ranks.
    gatherer = ExpertGatherer(group.mesh, layers)
    dense = on_all(world, lambda: list_dense(model, layers))
    plan = on_all(world, lambda: plan_checkpoint(model, dense, layers, gatherer.make_first_experts()))
    files = on_all(world, lambda: split_into_files(plan.tensors, max_shard_bytes))
    agree_on(world, _CALL, lambda: outline_files(model, plan, files))
    on_root(world, lambda: write_configs(model, folder))

    # Convert and write part by part; each rank takes its turn with the experts that others write.
    dense |= broadcast(world, list_buffers_of(model, dense) if world.rank == 0 else None)
    rank_of_file = {file.name: number * world.size // len(files) for number, file in enumerate(files)}
    writer = ShardWriter(folder, [file for file in files if rank_of_file[file.name] == world.rank])
    for wanted in list_rounds(assign_parts(plan, files, rank_of_file)):
        tensors = gatherer.fetch(wanted)
        part = dict(wanted).get(world.rank)
        if part is not None:
            write_part(model, writer, part, tensors or {name: dense[name] for name in part.dense})
    on_all(world, writer.finish)

    if len(files) > 1:
        on_root(world, lambda: write_text(folder / INDEX_NAME, make_index(files)))
    num_bytes = sum(file.num_bytes for file in files)
    return f"{len(plan.tensors)} tensors, {num_bytes} bytes in {len(files)} files,"


def outline_files(model: Any, plan: CheckpointPlan, files: list[ShardFile]) -> SaveOutline:
    """Return what must be alike on all ranks."""
    hashed = hashlib.blake2b(digest_size=8)
    for file in files:
        hashed.update(file.header)
    return SaveOutline(
        model_type=vars(model)["config"].model_type,
        num_tensors=len(plan.tensors),
        num_files=len(files),
        headers=hashed.hexdigest(),
    )


def list_buffers_of(model: Any, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """List the buffers among a model's dense tensors, on the host."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().cpu() for name, tensor in dense.items() if name not in parameters}


def assign_parts(
    plan: CheckpointPlan, files: list[ShardFile], rank_of_file: dict[str, int]
) -> dict[int, list[CheckpointPart]]:
    """List what each writing rank converts: every part of which its files hold something."""
    rank_of_tensor = {name: rank_of_file[file.name] for file in files for name in file.offset_of_tensor}
    parts_of_rank: dict[int, list[CheckpointPart]] = {rank: [] for rank in sorted(set(rank_of_file.values()))}
    for part in plan.parts:
        for rank in sorted({rank_of_tensor[place.name] for place in part.places.values()}):
            parts_of_rank[rank].append(part)
    return parts_of_rank


def write_part(model: Any, writer: ShardWriter, part: CheckpointPart, tensors: dict[str, Tensor]) -> None:
    """Convert a part and write it where it belongs."""
    for name, tensor in convert(model, tensors).items():
        place = part.places[name]
        writer.write(place.name, place.first_row, tensor)


def write_configs(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files. Raises CheckpointError."""
    config = copy.deepcopy(vars(model)["config"])
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the numbers are written as they are
    with system_errors(folder, "written"):
        try:
            config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except ValueError as error:  # transformers does not write values that contradict each other
            raise CheckpointError(f"{folder}: configuration cannot be written: {one_line(error)}") from error
        copy_tokenizer(model, folder)


def copy_tokenizer(model: Any, folder: Path) -> None:
    """Copy the tokenizer's files from the folder that a model was loaded from, if it was from one."""
    source = getattr(vars(model)["config"], "_name_or_path", "")
    if not source or not os.path.isdir(source):
        return
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and _TOKENIZER_FILES.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)


def write_adapters(model: Any, group: LayerGroup, folder: Path, _max_shard_bytes: int) -> str:
    """Write a model's adapters alone, in PEFT's format -> what was written. Collective over the group."""

    def write() -> None:
        """Write them on rank 0, without PEFT's form of a model card."""
        with system_errors(folder, "written"):
            try:
                model.save_pretrained(folder)
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(f"{folder}: adapters cannot be written: {one_line(error)}") from error
            (folder / "README.md").unlink(missing_ok=True)

    on_root(group.mesh.world, write)
    return "adapters alone, in PEFT's format,"


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises CheckpointError."""
    with system_errors(path, "written"):
        path.write_text(text, encoding="utf-8")


def finish_folder(partial: Path, folder: Path) -> None:
    """Wait until all files of a folder are on the disk, and give it its name. Raises CheckpointError."""
    with system_errors(partial, "written"):
        for path in partial.iterdir():
            sync(path)
    publish_folder(partial, folder)
