"""The feed-forward networks of this rank's replicas: one GEMM pair (or three) an expert, and the way back by hand.

Under tensor parallelism the first matrix is split by columns and the second by rows over the group, so that each rank
computes a partial sum of the output (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Each goes to the token's home,
which adds them up with the K results: the reduce-scatter of the group is part of combine.
"""

import numpy as np
import torch
from torch import nn

from hpcmoe.experts.shapes import MATRICES, split_axis, weight_shape
from hpcmoe.gemm import WeightMatrix, activate, activate_back, ensure_grad


class Expert(nn.Module):
    """One replica: y = W_down act(W_up x), or y = W_down (silu(W_gate x) * W_up x) when gated (Shazeer 2020,
    arXiv:2002.05202).

    Autograd has no part in it: forward_kept() hands out what backward() asks for.
    """

    def __init__(self, kind, weights, packed=False):
        """weights: dict name: tensor; up, gate [F, H], down [H, F]; biases up_bias, gate_bias [F], down_bias [H].

        packed: the weights rest, as in inference: each is packed at its first use. In training it was not worth it
        at 2048 rows a step or fewer.
        """
        super().__init__()
        if kind not in MATRICES:
            raise ValueError(f"unknown kind of expert {kind}")
        self.kind = kind
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))
        self.matrices = {name: WeightMatrix(getattr(self, name), packed) for name in MATRICES[kind]}
        self.biases = {}  # (name, dtype): in that precision

    @torch.no_grad()
    def forward(self, x):
        """x [n, H] -> y [n, H] in x's precision, n at least 1; a partial sum under tensor parallelism."""
        if self.kind == "swiglu":
            hidden = self.linear("gate", x, "silu").mul_(self.linear("up", x))
        else:
            hidden = self.linear("up", x, self.kind)
        return self.linear("down", hidden)

    @torch.no_grad()
    def forward_kept(self, x):
        """The same -> (y, kept): x and what went into the activation, all that backward() needs. n * (H + F) numbers,
        n * (H + 2 F) when gated."""
        inner = tuple(self.linear(name, x) for name in MATRICES[self.kind] if name != "down")
        return self.linear("down", self.work(inner)), (x, *inner)

    @torch.no_grad()
    def backward(self, kept, grad_y, gates):
        """Go back from grad_y [n, H], the gradient of the output to which y came as gate * y, gates [n] float32
        -> (grad_x [n, H] in grad_y's precision, grad_gate [n] float32).

        Adds to the parameters' gradients. grad_gate = grad_y . y = (grad_y W_down) . hidden + grad_y . down_bias, and
        like grad_x a partial sum under tensor parallelism.
        """
        x, *inner = kept
        hidden, grad_hidden = self.work(inner), self.matrices["down"].back(grad_y)
        grad_gate = (grad_hidden * hidden).sum(dim=1).float()  # adds in float32, rounds the sum
        if hasattr(self, "down_bias"):
            grad_gate += grad_y.float() @ self.down_bias.float()

        # From here on gradients are times the gate.
        gates = gates.to(grad_y.dtype)[:, None]
        self.add_gradients("down", grad_y * gates, hidden)
        grads_inner = self.work_back(inner, grad_hidden.mul_(gates))
        grad_x = None
        for name, grad_inner in grads_inner.items():
            self.add_gradients(name, grad_inner, x)
            part = self.matrices[name].back(grad_inner)
            grad_x = part if grad_x is None else grad_x.add_(part)
        return grad_x, grad_gate

    def work(self, inner):
        """Apply the activation to what went into it, [n, F] each -> hidden [n, F]."""
        if self.kind == "swiglu":
            gate, up = inner
            return activate(gate, "silu").mul_(up)
        return activate(inner[0], self.kind)

    def work_back(self, inner, grad_y):
        """Go back through the activation from grad_y [n, F] of hidden -> dict name: gradient [n, F] of its product."""
        if self.kind == "swiglu":
            gate, up = inner
            return {"gate": activate_back(grad_y * up, gate, "silu"), "up": grad_y.mul_(activate(gate, "silu"))}
        return {"up": activate_back(grad_y, inner[0], self.kind)}

    def linear(self, name, x, activation="none"):
        """Multiply by a matrix of this expert, with its bias."""
        bias, key = getattr(self, f"{name}_bias", None), (name, x.dtype)
        if bias is not None and key not in self.biases:
            self.biases[key] = bias.detach().to(x.dtype)
        return self.matrices[name].linear(x, self.biases.get(key), activation)

    def add_gradients(self, name, grad_y, x):
        """Add to the gradients of a matrix and its bias."""
        self.matrices[name].add_gradient(grad_y, x)
        if hasattr(self, f"{name}_bias"):
            ensure_grad(getattr(self, f"{name}_bias")).add_(grad_y.sum(dim=0, dtype=torch.float32))

    def refresh(self):
        """Make copies of the weights anew at the next use: they have changed.

        torch does not always tell: its fused AdamW and writes through .data leave a tensor's version as it was.
        """
        self.biases = {}
        for matrix in self.matrices.values():
            matrix.refresh()

    @property
    def cast_bytes(self):
        """Bytes of the copies, cast and packed, of the matrices."""
        return sum(matrix.cast_bytes for matrix in self.matrices.values())


class LocalExperts(nn.Module):
    """The replicas in this rank's slots, an empty slot being an Identity that no row ever reaches."""

    def __init__(self, replicas):
        super().__init__()
        self.replicas = nn.ModuleList(replicas)
        self.awaits_weights = False  # while weights are on their way from other ranks

    def stack_weights(self):
        """Leave each replica's matrices where they are: the experts take turns."""

    def refresh(self):
        """Tell all replicas that their weights have changed."""
        for replica in self.local_replicas():
            replica.refresh()

    @property
    def cast_bytes(self):
        """Bytes of the copies of all replicas' matrices."""
        return sum(replica.cast_bytes for replica in self.local_replicas())

    def local_replicas(self):
        """List the replicas that are there."""
        return [replica for replica in self.replicas if isinstance(replica, Expert)]


def make_expert_weights(spec, layer, expert, tensor_index, tensor_size):
    """Draw a logical expert's weights, the same on whichever rank it lives -> dict name: this rank's shard."""
    model, kind = spec.model, spec.experts.kind
    (seed,) = np.random.SeedSequence([spec.seed, layer, expert]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed))
    shards = {}
    for name in MATRICES[kind]:
        rows, columns = weight_shape(model, name)
        whole = torch.randn(rows, columns, generator=generator) * columns**-0.5
        shards[name] = whole.chunk(tensor_size, dim=split_axis(name))[tensor_index].contiguous()
    return add_biases(shards, spec, tensor_index)


def make_empty_weights(spec, tensor_index, tensor_size):
    """Make room for weights that are to come from another rank -> dict name: this rank's shard of whatever is there."""
    shards = {}
    for name in MATRICES[spec.experts.kind]:
        shape = list(weight_shape(spec.model, name))
        shape[split_axis(name)] //= tensor_size
        shards[name] = torch.empty(shape)
    return add_biases(shards, spec, tensor_index)


def add_biases(shards, spec, tensor_index):
    """Add biases of zero to a shard's matrices, if experts have any -> dict name: tensor."""
    if spec.experts.bias:
        shards |= {f"{name}_bias": torch.zeros(len(matrix)) for name, matrix in shards.items() if name != "down"}
        if tensor_index == 0:  # added once, to the first rank's partial sum
            shards["down_bias"] = torch.zeros(spec.model.hidden)
    return shards
