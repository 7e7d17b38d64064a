"""Matrix products by whoever is fastest on this processor: oneDNN, MKL through torch, or float32 in bfloat16's place.

With AVX-512 oneDNN's float32 products run at twice the speed of torch.mm on AMD, where MKL keeps to AVX2. Without it
MKL is the faster by a fifth, but for few rows, whose weights oneDNN reads packed; and bfloat16 has no products at all.
oneDNN compiles a kernel for every new shape (0.2 ms, kept for the 1024 shapes last used), so few different numbers of
rows are faster. Who multiplies follows from the processor, never from a timing: the same run has the same last bits.
"""

import functools

import torch
from torch.nn import functional

_MAX_GRADIENT_ROWS = 512  # of one product for a gradient; oneDNN slows down beyond
_SMALL_PRODUCT = 2**22  # of numbers; MKL needs no kernel of its own for each new shape
_MAX_PACKED_ROWS = 64  # of a packed product that without AVX-512 oneDNN does faster than MKL
_GRADIENT_PIECE_BYTES = 2**21  # of a product before it is added up
_LARGE_GRADIENT = 2**26  # numbers; with fewer the host takes longer to start a sum in place (120 us) than a GPU gains


class WeightMatrix:
    """A weight [out, in] and the products with it; copies of it, cast and packed, are made once and then kept."""

    def __init__(self, parameter, packed=False):
        """packed: the weight rests, as in inference, and is laid out anew for linear()."""
        self.parameter, self.packed = parameter, packed
        self.weights, self.packs, self.gemms = {}, {}, {}  # dtype: in that precision, packed, and who multiplies

    def refresh(self):
        """Forget the copies: the weight has changed."""
        self.weights, self.packs = {}, {}

    @property
    def cast_bytes(self):
        """Bytes of the copies that are kept."""
        copies = [weight for weight in self.weights.values() if weight.dtype != self.parameter.dtype]
        copies += [pack for dtype, pack in self.packs.items() if pack is not self.weights[dtype]]
        return sum(torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes for copy in copies)

    def linear(self, x, bias=None, activation="none"):
        """x [n, in] -> activation(x W^T + bias) [n, out]; activation "none", "gelu" (exact), "relu" or "silu"."""
        gemm, weight = self.prepare(x.dtype)
        if self.packed and gemm.wants_packed(len(x)):
            if x.dtype not in self.packs:
                self.packs[x.dtype] = gemm.pack(weight)
            weight = self.packs[x.dtype]
        return gemm.linear(x, weight, bias, activation)

    def back(self, grad_y):
        """grad_y [n, out] -> grad_y W [n, in]."""
        gemm, weight = self.prepare(grad_y.dtype)
        return gemm.back(grad_y, weight)

    def add_gradient(self, grad_y, x):
        """Add grad_y^T x to the weight's gradient, grad_y [n, out], x [n, in]; float32 whatever they are."""
        gemm, _ = self.prepare(x.dtype)
        gemm.add_product(ensure_grad(self.parameter), grad_y, x)

    def prepare(self, dtype):
        """Find who multiplies in this precision, and the weight as it is read -> (gemm, weight [out, in])."""
        if dtype not in self.gemms:
            self.gemms[dtype] = choose_gemm(self.parameter.device.type, dtype)
        if dtype not in self.weights:
            self.weights[dtype] = self.parameter.detach().to(self.gemms[dtype].precision or dtype)
        return self.gemms[dtype], self.weights[dtype]


class TorchGemm:
    """Products that every build and device of torch has."""

    precision = None  # of the weights: that of the rows

    def wants_packed(self, num_rows):
        """There is no better layout."""
        return False

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        return activate(functional.linear(x, weight, bias), activation, in_place=True)

    def back(self, grad_y, weight):
        """grad_y weight."""
        return torch.mm(grad_y, weight)

    def outer(self, grad_y, x):
        """grad_y^T x."""
        return torch.mm(grad_y.t(), x)

    def add_product(self, gradient, grad_y, x):
        """gradient += grad_y^T x, in float32; a product in bfloat16 is rounded once, then added."""
        if x.dtype == gradient.dtype:
            gradient.addmm_(grad_y.t(), x)
        else:
            gradient.add_(self.outer(grad_y, x))


class CudaGemm(TorchGemm):
    """Torch's products on a GPU."""

    def add_product(self, gradient, grad_y, x):
        """gradient += grad_y^T x, in float32; for a large gradient as it is made, without a product beside it."""
        if x.is_cuda and adds_as_made(x.dtype, gradient.numel()):
            torch.addmm(gradient, grad_y.t(), x, out_dtype=gradient.dtype, out=gradient)
        else:
            super().add_product(gradient, grad_y, x)


class PackedGemm(TorchGemm):
    """Torch's products, but for those of few rows with a packed weight, which oneDNN does: without AVX-512."""

    def __init__(self, few_rows=_MAX_PACKED_ROWS):
        """few_rows: beyond so many torch is the faster."""
        self.few_rows = few_rows

    def wants_packed(self, num_rows):
        """Whether a product with so many rows is faster on the layout of pack()."""
        return num_rows <= self.few_rows

    def pack(self, weight):
        """Lay a weight out as oneDNN's kernels read it -> an opaque tensor."""
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        by_whom = multiply_by_onednn if weight.is_mkldnn else super().linear
        return by_whom(x, weight, bias, activation)


class OneDnnGemm(PackedGemm):
    """Products by oneDNN, which takes bias and activation along; of however many rows it likes a packed weight best."""

    def wants_packed(self, num_rows):
        """A product with however many rows is."""
        return True

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        small = not weight.is_mkldnn and x.dtype == torch.float32 and len(x) * weight.numel() < _SMALL_PRODUCT
        by_whom = super().linear if small else multiply_by_onednn
        return by_whom(x, weight, bias, activation)

    def back(self, grad_y, weight):
        """grad_y weight."""
        return self.linear(grad_y, weight.t(), None, "none")

    def outer(self, grad_y, x):
        """grad_y^T x."""
        if len(x) == 0:  # oneDNN knows no product over nothing
            return super().outer(grad_y, x)
        return self.linear(grad_y.t(), x.t(), None, "none")

    def add_product(self, gradient, grad_y, x):
        """gradient += grad_y^T x, in float32; a product in bfloat16 is rounded once, then added.

        It is made in pieces: kernels stay in memory, and each that is made beside a product as large as the weight
        keeps the heap from using that space for the next.
        """
        outer = self.outer if x.dtype == torch.float32 else super().outer  # torch's asks oneDNN in bfloat16
        num_columns = max(1, _GRADIENT_PIECE_BYTES // (x.shape[1] * x.element_size()))
        for grads_y, rows in zip(grad_y.split(_MAX_GRADIENT_ROWS), x.split(_MAX_GRADIENT_ROWS), strict=True):
            for piece, columns in zip(gradient.split(num_columns), grads_y.split(num_columns, dim=1), strict=True):
                piece.add_(outer(columns, rows))


def multiply_by_onednn(x, weight, bias, activation):
    """activation(x weight^T + bias) by oneDNN; weight [out, in], packed or not."""
    name = "swish" if activation == "silu" else activation
    algorithm = "none" if activation == "gelu" else ""  # gelu without an approximation
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


class WideGemm:
    """Products in float32 of rows in another precision, whose results are rounded once: where it has no products."""

    precision = torch.float32

    def __init__(self, gemm):
        """gemm: who multiplies in float32."""
        self.gemm, self.wants_packed, self.pack = gemm, gemm.wants_packed, getattr(gemm, "pack", None)

    def linear(self, x, weight, bias, activation):
        """activation(x weight^T + bias)."""
        wide = None if bias is None else bias.float()
        return self.gemm.linear(x.float(), _to_float32(weight), wide, activation).to(x.dtype)

    def back(self, grad_y, weight):
        """grad_y weight."""
        return self.gemm.back(grad_y.float(), _to_float32(weight)).to(grad_y.dtype)

    def outer(self, grad_y, x):
        """grad_y^T x."""
        return self.gemm.outer(grad_y.float(), x.float()).to(grad_y.dtype)

    def add_product(self, gradient, grad_y, x):
        """gradient += grad_y^T x, in float32."""
        self.gemm.add_product(gradient, grad_y.float(), x.float())


def _to_float32(weight):
    """See a weight in float32, packed or not."""
    return weight if weight.is_mkldnn else weight.float()


def multiply(x, weight):
    """x [n, in], weight [out, in] -> x W^T [n, out], which autograd can go back through."""
    return Product.apply(x, weight)


class Product(torch.autograd.Function):
    """x W^T by whoever multiplies fastest, and its two gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return choose_gemm(weight.device.type, x.dtype).linear(x, weight, None, "none")

    @staticmethod
    def backward(ctx, grad_y):
        """Go back: grad_y W, and grad_y^T x."""
        x, weight = ctx.saved_tensors
        gemm = choose_gemm(weight.device.type, x.dtype)
        grad_y = grad_y.contiguous()
        by_x = gemm.back(grad_y, weight) if ctx.needs_input_grad[0] else None
        by_weight = gemm.outer(grad_y, x) if ctx.needs_input_grad[1] else None
        return by_x, by_weight


@functools.cache
def choose_gemm(device, dtype):
    """Choose who multiplies on a kind of device in a precision, by what this build and processor can."""
    if device != "cpu":
        return CudaGemm()
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        gemm = OneDnnGemm() if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else PackedGemm()
        small = torch.zeros(2, 2, dtype=dtype)
        try:
            gemm.linear(small, gemm.pack(small), None, "gelu")
        except RuntimeError:  # a precision that this processor lacks
            pass
        else:
            return gemm
    return TorchGemm() if dtype == torch.float32 else WideGemm(choose_gemm(device, torch.float32))


def adds_as_made(dtype, numel):
    """Whether a GPU adds products in this precision to a float32 gradient of so many numbers as it makes them."""
    return dtype != torch.float32 and numel >= _LARGE_GRADIENT and hasattr(torch.ops.aten.addmm, "dtype_out")


def count_copy_bytes(dtype, parameter_dtype, packed):
    """Bytes that a number of a weight on the host takes besides its parameter, once it has been multiplied with."""
    gemm = choose_gemm("cpu", dtype)
    read = gemm.precision or dtype
    cast = 0 if read == parameter_dtype else read.itemsize
    return cast + (read.itemsize if packed and gemm.wants_packed(1) else 0)


def activate(x, activation, in_place=False):
    """Apply an activation by name, to each number."""
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


def activate_back(grad_y, x, activation):
    """The gradient of x of a loss whose gradient of activate(x) is given."""
    match activation:
        case "gelu":
            return torch.ops.aten.gelu_backward(grad_y, x)
        case "relu":
            return torch.ops.aten.threshold_backward(grad_y, x, 0)
        case "silu":
            return torch.ops.aten.silu_backward(grad_y, x)
        case _:
            raise ValueError(f"unknown activation {activation}")


def ensure_grad(parameter):
    """The gradient that a parameter gathers, zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
