"""transformers' own expert parallelism with its rows carried by a group: DistributedConfig(ep_implementation="hpcmoe").

transformers shards the parameters, by FSDP2 over torch.distributed, and reads and saves them; the tokens of each layer
go to their experts and back over MPI. The experts are its own: contiguous on the ranks of a group, none held twice.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcmoe.errors import ConfigError, on_all
from hpcmoe.experts.moe import LayerGroup
from hpcmoe.experts.own import Dispatcher
from hpcmoe.model.hf.adapters import SPREAD_NAME
from hpcmoe.model.hf.spread import check_version, find_top_k

_WHERE = "hpcmoe.hf.register"


def register(group: LayerGroup) -> None:
    """Register ep_implementation="hpcmoe" in transformers: experts of models that are loaded from now on use the group.

        hpcmoe.hf.register(group)
        sizes = {"fsdp_size": group.size, "ep_size": group.mesh.expert_parallel}
        config = DistributedConfig(**sizes, ep_implementation="hpcmoe")
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)

    torch.distributed must number the ranks as the group does. from_pretrained, forward and backward are collective over
    the group, with at most its max_tokens tokens of a rank; gradients are those that transformers' own implementation
    gives. Not collective. Raises ConfigError where transformers has no such registry.
    """
    check_version(_WHERE)
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        raise ConfigError(f"{_WHERE}: needs transformers >= 5.24, hpcmoe.hf.spread does not") from None
    EPImplementationInterface.register(SPREAD_NAME, functools.partial(DispatchedExperts, group))


class DispatchedExperts:
    """One layer's experts, of transformers' making, reached through a dispatcher: an EPImplementation."""

    def __init__(self, group: LayerGroup, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        """Open what carries the rows of a fused experts module. Collective over the group; raises on all ranks.

        ep_mesh, tp_mesh: torch's meshes of the ranks that share the experts, and of those that share a batch.
        """
        self.experts_forward = experts.forward  # on local numbers of experts
        down = experts.get_parameter("down_proj")
        on_all(group.mesh.world, lambda: check_meshes(group, ep_mesh, tp_mesh))
        hidden, top_k = down.shape[-1 if experts.is_transposed else -2], find_top_k(experts)
        arguments = {"top_k": top_k, "dtype": down.dtype, "placement": np.arange(len(down))}
        with torch.device("cpu"):  # transformers may be building on no device
            self.dispatcher = Dispatcher(hidden, len(down), group=group, **arguments)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the gated sum of each token's experts: [T, H], [T, K], [T, K] -> [T, H]. Collective."""
        rows, counts, handle = self.dispatcher.dispatch(hidden_states, top_k_index, top_k_weights)
        number = torch.arange(len(counts)).repeat_interleave(counts)[:, None].to(rows.device)
        return self.dispatcher.combine(self.compute(rows.to(hidden_states.dtype), number).to(rows.dtype), handle)

    def compute(self, rows: Tensor, number: Tensor) -> Tensor:
        """Compute rows [R, H] by the local experts with these numbers [R, 1]; with none, FSDP's sums want a graph."""
        if len(rows) == 0:
            return self.experts_forward(rows.sum(0, keepdim=True), number.new_zeros(1, 1), rows.new_ones(1, 1))[:0]
        return self.experts_forward(rows, number, rows.new_ones(len(rows), 1))


def check_meshes(group: LayerGroup, ep_mesh: Any, tp_mesh: Any) -> None:
    """Raise ConfigError where torch's meshes are not those of the group."""
    from torch.distributed import get_process_group_ranks, get_rank, get_world_size

    mesh = group.mesh
    if (get_rank(), get_world_size()) != (mesh.world.rank, mesh.world.size):
        found = f"rank {get_rank()} of {get_world_size()}"
        raise ConfigError(f"{_WHERE}: {found} in torch.distributed, rank {mesh.world.rank} of {mesh.world.size} here")
    if tp_mesh.size() > 1 or mesh.tensor_parallel > 1:
        sizes = f"tp_size = {tp_mesh.size()}, the group's tensor_parallel = {mesh.tensor_parallel}"
        raise ConfigError(f"{_WHERE}: {sizes}: both must be 1: each rank has a batch of its own")
    if (ranks := get_process_group_ranks(ep_mesh.get_group())) != mesh.ep_ranks:
        raise ConfigError(f"{_WHERE}: ep_size: experts are shared by ranks {ranks}, in the group by {mesh.ep_ranks}")
