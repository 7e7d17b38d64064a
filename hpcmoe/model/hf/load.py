"""Load a model of transformers from its files: dense parts whole on each rank, of the experts this rank's alone."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import Device
from hpcmoe.errors import ConfigError, PlacementError, agree_on, on_all, on_root
from hpcmoe.experts.family_shards import cut_shard
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.messages import format_size, one_line, show_value
from hpcmoe.model.hf.build import DTYPES_OF_MODEL, TRAINS
from hpcmoe.model.hf.fill import FillTask, LoadEstimate, PreparedLoad
from hpcmoe.model.hf.match import FusedParameter, MatchedModel, match_model
from hpcmoe.model.hf.names import list_spread_layers
from hpcmoe.model.hf.spread import cut_model
from hpcmoe.model.hf.stored_model import StoredModel, read_stored_model
from hpcmoe.wait import gather_to_all

log = logging.getLogger(__name__)
_WHERE = "hpcmoe.hf.load"


class LoadGroup(LayerGroup, Protocol):
    """What loading needs of a group (hpcmoe.group.Group)."""

    topology: Topology
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What all ranks must give alike."""

    path: str
    dtype: torch.dtype | None  # None: the checkpoint's
    trains: str


def load(
    path: str | os.PathLike,
    group: LoadGroup,
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    placement: Sequence[int] | np.ndarray | None = None,
    trains: str = "all",
) -> Any:
    """Load a model from a folder of transformers (config.json, safetensors) -> the family's own, in evaluation mode.

    Dense parts are whole on each rank, read once a node; of the experts each rank reads its own alone, as spread()
    would place them; max_tokens and placement are those of spread(). dtype: float32, bfloat16 or None, the
    checkpoint's; fp8 and MXFP4 are dequantised while they are read. trains: which parameters are trained, "all",
    "experts" or "router". Collective over the group. Raises ConfigError, CheckpointError, PlacementError or
    ClusterError on all ranks, most before anything is read.
    """
    prepared = prepare_load(path, group, max_tokens=max_tokens, dtype=dtype, placement=placement, trains=trains)
    return prepared.read()


def prepare_load(
    path: str | os.PathLike,
    group: LoadGroup,
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    placement: Sequence[int] | np.ndarray | None = None,
    trains: str = "all",
) -> PreparedLoad:
    """Check a folder, build its model over the group, and estimate what load() takes, which read() then does.

    Memory is reserved, and used as it is filled. Collective over the group. The arguments are those of load(), which
    raises what this does.
    """
    # Read names and shapes on rank 0, match them with the model's on all.
    world = group.mesh.world
    options = agree_on(world, _WHERE, lambda: check_load_options(path, dtype, trains))
    stored = on_root(world, lambda: read_stored_model(options.path))
    matched = on_all(world, lambda: match_model(stored, options.dtype, options.trains, group))
    model = matched.model

    # Cut the experts to this rank's, give all that is left memory, and list what fills it.
    tied = untie_stored(matched)
    cut_model(model, group, max_tokens, placement)
    allocate_dense(model, group.device.torch_device)
    dense_tasks = sorted(list_dense_tasks(matched), key=lambda task: task.position)
    expert_tasks = sorted(list_expert_tasks(matched, group.mesh), key=lambda task: task.position)
    estimate = estimate_load(model, group, dense_tasks, expert_tasks)
    check_node_memory(stored.folder, group, estimate)
    log_estimate(stored, group, estimate)
    return PreparedLoad(
        model=model, group=group, folder=stored.folder, dense=dense_tasks, experts=expert_tasks,
        shapes=matched.shapes, tied=tied, estimate=estimate,
    )  # fmt: skip


def check_load_options(path: str | os.PathLike, dtype: torch.dtype | str | None, trains: str) -> LoadOptions:
    """Check the arguments that all ranks must give alike. Raises ConfigError."""
    dtype = DTYPES_OF_MODEL.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES_OF_MODEL.values()):
        raise ConfigError(
            f"{_WHERE}: dtype = {one_line(dtype)}: must be torch.float32, torch.bfloat16 or None, the checkpoint's"
        )
    if trains not in TRAINS:
        raise ConfigError(f"{_WHERE}: trains = {show_value(trains)}: must be one of {', '.join(TRAINS)}")
    return LoadOptions(path=os.fspath(path), dtype=dtype, trains=trains)


def untie_stored(matched: MatchedModel) -> dict[str, str]:
    """Split the parameters that a family ties and a checkpoint has twice -> {name: the one it may be tied to again}."""
    model, made, parted = matched.model, matched.made, {}
    for name, others in matched.tied.items():
        first = min(others & made, default=None)
        if name in made and first is not None and name > first:
            path, _, last = name.rpartition(".")
            parameter = model.get_parameter(name)
            alone = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(path), last, alone)
            parted[name] = first
    return parted


def allocate_dense(model: nn.Module, device: torch.device) -> None:
    """Allocate the tensors of a model that are on the meta device on another, without values, tied ones once."""
    fresh: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, whose id must stay its own
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for own, name, tensor in [(table, *entry) for table in tables for entry in table.items()]:
            if tensor is not None and id(tensor) not in fresh:
                fresh[id(tensor)] = tensor, allocate_like(tensor, device) if tensor.is_meta else tensor
            if tensor is not None:
                own[name] = fresh[id(tensor)][1].to(device)


def allocate_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Allocate a parameter, or a buffer, as another."""
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory


def list_dense_tasks(matched: MatchedModel) -> list[FillTask]:
    """List what fills all but the experts."""
    model = matched.model
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    targets = [{name: tensors[name] for name in recipe.targets} for recipe in matched.dense]
    return [FillTask(recipe=recipe, targets=own) for recipe, own in zip(matched.dense, targets, strict=True)]


def list_expert_tasks(matched: MatchedModel, mesh: Mesh) -> list[FillTask]:
    """List what fills the experts of this rank's slots, or its tensor-parallel shards of them.

    A shard is cut from the whole expert, which is read for it: its rows are shorter than what storage reads at once.
    """
    layers, tasks = list_spread_layers(matched.model), []
    for fused, recipe in matched.experts:
        family, (target,) = layers[fused.path].template[0], recipe.targets
        whole = matched.shapes.tensors[target].shape

        def cut(made: Tensor, family: nn.Module = family, fused: FusedParameter = fused) -> Tensor:
            """Cut this rank's shard out of an expert as the family's model has it."""
            one = made if fused.rows == 1 else made.unflatten(0, (1, fused.rows))
            return cut_shard(family, fused.name, one, mesh.tensor_index, mesh.tensor_parallel)

        for expert, slot in layers[fused.path].list_slots():
            own = dict(layers[fused.path].local.replicas[slot].named_parameters()).get(fused.name)
            if own is not None:  # a bias that another rank of a tensor-parallel group adds
                is_shard = own.numel() < whole.numel()
                memory = own.detach() if is_shard else own.detach().view(whole)
                cuts = cut if is_shard else None
                tasks.append(FillTask(recipe=fused.cut(recipe, expert), targets={target: memory}, cut=cuts))
    return tasks


def estimate_load(
    model: nn.Module, group: LoadGroup, dense: Sequence[FillTask], experts: Sequence[FillTask]
) -> LoadEstimate:
    """Add up what is to be read and kept on this rank and on its node. Collective over the group."""
    world, node_of_rank = group.mesh.world, group.topology.node_of_rank
    peers = group.topology.ranks_of_node(node_of_rank[world.rank]).tolist()
    expert_read = sum(task.num_bytes for task in experts)
    dense_read = sum(task.num_bytes for task in dense[peers.index(world.rank) :: len(peers)])
    kept = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    of_rank = gather_to_all(world, (expert_read + dense_read, kept))
    return LoadEstimate(
        expert_read=expert_read,
        dense_read=dense_read,
        kept=kept,
        passing=max((task.passing_bytes for task in [*dense, *experts]), default=0),
        node_read=sum(of_rank[peer][0] for peer in peers),
        node_kept=sum(of_rank[peer][1] for peer in peers),
    )


def check_node_memory(folder: str, group: LoadGroup, estimate: LoadEstimate) -> None:
    """Raise PlacementError where the weights do not fit the memory of a node. Collective over the group."""
    topology, world = group.topology, group.mesh.world
    node = int(topology.node_of_rank[world.rank])

    def check() -> None:
        """Check on this rank."""
        has, ranks = int(topology.memory_bytes[node]), len(topology.ranks_of_node(node))
        if group.device.torch_device.type == "cpu" and estimate.node_kept > has:
            raise PlacementError(
                f"{one_line(folder)}: the weights of the {ranks} ranks of {topology.node_names[node]} take "
                f"{format_size(estimate.node_kept)}, {format_size(estimate.kept)} of them this one's; it has "
                f"{format_size(has)}"
            )

    on_all(world, check)


def log_estimate(stored: StoredModel, group: LoadGroup, estimate: LoadEstimate) -> None:
    """Log what is to be read and kept, before it begins."""
    if group.mesh.world.rank == 0:
        read, kept = format_size(estimate.read), format_size(estimate.kept)
        passing = f", {format_size(estimate.passing)} while numbers are converted" if estimate.passing else ""
        log.info(
            "%s: %s: rank 0 reads %s and keeps %s%s; its node reads %s and keeps %s", stored.folder,
            stored.config["model_type"], read, kept, passing, format_size(estimate.node_read),
            format_size(estimate.node_kept),
        )  # fmt: skip
