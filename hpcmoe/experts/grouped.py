"""The experts of a rank worked on at once, as GPUs want it: each product is a grouped GEMM over rows sorted by expert.

The experts take turns where torch has no grouped GEMM for a precision or a GPU, where one is alone, and where a single
product is so long that the host is sure to start the next meanwhile: torch's other GEMM minds uneven rows less.
"""

import functools

import numpy as np
import torch
from torch.nn import functional

from hpcmoe.comm.cuda import has_grouped_gemm
from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.experts.layer import MoELayer
from hpcmoe.experts.shapes import MATRICES
from hpcmoe.gemm import CudaGemm, ensure_grad

_GEMM_ALIGNMENT_BYTES = 16  # where grouped GEMMs want each row to begin
LONG_PRODUCT = 2**37  # multiplications that keep an H200 busy for 0.4 ms: a host that starts them is far ahead
LARGE_MATRIX = 2**28  # numbers that it takes 0.1 ms to read, however few the rows


class Groups:
    """How rows are shared by the experts that are held, in their order."""

    def __init__(self, rows, torch_device):
        """rows: list [e] of each."""
        self.rows, self.torch_device = rows, torch_device

    @functools.cached_property
    def ends(self):
        """Where the rows of each end, on the device, for grouped GEMMs alone. [e] int32"""
        ends = torch.from_numpy(np.cumsum(self.rows, dtype=np.int32))
        return ends.to(self.torch_device, non_blocking=True)


class GroupedExperts(LocalExperts):
    """The replicas in this rank's slots, their matrices side by side."""

    def __init__(self, replicas):
        super().__init__(replicas)
        self.joined, self.casts = {}, {}  # name: [e, out, in]; (name, dtype): the same in that precision

    def stack_weights(self):
        """Lay each matrix of all replicas into one array, of which their parameters become parts."""
        held = self.local_replicas()
        self.joined = {}
        self.refresh()
        for name in MATRICES[held[0].kind] if held else ():
            self.joined[name] = torch.stack([getattr(replica, name).data for replica in held])
            for replica, part in zip(held, self.joined[name], strict=True):
                getattr(replica, name).data = part

    def refresh(self):
        """Forget the matrices in other precisions: the weights have changed."""
        self.casts = {}

    @property
    def cast_bytes(self):
        """Bytes of the matrices in other precisions."""
        return sum(cast.nbytes for cast in self.casts.values())

    def matrices(self, name, dtype):
        """The matrices of all replicas in a precision -> [e, out, in]."""
        if self.joined[name].dtype == dtype:
            return self.joined[name]
        if (name, dtype) not in self.casts:
            self.casts[name, dtype] = self.joined[name].to(dtype)
        return self.casts[name, dtype]

    def group(self, slots, torch_device):
        """Share rows among the replicas as some slots have them, ((slot, rows), ...) -> Groups."""
        rows_of_slot = dict(slots)
        held = [slot for slot, replica in enumerate(self.replicas) if isinstance(replica, Expert)]
        return Groups([rows_of_slot.get(slot, 0) for slot in held], torch_device)

    @torch.no_grad()
    def forward(self, groups, x, kept):
        """x [R, H] -> y [R, H] in x's precision. What backward() needs is added to `kept`, None in inference."""
        kind = self.local_replicas()[0].kind
        inner = [self.linear(name, groups, x) for name in MATRICES[kind] if name != "down"]
        if kept is None:
            hidden = activate_in_place(inner, kind)
        else:
            kept.append((x, *inner))
            hidden = self.local_replicas()[0].work(inner)
        return self.linear("down", groups, hidden)

    @torch.no_grad()
    def backward(self, groups, kept, grad_y, gates):
        """Go back from grad_y [R, H] and gates [R], as Expert.backward() -> (grad_x [R, H], grad_gate [R] float32)."""
        x, *inner = kept
        any_replica = self.local_replicas()[0]
        hidden, grad_hidden = (
            any_replica.work(inner),
            multiply_grouped(grad_y, self.matrices("down", grad_y.dtype), groups),
        )
        grad_gate = (grad_hidden * hidden).sum(dim=1).float()
        for bias, own, result in self.each("down_bias", groups, grad_y, grad_gate):
            result += own.float() @ bias.float()

        # From here on gradients are times the gate.
        gates = gates.to(grad_y.dtype)[:, None]
        self.add_gradients("down", groups, grad_y * gates, hidden)
        grad_x = None
        for name, grad_inner in any_replica.work_back(inner, grad_hidden.mul_(gates)).items():
            self.add_gradients(name, groups, grad_inner, x)
            part = multiply_grouped(grad_inner, self.matrices(name, grad_y.dtype), groups)
            grad_x = part if grad_x is None else grad_x.add_(part)
        return grad_x, grad_gate

    def linear(self, name, groups, x):
        """Multiply each expert's rows by its matrix, with its bias."""
        y = multiply_grouped(x, self.matrices(name, x.dtype).transpose(1, 2), groups)
        for bias, own in self.each(f"{name}_bias", groups, y):
            own += bias.to(y.dtype)
        return y

    def add_gradients(self, name, groups, grad_y, x):
        """Add to the gradients of every replica's matrix and bias."""
        for parameter, own, inputs in self.each(name, groups, grad_y, x):
            CudaGemm().add_product(ensure_grad(parameter), own, inputs)
        for bias, own in self.each(f"{name}_bias", groups, grad_y):
            ensure_grad(bias).add_(own.sum(dim=0, dtype=torch.float32))

    def each(self, name, groups, *tensors):
        """Yield a parameter of each replica that has it and rows, and its rows of some tensors."""
        held = self.local_replicas()
        if not any(hasattr(replica, name) for replica in held):
            return
        parts = zip(*(tensor.split(groups.rows) for tensor in tensors), strict=True)
        for replica, own in zip(held, parts, strict=True):
            if hasattr(replica, name) and len(own[0]):
                yield getattr(replica, name), *own


class GroupedLayer(MoELayer):
    """A layer whose experts are worked on at once."""

    def work(self, slots, rows, kept):
        """Let the experts in some slots work on rows [m, H] grouped by slot -> results [m, H], or this shard's part."""
        return self.experts(self.experts.group(slots, rows.device), rows, kept)

    def work_back(self, slots, grads, gates, kept):
        """Go back through the experts in some slots, grads [m, H] and gates [m] grouped by slot -> both gradients."""
        return self.experts.backward(self.experts.group(slots, grads.device), kept.pop(), grads, gates)


def multiply_grouped(x, weights, groups):
    """Each expert's rows by its own matrix: x [R, in] by expert, weights [e, in, out] -> [R, out]."""
    if can_group(x, weights) and not is_long(x, weights):
        return find_grouped_gemm()(x, weights, offs=groups.ends)
    y = x.new_empty(len(x), weights.shape[2])
    for own, weight, result in zip(x.split(groups.rows), weights, y.split(groups.rows), strict=True):
        if len(own):
            torch.mm(own, weight, out=result)
    return y


def can_group(x, weights):
    """Whether torch has a grouped GEMM for these: of several experts, in bfloat16, with rows that are aligned."""
    aligned = all(size * x.element_size() % _GEMM_ALIGNMENT_BYTES == 0 for size in weights.shape[1:])
    fits = len(weights) > 1 and x.dtype == torch.bfloat16 and aligned
    return fits and has_grouped_gemm(x.device) and find_grouped_gemm() is not None


def is_long(x, weights):
    """Whether one expert's product lasts until the host has started the next, at an even share of the rows."""
    numbers = weights[0].numel()
    return numbers >= LARGE_MATRIX or len(x) * numbers >= LONG_PRODUCT * len(weights)


def find_grouped_gemm():
    """Find torch's grouped GEMM, whose name has changed -> it, or None."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def activate_in_place(inner, kind):
    """Apply the activation to what goes into it, [R, F] each, which nobody needs afterwards -> hidden [R, F]."""
    match kind:
        case "swiglu":
            gate, up = inner
            return functional.silu(gate, inplace=True).mul_(up)
        case "relu":
            return inner[0].relu_()
        case "gelu":
            return torch.ops.aten.gelu_(inner[0])
        case _:
            raise ValueError(f"unknown activation {kind}")
