"""One expert of a Hugging Face family by products of our own, with what the family does between them.

    y = W_down gate(W_up x)

W_up is gate_up_proj, or up_proj where there is no gate, each [1, out, in] or transposed [1, in, out]; gate is the
family's own, with its activation, clamps and order of numbers, and is differentiated by autograd. Every module of
transformers' registry computes this; one with more in it, such as a norm, is run by its family's loop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hpcmoe.experts.feed_forward import Kept
from hpcmoe.gemm import TorchGemm, add_gradient, choose_gemm, ensure_grad

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


class FusedMatrix:
    """A matrix of one expert, the only one in a fused parameter, and its bias: products as those of a WeightMatrix."""

    def __init__(self, expert: nn.Module, name: str) -> None:
        self.parameter = expert._parameters[name]
        bias = f"{name}_bias"
        self.bias = expert._parameters.get(bias, expert._buffers.get(bias))
        self.is_transposed = expert.is_transposed

    @property
    def weight(self) -> Tensor:
        """Return the matrix, [out, in]."""
        assert self.parameter is not None
        weight = self.parameter.detach()[0]
        return weight.t() if self.is_transposed else weight

    def linear(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: x [n, in] -> [n, out]."""
        bias = None if self.bias is None else self.bias.detach()[0]
        return choose(x).linear(x, self.weight, bias, "none")

    def multiply_back(self, grad_y: Tensor) -> Tensor:
        """Return grad_y W: grad_y [n, out] -> [n, in]."""
        return choose(grad_y).multiply_back(grad_y, self.weight)

    def add_gradients(self, grad_y: Tensor, x: Tensor) -> None:
        """Add grad_y^T x to the weight's gradient, and grad_y's sum over rows to the bias's; none to a frozen one's."""
        assert self.parameter is not None
        if self.parameter.requires_grad:
            add_gradient(choose(x), self.parameter, *((x, grad_y) if self.is_transposed else (grad_y, x)))
        if isinstance(self.bias, nn.Parameter) and self.bias.requires_grad:
            ensure_grad(self.bias)[0].add_(grad_y.sum(dim=0))

    def add_bias_product(self, total: Tensor, grad_y: Tensor) -> None:
        """Add grad_y . bias to total [n] float32, where there is a bias."""
        if self.bias is not None:
            total += grad_y.float() @ self.bias.detach()[0].float()


def choose(x: Tensor) -> TorchGemm:
    """Choose what multiplies with x."""
    return choose_gemm(x.device.type, x.dtype)


def has_products(expert: Any) -> bool:
    """Return True if an expert is two products and a gate between them."""
    names = {name.removesuffix("_bias") for name in (*expert._parameters, *expert._buffers)}
    up = first_matrix(expert)
    gated = callable(getattr(expert, "_apply_gate" if up == "gate_up_proj" else "act_fn", None))
    return gated and names == {up, "down_proj"} and not getattr(expert, "has_post_expert_norm", False)


def first_matrix(expert: nn.Module) -> str:
    """Return the name of the matrix that an expert's rows are multiplied with first."""
    return "gate_up_proj" if "gate_up_proj" in expert._parameters else "up_proj"


def apply_gate(expert: Any, inner: Tensor) -> Tensor:
    """Apply the family's gate, or its activation where it has none: [n, 2F] or [n, F] -> [n, F]."""
    return expert._apply_gate(inner) if "gate_up_proj" in expert._parameters else expert.act_fn(inner)


def forward(expert: nn.Module, x: Tensor, kept: list[Kept] | None) -> Tensor:
    """Compute x [n, H] -> y [n, H]; what backward() needs is appended to kept, if any."""
    inner = FusedMatrix(expert, first_matrix(expert)).linear(x)
    if kept is not None:
        kept.append((x, inner))
    return FusedMatrix(expert, "down_proj").linear(apply_gate(expert, inner))


def backward(expert: nn.Module, kept: Kept, grad_y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients from grad_y [n, H], that of the output to which y came as gate * y, and gates [n] float32.

    -> (grad_x [n, H], grad_gate [n] float32), both partial sums under tensor parallelism. Adds to the parameters'
    gradients.
    """
    # Propagate to the hidden numbers and the gate value, as hpcmoe.experts.feed_forward does.
    x, inner = kept
    up, down = FusedMatrix(expert, first_matrix(expert)), FusedMatrix(expert, "down_proj")
    with torch.enable_grad(), plain_graph():
        inner = inner.detach().requires_grad_()
        hidden = apply_gate(expert, inner)
    grad_hidden = down.multiply_back(grad_y)
    grad_gate = (grad_hidden * hidden.detach()).sum(dim=1).float()
    down.add_bias_product(grad_gate, grad_y)

    # Propagate to the weights and the input: from here on gradients are times the gate value.
    gates = gates.to(grad_y.dtype)[:, None]
    down.add_gradients(grad_y * gates, hidden.detach())
    (grad_inner,) = torch.autograd.grad(hidden, inner, grad_hidden.mul_(gates))
    up.add_gradients(grad_inner, x)
    return up.multiply_back(grad_inner), grad_gate


def plain_graph() -> saved_tensors_hooks:
    """Let autograd save what it needs as it is.

    A checkpoint around the layer has no part in it: the calling thread may be another micro-batch's.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
