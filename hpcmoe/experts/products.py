"""Matrix products of rows with experts' weights: one expert at a time on a host, all of a rank at once on a GPU.

A GPU's product is a grouped GEMM over rows sorted by expert. The experts take turns where torch has no grouped GEMM for
a precision or a GPU, where one is alone, and where a single product is so long that the host is sure to start the next
meanwhile: torch's other GEMM is less sensitive to uneven numbers of rows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter, functional

from hpcmoe.comm.cuda import has_grouped_gemm
from hpcmoe.gemm import TorchGemm, WeightMatrix, activate, ensure_grad

LONG_PRODUCT = 2**37  # multiplications that keep an H200 busy for 0.4 ms: a host that starts them is far ahead
LARGE_MATRIX = 2**28  # numbers that it takes 0.1 ms to read, however few the rows
_GEMM_ALIGNMENT_BYTES = 16  # where grouped GEMMs want each row to begin


class Groups:
    """How rows [R, ...], sorted by expert, are shared among several experts."""

    def __init__(self, rows: list[int], torch_device: torch.device) -> None:
        """rows [e]: how many belong to each expert."""
        self.rows, self.torch_device = rows, torch_device

    @functools.cached_property
    def ends(self) -> Tensor:
        """Return where the rows of each expert end, on the device, for grouped GEMMs alone: [e] int32."""
        ends = torch.from_numpy(np.cumsum(self.rows, dtype=np.int32))
        return ends.to(self.torch_device, non_blocking=True)


class StackedMatrix:
    """A matrix [out, in] of each of several experts, side by side for grouped products, and their biases."""

    def __init__(self, weights: list[Parameter], biases: list[Parameter]) -> None:
        """Copy the weights into one array, of which they become views; biases [out] are of each expert, or none."""
        self.weights, self.biases = weights, biases
        self.array = torch.stack([weight.data for weight in weights])  # [e, out, in]
        for weight, view in zip(weights, self.array, strict=True):
            weight.data = view
        self.casts: dict[torch.dtype, Tensor] = {}

    def cast(self, dtype: torch.dtype) -> Tensor:
        """Return the weights in a precision, [e, out, in]; a cast is kept until refresh()."""
        if self.array.dtype == dtype:
            return self.array
        if dtype not in self.casts:
            self.casts[dtype] = self.array.to(dtype)
        return self.casts[dtype]

    def refresh(self) -> None:
        """Drop the casts: the weights have changed."""
        self.casts.clear()

    @property
    def cast_bytes(self) -> int:
        """Return the bytes of the casts."""
        return sum(cast.nbytes for cast in self.casts.values())


class GroupedMatrix:
    """The products of a StackedMatrix with rows sorted by expert: each has its own weight; as a WeightMatrix's."""

    def __init__(self, stacked: StackedMatrix, groups: Groups) -> None:
        self.stacked, self.groups = stacked, groups

    def linear(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return activation(x W^T + bias), [R, out]."""
        y = multiply_grouped(x, self.stacked.cast(x.dtype).transpose(1, 2), self.groups)
        for bias, own in self.each(self.stacked.biases, y):
            own += bias.to(y.dtype)
        return activate(y, activation, in_place=True)

    def multiply_back(self, grad_y: Tensor) -> Tensor:
        """Return grad_y W, [R, in]."""
        return multiply_grouped(grad_y, self.stacked.cast(grad_y.dtype), self.groups)

    def add_gradients(self, grad_y: Tensor, x: Tensor) -> None:
        """Add to the gradients of every expert's weight and bias that is not frozen."""
        for weight, own, inputs in self.each(self.stacked.weights, grad_y, x):
            if weight.requires_grad:
                TorchGemm().add_product(ensure_grad(weight), own, inputs)
        for bias, own in self.each(self.stacked.biases, grad_y):
            if bias.requires_grad:
                ensure_grad(bias).add_(own.sum(dim=0, dtype=torch.float32))

    def add_bias_product(self, total: Tensor, grad_y: Tensor) -> None:
        """Add grad_y . bias to total [R] float32."""
        for bias, own, result in self.each(self.stacked.biases, grad_y, total):
            result += own.float() @ bias.float()

    def each(self, parameters: list[Parameter], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield the parameter of each expert that has rows, and its rows of some tensors; nothing of no parameters."""
        parts = zip(*(tensor.split(self.groups.rows) for tensor in tensors if parameters), strict=True)
        for parameter, own in zip(parameters, parts, strict=True):
            if len(own[0]):
                yield parameter, *own


Matrix = WeightMatrix | GroupedMatrix


def multiply_grouped(x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Multiply each expert's rows by its own weight: x [R, in] sorted by expert, weights [e, in, out] -> [R, out]."""
    grouped_gemm = find_grouped_gemm() if can_group(x, weights) and not is_long(x, weights) else None
    if grouped_gemm is not None:
        return grouped_gemm(x, weights, offs=groups.ends)
    y = x.new_empty(len(x), weights.shape[2])
    for own, weight, result in zip(x.split(groups.rows), weights, y.split(groups.rows), strict=True):
        if len(own):
            torch.mm(own, weight, out=result)
    return y


def can_group(x: Tensor, weights: Tensor) -> bool:
    """Return True if torch has a grouped GEMM for these: of several experts, in bfloat16, with aligned rows."""
    aligned = all(size * x.element_size() % _GEMM_ALIGNMENT_BYTES == 0 for size in weights.shape[1:])
    fits = len(weights) > 1 and x.dtype == torch.bfloat16 and aligned
    return fits and has_grouped_gemm(x.device)


def is_long(x: Tensor, weights: Tensor) -> bool:
    """Return True if one expert's product, at an even share of the rows, lasts until the host has started the next."""
    numbers = weights[0].numel()
    return numbers >= LARGE_MATRIX or len(x) * numbers >= LONG_PRODUCT * len(weights)


def find_grouped_gemm() -> Callable[..., Tensor] | None:
    """Return torch's grouped GEMM, whose name has changed, or None."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
