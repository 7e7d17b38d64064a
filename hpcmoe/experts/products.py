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
from hpcmoe.experts.shapes import MATRICES
from hpcmoe.gemm import TorchGemm, WeightMatrix, activate, ensure_grad

LONG_PRODUCT = 2**37  # multiplications that keep an H200 busy for 0.4 ms: a host that starts them is far ahead
LARGE_MATRIX = 2**28  # numbers that it takes 0.1 ms to read, however few the rows
_GEMM_ALIGNMENT_BYTES = 16  # where grouped GEMMs want each row to begin


class ExpertProducts:
    """The products of one expert's rows [n, ...] with its weights and biases by name, by the fastest GEMM."""

    def __init__(self, kind: str, parameters: dict[str, Parameter], packed: bool) -> None:
        """parameters: name: weight [out, in] or bias [out]; packed: weights do not change, as in inference."""
        self.kind = kind
        self.matrices = {
            name: WeightMatrix(parameters[name], parameters.get(f"{name}_bias"), packed) for name in MATRICES[kind]
        }

    def linear(self, name: str, x: Tensor, activation: str = "none") -> Tensor:
        """Return activation(x W^T + b), [n, out]."""
        return self.matrices[name].linear(x, activation)

    def multiply_back(self, name: str, grad_y: Tensor) -> Tensor:
        """Return grad_y W, [n, in]."""
        return self.matrices[name].multiply_back(grad_y)

    def add_gradients(self, name: str, grad_y: Tensor, x: Tensor) -> None:
        """Add grad_y^T x to the weight's gradient, and grad_y's sum over rows to the bias's."""
        self.matrices[name].add_gradients(grad_y, x)

    def add_bias_product(self, total: Tensor, grad_y: Tensor) -> None:
        """Add grad_y . down_bias to total [n]."""
        if (bias := self.matrices["down"].bias) is not None:
            total += grad_y.float() @ bias.float()

    def refresh(self) -> None:
        """Drop the casts of weights that have changed."""
        for matrix in self.matrices.values():
            matrix.refresh()

    @property
    def cast_bytes(self) -> int:
        """Return the bytes of the weights' casts and packed copies."""
        return sum(matrix.cast_bytes for matrix in self.matrices.values())


class StackedWeights:
    """The weights of all experts of a rank, side by side for grouped products."""

    def __init__(self, kind: str, parameters: list[dict[str, Parameter]]) -> None:
        """Stack each weight of the experts into one array, of which their parameters become views."""
        self.kind, self.parameters = kind, parameters
        self.casts: dict[tuple[str, torch.dtype], Tensor] = {}  # [e, out, in] in that precision
        self.arrays: dict[str, Tensor] = {}  # [e, out, in]
        for name in MATRICES[kind] if parameters else ():
            self.arrays[name] = torch.stack([own[name].data for own in parameters])
            for own, view in zip(parameters, self.arrays[name], strict=True):
                own[name].data = view

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the weights of that name in a precision, [e, out, in]; a cast is kept until refresh()."""
        if self.arrays[name].dtype == dtype:
            return self.arrays[name]
        if (name, dtype) not in self.casts:
            self.casts[name, dtype] = self.arrays[name].to(dtype)
        return self.casts[name, dtype]

    def refresh(self) -> None:
        """Drop the casts of weights that have changed."""
        self.casts = {}

    @property
    def cast_bytes(self) -> int:
        """Return the bytes of the casts."""
        return sum(cast.nbytes for cast in self.casts.values())


class GroupedProducts:
    """The products of several experts at once: rows [R, ...] are sorted by expert, each has its own weights."""

    def __init__(self, weights: StackedWeights, rows: list[int], torch_device: torch.device) -> None:
        """rows [e]: how many belong to each expert, in the order of the weights."""
        self.weights, self.kind, self.rows, self.torch_device = weights, weights.kind, rows, torch_device

    @functools.cached_property
    def ends(self) -> Tensor:
        """Return where the rows of each expert end, on the device: [e] int32."""
        ends = torch.from_numpy(np.cumsum(self.rows, dtype=np.int32))
        return ends.to(self.torch_device, non_blocking=True)

    def linear(self, name: str, x: Tensor, activation: str = "none") -> Tensor:
        """Return activation(x W^T + b)."""
        y = multiply_grouped(x, self.weights.cast(name, x.dtype).transpose(1, 2), self)
        for bias, own in self.each(f"{name}_bias", y):
            own += bias.to(y.dtype)
        return activate(y, activation, in_place=True)

    def multiply_back(self, name: str, grad_y: Tensor) -> Tensor:
        """Return grad_y W."""
        return multiply_grouped(grad_y, self.weights.cast(name, grad_y.dtype), self)

    def add_gradients(self, name: str, grad_y: Tensor, x: Tensor) -> None:
        """Add to the gradients of every expert's weight and bias."""
        for weight, own, inputs in self.each(name, grad_y, x):
            TorchGemm().add_product(ensure_grad(weight), own, inputs)
        for bias, own in self.each(f"{name}_bias", grad_y):
            ensure_grad(bias).add_(own.sum(dim=0, dtype=torch.float32))

    def add_bias_product(self, total: Tensor, grad_y: Tensor) -> None:
        """Add grad_y . down_bias to total [R]."""
        for bias, own, result in self.each("down_bias", grad_y, total):
            result += own.float() @ bias.float()

    def each(self, name: str, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield a parameter of each expert that has it and rows, and its rows of some tensors."""
        if not any(name in own for own in self.weights.parameters):
            return
        parts = zip(*(tensor.split(self.rows) for tensor in tensors), strict=True)
        for parameters, own_rows in zip(self.weights.parameters, parts, strict=True):
            if name in parameters and len(own_rows[0]):
                yield parameters[name], *own_rows


Products = ExpertProducts | GroupedProducts


def multiply_grouped(x: Tensor, weights: Tensor, products: GroupedProducts) -> Tensor:
    """Multiply each expert's rows by its own weight: x [R, in] sorted by expert, weights [e, in, out] -> [R, out]."""
    grouped_gemm = find_grouped_gemm() if can_group(x, weights) and not is_long(x, weights) else None
    if grouped_gemm is not None:
        return grouped_gemm(x, weights, offs=products.ends)
    y = x.new_empty(len(x), weights.shape[2])
    for own, weight, result in zip(x.split(products.rows), weights, y.split(products.rows), strict=True):
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
