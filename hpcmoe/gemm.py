"""Matrix products: by oneDNN with fused activations where torch offers it, else by torch alone.

On a core with AVX-512 oneDNN's float32 products run at twice the speed of torch.mm, which asks MKL. oneDNN compiles a
kernel for every new shape (0.2 ms, kept for the 1024 shapes last used), so few different numbers of rows are faster.
"""

import functools

import torch
from torch.nn import functional

MOST_GRADIENT_ROWS = 512  # of one product for a gradient; oneDNN slows down beyond
FEW_PRODUCTS = 2**22  # of numbers; MKL needs no kernel of its own for each new shape
PIECE_BYTES = 2**21  # of a product before it is added up


class Matrix:
    """A weight [out, in] and the products with it; copies of it, cast and packed, are made once and then kept."""

    def __init__(self, parameter, packed=False):
        """packed: the weight rests, as in inference, and is laid out anew for linear()."""
        self.parameter, self.packed = parameter, packed
        self.weights, self.packs, self.gemms = {}, {}, {}  # dtype: in that precision, packed, and who multiplies

    def refresh(self):
        """Forget the copies: the weight has changed."""
        self.weights, self.packs = {}, {}

    @property
    def num_packed_bytes(self):
        """Bytes of the copies that are kept."""
        copies = [weight for dtype, weight in self.weights.items() if dtype != self.parameter.dtype]
        copies += [pack for dtype, pack in self.packs.items() if pack is not self.weights[dtype]]
        return sum(torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes for copy in copies)

    def linear(self, x, bias=None, activation="none"):
        """x [n, in] -> activation(x W^T + bias) [n, out]; activation "none", "gelu" (exact), "relu" or "silu"."""
        gemm, weight = self.prepare(x.dtype)
        if self.packed:
            if x.dtype not in self.packs:
                self.packs[x.dtype] = gemm.pack(weight)
            weight = self.packs[x.dtype]
        return gemm.linear(x, weight, bias, activation)

    def back(self, slope):
        """slope [n, out] -> slope W [n, in]."""
        gemm, weight = self.prepare(slope.dtype)
        return gemm.linear(slope, weight.t(), None, "none")

    def add_gradient(self, slope, x):
        """Add slope^T x to the weight's gradient, slope [n, out], x [n, in]; float32 whatever they are."""
        gemm, _ = self.prepare(x.dtype)
        gradient = find_gradient(self.parameter)
        for rows in zip(slope.split(MOST_GRADIENT_ROWS), x.split(MOST_GRADIENT_ROWS), strict=True):
            gemm.add_product(gradient, *rows)

    def prepare(self, dtype):
        """Find who multiplies in this precision, and the weight in it -> (gemm, weight [out, in])."""
        if dtype not in self.weights:
            self.weights[dtype] = self.parameter.detach().to(dtype)
        if dtype not in self.gemms:
            self.gemms[dtype] = choose_gemm(self.weights[dtype])
        return self.gemms[dtype], self.weights[dtype]


class TorchGemm:
    """Products that every build and device of torch has."""

    def pack(self, weight):
        """There is no better layout."""
        return weight

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        return activate(functional.linear(x, weight, bias), activation)

    def add_product(self, gradient, slope, x):
        """gradient += slope^T x, in float32; a product in bfloat16 is rounded once, then added."""
        if x.dtype == gradient.dtype:
            gradient.addmm_(slope.t(), x)
        else:
            gradient.add_(torch.mm(slope.t(), x))


class OneDnnGemm:
    """Products by oneDNN, which takes bias and activation along."""

    def pack(self, weight):
        """Lay a weight out as oneDNN's kernels read it -> an opaque tensor."""
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        if x.dtype == torch.float32 and not weight.is_mkldnn and len(x) * weight.numel() < FEW_PRODUCTS:
            return TorchGemm().linear(x, weight, bias, activation)
        name = "swish" if activation == "silu" else activation
        algorithm = "none" if activation == "gelu" else ""  # gelu without an approximation
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)

    def add_product(self, gradient, slope, x):
        """gradient += slope^T x, in float32; a product in bfloat16 is rounded once, then added.

        It is made in pieces: kernels stay in memory, and each that is made beside a product as large as the weight
        keeps the heap from using that space for the next.
        """
        num_columns = max(1, PIECE_BYTES // (x.shape[1] * x.element_size()))
        for piece, columns in zip(gradient.split(num_columns), slope.split(num_columns, dim=1), strict=True):
            if x.dtype == torch.float32:
                piece.add_(self.linear(columns.t(), x.t(), None, "none"))
            else:
                piece.add_(torch.mm(columns.t(), x))  # by oneDNN too, and here the faster


def multiply(x, weight):
    """x [n, in], weight [out, in] -> x W^T [n, out], which autograd can go back through."""
    return Product.apply(x, weight)


class Product(torch.autograd.Function):
    """x W^T by whoever multiplies fastest, and its two slopes."""

    @staticmethod
    def forward(ctx, x, weight):
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return choose_gemm(weight).linear(x, weight, None, "none")

    @staticmethod
    def backward(ctx, slope):
        """Go back: slope W, and slope^T x."""
        x, weight = ctx.saved_tensors
        gemm = choose_gemm(weight) if len(x) else TorchGemm()  # oneDNN knows no product over nothing
        slope = slope.contiguous()
        by_x = gemm.linear(slope, weight.t(), None, "none") if ctx.needs_input_grad[0] else None
        by_weight = gemm.linear(slope.t(), x.t(), None, "none") if ctx.needs_input_grad[1] else None
        return by_x, by_weight


def choose_gemm(weight):
    """Choose who multiplies by weights like this one."""
    return choose_gemm_for(weight.device.type, weight.dtype)


@functools.cache
def choose_gemm_for(device, dtype):
    """Take oneDNN if this build of torch has it and it accepts this precision, asked with a small weight."""
    if device == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        gemm, small = OneDnnGemm(), torch.zeros(2, 2, dtype=dtype)
        try:
            gemm.linear(small, gemm.pack(small), None, "gelu")
        except RuntimeError:  # a precision that this processor lacks
            return TorchGemm()
        return gemm
    return TorchGemm()


def activate(x, activation):
    """Apply an activation by name, to each number."""
    match activation:
        case "none":
            return x
        case "gelu":
            return functional.gelu(x)
        case "relu":
            return functional.relu(x)
        case "silu":
            return functional.silu(x)
        case _:
            raise ValueError(f"unknown activation {activation}")


def activate_back(slope, x, activation):
    """The slope by x of a loss whose slope by activate(x) is given."""
    match activation:
        case "gelu":
            return torch.ops.aten.gelu_backward(slope, x)
        case "relu":
            return torch.ops.aten.threshold_backward(slope, x, 0)
        case "silu":
            return torch.ops.aten.silu_backward(slope, x)
        case _:
            raise ValueError(f"unknown activation {activation}")


def find_gradient(parameter):
    """The gradient that a parameter gathers, zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
