"""Products with a weight are those of its values at this moment, whoever multiplies and however they are laid out."""

import pytest
import torch

from hpcmoe import gemm
from hpcmoe.gemm import Matrix, OneDnnGemm, TorchGemm, activate, activate_back, choose_gemm

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest number
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found, expected, dtype):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], error.item()


@pytest.fixture(params=["as this machine does", "by torch alone"], autouse=True)
def multiplier(request, monkeypatch):
    """Whatever choose_gemm finds here, and the fallback."""
    if request.param == "by torch alone":
        monkeypatch.setattr(gemm, "choose_gemm", lambda weight: TorchGemm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_linear_is_the_product_the_bias_and_the_activation(num_rows, dtype, packed):
    weight, bias, x = draw(20, 33), draw(20, seed=1).to(dtype), draw(num_rows, 33, seed=2).to(dtype)
    matrix = Matrix(torch.nn.Parameter(weight), packed)
    for given in (None, bias):
        product = x.double() @ weight.to(dtype).double().T + (0 if given is None else bias.double())
        for name, function in ACTIVATIONS.items():
            y = matrix.linear(x, given, name)
            assert y.dtype == dtype and y.is_contiguous() and not y.requires_grad
            assert_near(y, function(product), dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_back_is_the_product_with_the_matrix_itself(dtype, packed):
    weight, slope = draw(20, 33), draw(7, 20, seed=2).to(dtype)
    matrix = Matrix(torch.nn.Parameter(weight), packed)
    back = matrix.back(slope)
    assert back.dtype == dtype and back.is_contiguous()
    assert_near(back, slope.double() @ weight.to(dtype).double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_rows", [1024, 96])  # of one product
@pytest.mark.parametrize("piece_bytes", [2**21, 1000])
def test_gradients_add_up_in_float32(dtype, most_rows, piece_bytes, monkeypatch):
    """Over batches of one row, of less than what oneDNN takes, of just that, and of more."""
    monkeypatch.setattr(gemm, "MOST_GRADIENT_ROWS", most_rows)
    monkeypatch.setattr(gemm, "PIECE_BYTES", piece_bytes)
    parameter = torch.nn.Parameter(draw(20, 33))
    parameter.grad = gathered = draw(20, 33, seed=1)
    expected, matrix = gathered.double(), Matrix(parameter)
    for num_rows in (1, 40, 64, 128, 300):
        slope, x = draw(num_rows, 20, seed=num_rows).to(dtype), draw(num_rows, 33, seed=-num_rows).to(dtype)
        matrix.add_gradient(slope, x)
        expected = expected + slope.double().T @ x.double()
    assert parameter.grad is gathered and gathered.dtype == torch.float32  # in place: it may be a view of all gradients
    assert_near(gathered, expected, dtype)


def test_small_contributions_in_bfloat16_are_not_lost():
    """A sum of a thousand in bfloat16 would stop growing at 256."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    matrix = Matrix(parameter)
    for _ in range(1000):
        matrix.add_gradient(torch.ones(64, 2, dtype=torch.bfloat16) / 64, torch.ones(64, 3, dtype=torch.bfloat16))
    assert (parameter.grad == 1000).all()


@pytest.mark.parametrize("packed", [False, True])
def test_copies_are_made_once_and_anew_after_refresh(packed):
    parameter, x, slope = torch.nn.Parameter(draw(64, 32)), draw(5, 32).bfloat16(), draw(5, 64).bfloat16()
    matrix = Matrix(parameter, packed)
    assert matrix.num_packed_bytes == 0
    before = matrix.linear(x), matrix.back(slope)
    held = matrix.num_packed_bytes
    num_copies = 2 if packed and isinstance(gemm.choose_gemm(parameter), OneDnnGemm) else 1
    assert held == num_copies * parameter.numel() * 2
    parameter.data.mul_(2)
    for same, copied in zip((matrix.linear(x), matrix.back(slope)), before, strict=True):
        assert torch.equal(same, copied)
    assert matrix.num_packed_bytes == held

    matrix.refresh()
    assert matrix.num_packed_bytes == 0
    for new, old in zip((matrix.linear(x), matrix.back(slope)), before, strict=True):
        assert torch.equal(new, 2 * old)


def test_a_weight_in_its_own_precision_is_not_copied():
    matrix = Matrix(torch.nn.Parameter(draw(20, 32)))
    matrix.linear(draw(5, 32))
    matrix.back(draw(5, 20))
    assert matrix.num_packed_bytes == 0


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_going_back_through_an_activation_is_autograds(activation):
    x, slope = draw(6, 5).double().requires_grad_(), draw(6, 5, seed=1).double()
    activate(x, activation).backward(slope)
    assert torch.allclose(activate_back(slope, x.detach(), activation), x.grad)


def test_unknown_activations_are_refused():
    for refused in (lambda: activate(draw(1), "tanh"), lambda: activate_back(draw(1), draw(1), "none")):
        with pytest.raises(ValueError, match="unknown activation"):
            refused()


def test_torch_multiplies_where_onednn_cannot(monkeypatch):
    weight = draw(2, 2)
    choose = gemm.choose_gemm_for.__wrapped__  # which remembers nothing
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(choose("cpu", weight.dtype), TorchGemm)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(OneDnnGemm, "pack", lambda gemm, weight: weight[:, :1])  # a shape that it refuses
    assert isinstance(choose("cpu", weight.dtype), TorchGemm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_multiply_and_its_way_back_are_autograds(num_rows, dtype):
    x, weight, slope = draw(num_rows, 33).to(dtype), draw(20, 33, seed=1).to(dtype), draw(num_rows, 20, seed=2)
    found, wanted = ([t.detach().to(kind).requires_grad_() for t in (x, weight)] for kind in (dtype, torch.float64))
    product = gemm.multiply(*found)
    product.backward(slope.to(dtype))
    expected = torch.nn.functional.linear(*wanted)
    expected.backward(slope.to(dtype).double())
    assert product.dtype == dtype
    for ours, theirs in ((product, expected), *((f.grad, w.grad) for f, w in zip(found, wanted, strict=True))):
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN")
def test_onednn_multiplies_where_it_can():
    assert isinstance(choose_gemm(draw(2, 2)), OneDnnGemm)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN")
def test_a_weight_that_rests_is_packed_once_and_read_so(monkeypatch):
    monkeypatch.setattr(gemm, "choose_gemm", choose_gemm)
    seen, linear = [], OneDnnGemm.linear
    monkeypatch.setattr(OneDnnGemm, "linear", lambda self, x, w, *rest: seen.append(w) or linear(self, x, w, *rest))
    matrix = Matrix(torch.nn.Parameter(draw(64, 32)), packed=True)
    matrix.prepare(torch.float32)
    seen.clear()
    matrix.linear(draw(3, 32))
    matrix.linear(draw(5, 32))
    assert [weight.is_mkldnn for weight in seen] == [True, True] and seen[0] is seen[1]
