"""The feed-forward networks of this rank's replicas: their forward and backward, over products one by one or grouped.

Under tensor parallelism the first matrix is split by columns and the second by rows over the group, so that each rank
computes a partial sum of the output (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Each goes to the token's home,
which adds them up with the K results: the reduce-scatter of the group is part of combine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.experts.products import GroupedMatrix, Groups, Matrix, StackedMatrix
from hpcmoe.experts.shapes import MATRICES, ExpertShape, split_axis, weight_shape
from hpcmoe.gemm import WeightMatrix, activate

Slots = Sequence[tuple[int, int]]  # (slot, rows) of each slot that has rows, in the order of the rows
Matrices = Mapping[str, Matrix]  # by name: gate, up, down
Kept = tuple[Tensor, ...]  # what one forward pass leaves for backward: x, and what goes into the activation


@torch.no_grad()
def forward(kind: str, matrices: Matrices, x: Tensor, kept: list[Kept] | None = None) -> Tensor:
    """Compute y = W_down act(W_up x), or W_down (silu(W_gate x) * W_up x) when gated: x [n, H] -> y [n, H], n >= 1.

    What backward() needs is appended to kept, None in inference: n * (H + F) numbers, n * (H + 2 F) when gated. y has
    x's precision and is a partial sum under tensor parallelism. Gated: Shazeer 2020, arXiv:2002.05202.
    """
    if kept is not None:  # what goes into the activation is wanted before it
        inner = tuple(matrices[name].linear(x) for name in MATRICES[kind] if name != "down")
        kept.append((x, *inner))
        hidden = apply_activation(kind, inner)
    elif kind == "swiglu":
        hidden = matrices["gate"].linear(x, "silu").mul_(matrices["up"].linear(x))
    else:
        hidden = matrices["up"].linear(x, kind)
    return matrices["down"].linear(hidden)


@torch.no_grad()
def backward(kind: str, matrices: Matrices, kept: Kept, grad_y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients from grad_y [n, H], that of the output to which y came as gate * y, and gates [n] float32.

    -> (grad_x [n, H] in grad_y's precision, grad_gate [n] float32), both partial sums under tensor parallelism. Adds to
    the parameters' gradients. grad_gate = grad_y . y = (grad_y W_down) . hidden + grad_y . down_bias.
    """
    # Propagate to the hidden numbers and the gate.
    x, *inner = kept
    hidden, grad_hidden = apply_activation(kind, inner), matrices["down"].multiply_back(grad_y)
    grad_gate = (grad_hidden * hidden).sum(dim=1).float()  # adds in float32, rounds the sum
    matrices["down"].add_bias_product(grad_gate, grad_y)

    # Propagate to the weights and the input: from here on gradients are times the gate.
    gates = gates.to(grad_y.dtype)[:, None]
    matrices["down"].add_gradients(grad_y * gates, hidden)
    grad_x: Tensor | None = None
    for name, grad_inner in activation_backward(kind, inner, grad_hidden.mul_(gates)).items():
        matrices[name].add_gradients(grad_inner, x)
        part = matrices[name].multiply_back(grad_inner)
        grad_x = part if grad_x is None else grad_x.add_(part)
    assert grad_x is not None  # every kind has a matrix besides down
    return grad_x, grad_gate


def apply_activation(kind: str, inner: Sequence[Tensor]) -> Tensor:
    """Apply the activation to what goes into it, [n, F] each (gate and up when gated) -> hidden [n, F]."""
    if kind == "swiglu":
        gate, up = inner
        return activate(gate, "silu").mul_(up)
    return activate(inner[0], kind)


def activation_backward(kind: str, inner: Sequence[Tensor], grad_hidden: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of what went into the activation, by weight name, overwriting grad_hidden [n, F]."""
    match kind:
        case "gelu":
            return {"up": torch.ops.aten.gelu_backward(grad_hidden, inner[0])}
        case "relu":
            return {"up": torch.ops.aten.threshold_backward(grad_hidden, inner[0], 0)}
        case "swiglu":
            gate, up = inner
            grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
            return {"gate": grad_gate, "up": grad_hidden.mul_(activate(gate, "silu"))}
        case _:
            raise ValueError(f"unknown kind of expert {kind}")


class Expert(nn.Module):
    """One replica of an expert. Autograd has no part in it: forward() keeps what backward() needs."""

    def __init__(self, kind: str, weights: dict[str, Tensor], packed: bool = False) -> None:
        """weights: up, gate [F, H], down [H, F]; biases up_bias, gate_bias [F], down_bias [H].

        packed: the weights do not change, as in inference: each is packed at its first use. In training that did not
        pay at 2048 rows a step or fewer.
        """
        super().__init__()
        if kind not in MATRICES:
            raise ValueError(f"unknown kind of expert {kind}")
        self.kind = kind
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))
        self.matrices = {
            name: WeightMatrix(getattr(self, name), getattr(self, f"{name}_bias", None), packed)
            for name in MATRICES[kind]
        }

    def forward(self, x: Tensor, kept: list[Kept] | None = None) -> Tensor:
        """Compute x [n, H] -> y [n, H]."""
        return forward(self.kind, self.matrices, x, kept)


class Listeners(list):
    """Callbacks of one object, of which a deep or pickled copy has none."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Listeners, ()


class LocalExperts(nn.Module):
    """The replicas in this rank's slots, worked on one by one; an empty slot is an Identity that no row reaches."""

    def __init__(self, replicas: Sequence[nn.Module]) -> None:
        super().__init__()
        self.replicas = nn.ModuleList(replicas)
        self.awaits_weights = False  # while weights are on their way from other ranks
        self.listeners: list[Callable[[], None]] = Listeners()  # called once a micro-batch's backward() is over

    def forward(self, slots: Slots, rows: Tensor, kept: list[Kept] | None) -> Tensor:
        """Compute rows [m, H] grouped by slot -> results [m, H]; what backward() needs is appended to kept, if any."""
        return concatenate([forward(kind, matrices, own, kept) for kind, matrices, own in self.split(slots, rows)])

    def backward(self, slots: Slots, grads: Tensor, gates: Tensor, kept: list[Kept]) -> tuple[Tensor, Tensor]:
        """Compute from grads [m, H] and gates [m], grouped by slot, the gradients of rows [m, H] and gates [m].

        Each expert takes what it kept from the end of `kept`, whose memory is then free for the next.
        """
        split = self.split(slots, grads, gates)
        parts = [backward(kind, matrices, kept.pop(), *own) for kind, matrices, *own in split]
        grads_x, grads_gate = zip(*parts, strict=True)
        return concatenate(grads_x), concatenate(grads_gate)

    def gradients_added(self) -> None:
        """Call the listeners: all of a micro-batch's rows have added to the parameters' gradients."""
        for listener in self.listeners:
            listener()

    def split(self, slots: Slots, *tensors: Tensor) -> Iterator[tuple]:
        """Yield each slot's kind, matrices and rows of some tensors [m, ...]."""
        for slot, *own in split_rows(slots, *tensors):
            yield self.replicas[slot].kind, self.replicas[slot].matrices, *own

    def stack_weights(self) -> None:
        """Keep each replica's weights where they are: the experts take turns."""

    def refresh(self) -> None:
        """Drop all casts and packed copies of weights: they have changed.

        torch does not always show it: its fused AdamW and writes through .data leave a tensor's version as it was.
        """
        for matrix in self.list_matrices():
            matrix.refresh()

    @property
    def cast_bytes(self) -> int:
        """Return the bytes of the casts and packed copies of all replicas' weights."""
        return sum(matrix.cast_bytes for matrix in self.list_matrices())

    def list_matrices(self) -> Sequence[WeightMatrix | StackedMatrix]:
        """List what keeps casts of the replicas' weights."""
        return [matrix for replica in self.local_replicas() for matrix in replica.matrices.values()]

    def local_replicas(self) -> list[Expert]:
        """Return the replicas that are there, in the order of their slots."""
        return [replica for replica in self.replicas if isinstance(replica, Expert)]


class GroupedExperts(LocalExperts):
    """The replicas in this rank's slots, worked on at once: their weights are stacked."""

    stacked: dict[str, StackedMatrix]  # by name

    def split(self, slots: Slots, *tensors: Tensor) -> Iterator[tuple]:
        """Yield the experts' kind, the matrices of all, and the tensors [R, ...] as they are."""
        rows_of_slot, replicas = dict(slots), self.local_replicas()
        rows = [rows_of_slot.get(slot, 0) for slot, e in enumerate(self.replicas) if isinstance(e, Expert)]
        groups = Groups(rows, tensors[0].device)
        yield replicas[0].kind, {name: GroupedMatrix(own, groups) for name, own in self.stacked.items()}, *tensors

    def stack_weights(self) -> None:
        """Copy each weight of all replicas into one array, of which their parameters become views."""
        replicas = self.local_replicas()
        self.stacked = {}
        for name in replicas[0].matrices if replicas else ():
            own = [replica.matrices[name] for replica in replicas]
            biases = [matrix.bias for matrix in own if matrix.bias is not None]
            self.stacked[name] = StackedMatrix([matrix.parameter for matrix in own], biases)

    def list_matrices(self) -> Sequence[StackedMatrix]:
        """List the stacked matrices."""
        return list(self.stacked.values())


def split_rows(slots: Slots, *tensors: Tensor) -> Iterator[tuple]:
    """Yield each slot and its rows of some tensors [m, ...]; the last slot takes any padding."""
    counts = [rows for _, rows in slots[:-1]]
    parts = [tensor.split([*counts, len(tensor) - sum(counts)]) for tensor in tensors]
    for (slot, _), *own in zip(slots, *parts, strict=True):
        yield slot, *own


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along their rows; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def make_expert_weights(
    shape: ExpertShape, seeds: tuple[int, int, int], tensor_index: int, tensor_size: int
) -> dict[str, Tensor]:
    """Draw a logical expert's weights, the same on whichever rank it lives -> dict name: this rank's shard.

    seeds: those of the run, the layer and the expert. A matrix [out, in] has standard deviation in ** -0.5.
    """
    (seed,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed))
    shards = {}
    for name in MATRICES[shape.kind]:
        rows, columns = weight_shape(shape, name)
        whole = torch.randn(rows, columns, generator=generator) * columns**-0.5
        shards[name] = whole.chunk(tensor_size, dim=split_axis(name))[tensor_index].contiguous()
    return _add_biases(shards, shape, tensor_index)


def make_empty_weights(shape: ExpertShape, tensor_index: int, tensor_size: int) -> dict[str, Tensor]:
    """Allocate a shard of an expert whose weights are to come from another rank -> dict name: tensor."""
    inner = shape.feed_forward // tensor_size
    shards = {name: torch.empty(weight_shape(shape, name, inner)) for name in MATRICES[shape.kind]}
    return _add_biases(shards, shape, tensor_index)


def _add_biases(shards: dict[str, Tensor], shape: ExpertShape, tensor_index: int) -> dict[str, Tensor]:
    """Add biases of zero to a shard's matrices, if experts have any."""
    if shape.bias:
        shards |= {f"{name}_bias": torch.zeros(len(matrix)) for name, matrix in shards.items() if name != "down"}
        if tensor_index == 0:  # added once, to the first rank's partial sum
            shards["down_bias"] = torch.zeros(shape.hidden)
    return shards
