"""The feed-forward networks of this rank's replicas: one GEMM pair (or three) an expert.

Under tensor parallelism the first matrix is split by columns and the second by rows over the group, so that each rank
computes a partial sum of the output (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.mpi import all_reduce
from hpcmoe.experts.shapes import MATRICES, split_axis, weight_shape


class Expert(nn.Module):
    """One replica: y = W_down act(W_up x), or y = W_down (silu(W_gate x) * W_up x) when gated (Shazeer 2020,
    arXiv:2002.05202)."""

    def __init__(self, kind, weights):
        """weights: dict name: tensor; up, gate [F, H], down [H, F]; biases up_bias, gate_bias [F], down_bias [H]."""
        super().__init__()
        self.kind = kind
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x):
        """x [n, H] -> y [n, H] in x's precision, n at least 1; a partial sum under tensor parallelism."""
        return self.in_batches(x, len(x))[0]

    def in_batches(self, x, max_rows):
        """The same with at most max_rows rows a GEMM -> list of outputs."""
        weights = {name: parameter.to(x.dtype) for name, parameter in self.named_parameters()}  # cast once for all
        return [self.work(batch, weights) for batch in x.split(max_rows)]

    def work(self, x, weights):
        """One batch through the network."""

        def linear(x, name):
            return nn.functional.linear(x, weights[name], weights.get(f"{name}_bias"))

        hidden = linear(x, "up")
        match self.kind:
            case "gelu":
                hidden = nn.functional.gelu(hidden)
            case "relu":
                hidden = nn.functional.relu(hidden)
            case "swiglu":
                hidden = nn.functional.silu(linear(x, "gate")) * hidden
            case _:
                raise ValueError(f"unknown kind of expert {self.kind}")
        return linear(hidden, "down")


class LocalExperts(nn.Module):
    """The replicas in this rank's slots, an empty slot being an Identity that no row ever reaches."""

    def __init__(self, replicas, tensor_comm, max_batch_rows):
        super().__init__()
        self.replicas = nn.ModuleList(replicas)
        self.tensor_comm = tensor_comm
        self.max_batch_rows = max_batch_rows

    def forward(self, x, rows_of_slot):
        """Work on rows grouped by slot, x [n, H] and rows_of_slot [s] -> y [n, H].

        B_e = min(T_e, B_max): a GEMM takes at most max_batch_rows rows, so that its scratch memory stays bounded.
        """
        pieces = []
        for replica, rows in zip(self.replicas, x.split(rows_of_slot.tolist()), strict=True):
            if len(rows):
                pieces.extend(replica.in_batches(rows, self.max_batch_rows))
        return torch.cat(pieces)

    def sum_over_shards(self, rows):
        """Add up the partial sums of the tensor-parallel group, rows [n, H] -> [n, H]. Collective over tp."""
        if self.tensor_comm.size == 1:
            return rows
        total = rows.float().cpu().numpy(force=True).copy()
        return torch.from_numpy(all_reduce(self.tensor_comm, total)).to(rows)


def make_expert_weights(config, layer, expert, tensor_index, tensor_size):
    """Draw a logical expert's weights, the same on whichever rank it lives -> dict name: this rank's shard."""
    model, kind = config.model, config.experts.kind
    (seed,) = np.random.SeedSequence([config.run.seed, layer, expert]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed))
    shards = {}
    for name in MATRICES[kind]:
        rows, columns = weight_shape(model, name)
        whole = torch.randn(rows, columns, generator=generator) * columns**-0.5
        shards[name] = whole.chunk(tensor_size, dim=split_axis(name))[tensor_index].contiguous()
    if config.experts.bias:
        shards |= {f"{name}_bias": torch.zeros(len(shards[name])) for name in MATRICES[kind] if name != "down"}
        if tensor_index == 0:  # added once, to the first rank's partial sum
            shards["down_bias"] = torch.zeros(model.hidden)
    return shards
