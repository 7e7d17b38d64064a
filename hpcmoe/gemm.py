"""Matrix products by the fastest library of this processor: oneDNN, MKL through torch, or float32 in bfloat16's place.

With AVX-512 oneDNN's float32 products run at twice the speed of torch.mm on AMD, where MKL keeps to AVX2. Without it
MKL is the faster by a fifth, but for few rows, whose weights oneDNN reads packed; and bfloat16 has no products at all.
oneDNN compiles a kernel for every new shape (0.2 ms, kept for the 1024 shapes last used), so few different numbers of
rows are faster. The choice follows from the processor, never from a timing: the same run has the same last bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

_MAX_GRADIENT_ROWS = 512  # of one product for a gradient; oneDNN slows down beyond
_SMALL_PRODUCT = 2**22  # of numbers; MKL needs no kernel of its own for each new shape
_MAX_PACKED_ROWS = 64  # of a packed product that without AVX-512 oneDNN does faster than MKL
_GRADIENT_PIECE_BYTES = 2**21  # of a product before it is added up
_LARGE_GRADIENT = 2**26  # numbers; with fewer the host takes longer to start a sum in place (120 us) than a GPU gains


class WeightMatrix:
    """A weight [out, in], its bias, and the products with them; casts and packed copies are kept until refresh()."""

    def __init__(self, parameter: Parameter, bias: Parameter | None = None, packed: bool = False) -> None:
        """packed: the weight does not change, as in inference, and is packed for linear()."""
        self.parameter, self.bias, self.packed = parameter, bias, packed
        self.weights: dict[torch.dtype, Tensor] = {}  # in that precision
        self.packs: dict[torch.dtype, Tensor] = {}  # opaque
        self.biases: dict[torch.dtype, Tensor] = {}  # in that precision

    def refresh(self) -> None:
        """Drop the copies: weight and bias have changed."""
        for copies in (self.weights, self.packs, self.biases):
            copies.clear()

    @property
    def cast_bytes(self) -> int:
        """Return the bytes of the copies that are kept."""
        copies = [weight for weight in self.weights.values() if weight.dtype != self.parameter.dtype]
        copies += [pack for dtype, pack in self.packs.items() if pack is not self.weights[dtype]]
        return sum(torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes for copy in copies)

    def linear(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return activation(x W^T + bias): x [n, in] -> [n, out]; activation as in activate()."""
        gemm, weight = self.prepare(x.dtype)
        if self.packed and gemm.wants_packed(len(x)):
            if x.dtype not in self.packs:
                self.packs[x.dtype] = gemm.pack(weight)
            weight = self.packs[x.dtype]
        if self.bias is not None and x.dtype not in self.biases:
            self.biases[x.dtype] = self.bias.detach().to(x.dtype)
        return gemm.linear(x, weight, self.biases.get(x.dtype), activation)

    def multiply_back(self, grad_y: Tensor) -> Tensor:
        """Return grad_y W: grad_y [n, out] -> [n, in]."""
        gemm, weight = self.prepare(grad_y.dtype)
        return gemm.multiply_back(grad_y, weight)

    def add_gradients(self, grad_y: Tensor, x: Tensor) -> None:
        """Add grad_y^T x to the weight's gradient, and grad_y's sum over rows to the bias's; none to a frozen one's."""
        if self.parameter.requires_grad:
            add_gradient(self.prepare(x.dtype)[0], self.parameter, grad_y, x)
        if self.bias is not None and self.bias.requires_grad:
            ensure_grad(self.bias).add_(grad_y.sum(dim=0, dtype=torch.float32))

    def add_bias_product(self, total: Tensor, grad_y: Tensor) -> None:
        """Add grad_y . bias to total [n] float32, where there is a bias."""
        if self.bias is not None:
            total += grad_y.float() @ self.bias.float()

    def prepare(self, dtype: torch.dtype) -> tuple[TorchGemm, Tensor]:
        """Choose the GEMM of this precision, and cast the weight to what it reads -> (gemm, weight [out, in])."""
        gemm = choose_gemm(self.parameter.device.type, dtype)
        if dtype not in self.weights:
            self.weights[dtype] = self.parameter.detach().to(gemm.precision or dtype)
        return gemm, self.weights[dtype]


class TorchGemm:
    """Products that every build and device of torch has. The weights are [out, in]."""

    precision: torch.dtype | None = None  # of the weights; None: that of the rows

    def wants_packed(self, num_rows: int) -> bool:
        """Return True if a product of so many rows is faster with a packed weight."""
        return False

    def pack(self, weight: Tensor) -> Tensor:
        """Reorder a weight as oneDNN's kernels read it -> an opaque tensor."""
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Return activation(x weight^T + bias), [n, out]."""
        return activate(functional.linear(x, weight, bias), activation, in_place=True)

    def multiply_back(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """Return grad_y weight, [n, in]."""
        return torch.mm(grad_y, weight)

    def outer(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """Return grad_y^T x, [out, in]."""
        return torch.mm(grad_y.t(), x)

    def add_product(self, gradient: Tensor, grad_y: Tensor, x: Tensor, is_new: bool = False) -> None:
        """Add grad_y^T x to a gradient [out, in], or make it that; a product in bfloat16 is rounded once, then added.

        A GPU adds to a large gradient as the product is made, without an array beside it.
        """
        if x.dtype == gradient.dtype:
            torch.addmm(gradient, grad_y.t(), x, beta=0 if is_new else 1, out=gradient)  # 0 reads nothing of it
        elif is_new:
            gradient.copy_(self.outer(grad_y, x))
        elif x.is_cuda and adds_in_place(x.dtype, gradient.numel()):
            torch.addmm(gradient, grad_y.t(), x, out_dtype=gradient.dtype, out=gradient)
        else:
            gradient.add_(self.outer(grad_y, x))


class PackedGemm(TorchGemm):
    """Torch's products, but for those of few rows with a packed weight, which oneDNN does: without AVX-512."""

    def __init__(self, max_packed_rows: int = _MAX_PACKED_ROWS) -> None:
        """max_packed_rows: beyond so many torch is the faster."""
        self.max_packed_rows = max_packed_rows

    def wants_packed(self, num_rows: int) -> bool:
        """Return True for few rows."""
        return num_rows <= self.max_packed_rows

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Return activation(x weight^T + bias)."""
        product = multiply_by_onednn if weight.is_mkldnn else super().linear
        return product(x, weight, bias, activation)


class OneDnnGemm(TorchGemm):
    """Products by oneDNN, which fuses bias and activation and prefers a packed weight for any number of rows."""

    def wants_packed(self, num_rows: int) -> bool:
        """Return True."""
        return True

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Return activation(x weight^T + bias)."""
        small = not weight.is_mkldnn and x.dtype == torch.float32 and len(x) * weight.numel() < _SMALL_PRODUCT
        product = super().linear if small else multiply_by_onednn
        return product(x, weight, bias, activation)

    def multiply_back(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """Return grad_y weight."""
        return self.linear(grad_y, weight.t(), None, "none")

    def outer(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """Return grad_y^T x."""
        if len(x) == 0:  # oneDNN knows no product over nothing
            return super().outer(grad_y, x)
        return self.linear(grad_y.t(), x.t(), None, "none")

    def add_product(self, gradient: Tensor, grad_y: Tensor, x: Tensor, is_new: bool = False) -> None:
        """Add grad_y^T x to a gradient, in pieces; a product in bfloat16 is rounded once, then added.

        Pieces, because kernels stay in memory: one made beside a product as large as the weight keeps the heap from
        using that space for the next.
        """
        outer = self.outer if x.dtype == torch.float32 else super().outer  # torch's asks oneDNN in bfloat16
        num_columns = max(1, _GRADIENT_PIECE_BYTES // (x.shape[1] * x.element_size()))
        for grads, rows in zip(grad_y.split(_MAX_GRADIENT_ROWS), x.split(_MAX_GRADIENT_ROWS), strict=True):
            for piece, columns in zip(gradient.split(num_columns), grads.split(num_columns, dim=1), strict=True):
                (piece.copy_ if is_new else piece.add_)(outer(columns, rows))
            is_new = False


class WideGemm(TorchGemm):
    """Products in float32 of rows in a precision without products of its own; results are rounded once."""

    precision = torch.float32

    def __init__(self, gemm: TorchGemm) -> None:
        """gemm: that of float32."""
        self.gemm = gemm

    def wants_packed(self, num_rows: int) -> bool:
        """Return True if the float32 product is faster with a packed weight."""
        return self.gemm.wants_packed(num_rows)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Return activation(x weight^T + bias)."""
        wide = None if bias is None else bias.float()
        return self.gemm.linear(x.float(), _to_float32(weight), wide, activation).to(x.dtype)

    def multiply_back(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """Return grad_y weight."""
        return self.gemm.multiply_back(grad_y.float(), _to_float32(weight)).to(grad_y.dtype)

    def outer(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """Return grad_y^T x."""
        return self.gemm.outer(grad_y.float(), x.float()).to(grad_y.dtype)

    def add_product(self, gradient: Tensor, grad_y: Tensor, x: Tensor, is_new: bool = False) -> None:
        """Add grad_y^T x to a gradient, or make it that."""
        self.gemm.add_product(gradient, grad_y.float(), x.float(), is_new)


def _to_float32(weight: Tensor) -> Tensor:
    """Return the weight in float32 (packed weights already are)."""
    return weight if weight.is_mkldnn else weight.float()


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return activation(x weight^T + bias) by oneDNN; weight [out, in], packed or not."""
    name = "swish" if activation == "silu" else activation
    algorithm = "none" if activation == "gelu" else ""  # gelu without an approximation
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T, differentiable: x [n, in], weight [out, in] -> [n, out]."""
    return _Product.apply(x, weight)


class _Product(torch.autograd.Function):
    """x W^T by the chosen GEMM, and its two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return choose_gemm(weight.device.type, x.dtype).linear(x, weight, None, "none")

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gemm = choose_gemm(weight.device.type, x.dtype)
        grad_y = grad_y.contiguous()
        grad_x = gemm.multiply_back(grad_y, weight) if ctx.needs_input_grad[0] else None
        grad_weight = gemm.outer(grad_y, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


@functools.cache
def choose_gemm(device: str, dtype: torch.dtype) -> TorchGemm:
    """Choose the GEMM for a type of device and a precision, by what this build and processor can do."""
    if device != "cpu":
        return TorchGemm()
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        gemm = OneDnnGemm() if has_avx512 else PackedGemm()
        small = torch.zeros(2, 2, dtype=dtype)
        try:
            gemm.linear(small, gemm.pack(small), None, "gelu")
        except RuntimeError:  # a precision that this processor lacks
            pass
        else:
            return gemm
    return TorchGemm() if dtype == torch.float32 else WideGemm(choose_gemm(device, torch.float32))


def adds_in_place(dtype: torch.dtype, numel: int) -> bool:
    """Return True if a GPU adds products in this precision to a float32 gradient of so many numbers without a copy."""
    return dtype != torch.float32 and numel >= _LARGE_GRADIENT and hasattr(torch.ops.aten.addmm, "dtype_out")


def count_cast_bytes(dtype: torch.dtype, parameter_dtype: torch.dtype, packed: bool) -> int:
    """Count the bytes that a number of a WeightMatrix on the host takes besides its parameter, once multiplied with."""
    gemm = choose_gemm("cpu", dtype)
    read = gemm.precision or dtype
    cast = 0 if read == parameter_dtype else read.itemsize
    return cast + (read.itemsize if packed and gemm.wants_packed(1) else 0)


def activate(x: Tensor, activation: str, in_place: bool = False) -> Tensor:
    """Apply an activation to each number: "none", "gelu" (exact), "relu" or "silu"."""
    match activation:
        case "none":
            return x
        case "gelu":
            return torch.ops.aten.gelu_(x) if in_place else functional.gelu(x)
        case "relu":
            return functional.relu(x, inplace=in_place)
        case "silu":
            return functional.silu(x, inplace=in_place)
        case _:
            raise ValueError(f"unknown activation {activation}")


def add_gradient(gemm: TorchGemm, parameter: Parameter, grad_y: Tensor, x: Tensor) -> None:
    """Add grad_y^T x to the gradient of a parameter [out, in], or [1, out, in]; a first one is written, not added."""
    begun = parameter.grad
    parameter.grad = torch.empty_like(parameter) if begun is None else begun
    gemm.add_product(parameter.grad.flatten(0, -2), grad_y, x, is_new=begun is None)


def ensure_grad(parameter: Parameter) -> Tensor:
    """Return the gradient that a parameter accumulates, zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
